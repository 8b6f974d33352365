"""What data.shards may name, and what of it may be shown."""

from __future__ import annotations

import os

import pytest

from clae_dist.config import Config, Data
from clae_dist.config.sharing import shareable
from clae_dist.data.shard_set import entries_of, open_shards
from clae_dist.data.urls import absolute, join, redact, redact_list, redact_text, scheme, uri_without_secrets, without_secrets
from clae_dist.errors import ConfigError


def test_lists_are_written_as_in_webdataset() -> None:
    assert entries_of("/data/x-{000..002}.tar") == [f"/data/x-00{number}.tar" for number in range(3)]
    assert entries_of("https://h/{a,b}.tar::c.tar") == ["https://h/a.tar", "https://h/b.tar", "c.tar"]
    assert entries_of("pipe:cat {1..2}.tar") == ["pipe:cat 1.tar", "pipe:cat 2.tar"]
    assert entries_of("s3://bucket/folder") == ["s3://bucket/folder"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.shards is ''; name a folder"),
        ("a.tar::folder", "lists 'folder' among 2 entries"),
        ("{a.tar,b.tar.gz}", "lists 'b.tar.gz' among 2 entries"),
        ("x-{0..2.tar", "whose braces cannot be expanded"),
    ],
)
def test_what_cannot_be_meant_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_shards(Data(shards=text))


def test_paths_become_absolute_and_urls_stay() -> None:
    here = os.getcwd()
    assert absolute("shards") == f"{here}/shards"
    assert absolute("") == ""
    text = "x-{0..2}.tar::https://h/x.tar::file:///data/y.tar::pipe:cat z.tar"
    assert absolute(text) == f"{here}/x-{{0..2}}.tar::https://h/x.tar::/data/y.tar::pipe:cat z.tar"


def test_a_signature_stays_behind_the_files_name() -> None:
    assert join("https://h/set/?sig=1", "train 0.tar") == "https://h/set/train%200.tar?sig=1"
    assert join("s3://bucket/set/", "a.tar") == "s3://bucket/set/a.tar"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@h:80/x.tar?sig=s3cret#f", "https://h:80/x.tar?…"),
        ("s3://key:pass@bucket/x", "s3://bucket/x"),
        ("pipe:curl -H 'Authorization: Bearer tok' https://h/x.tar", "pipe:curl …"),
        ("pipe:A=1 TOKEN='tok and more' curl https://h/x.tar", "pipe:curl …"),
        ("pipe:$(cat tok)", "pipe: …"),
        ("pipe:'tok", "pipe: …"),
        ("/data/a?b.tar", "/data/a?b.tar"),
        ("https://u:p@h/{0..9}.tar", "https://h/{0..9}.tar"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact_list(f"{text}::{text}") == f"{shown}::{shown}"


def test_messages_and_files_of_a_run_hold_no_secret() -> None:
    assert redact_text("no route to 'https://u:p@h/x?t=1', sorry") == "no route to 'https://h/x?…', sorry"
    assert without_secrets("https://u:p@h/x?t=1::pipe:curl -H 'X: tok' https://h/y") == "https://h/x?…::pipe:curl ?…"


def test_schemes() -> None:
    assert [scheme(text) for text in ("HTTPS://h", "file:///x", "/x", "pipe:a", "C:/x", "gs://b")] == [
        "https",
        "",
        "",
        "pipe",
        "",
        "gs",
    ]


def test_a_run_writes_down_no_secret() -> None:
    data = Data(shards="https://me:hunter2@host/a?token=1", mixture={"s3://key:hunter2@bucket/b": 0.25})
    written = shareable(Config(data=data)).data
    assert (written.shards, written.mixture) == ("https://host/a?…", {"s3://bucket/b": 0.25})


def test_a_url_whose_secret_was_not_written_down_is_asked_for_again() -> None:
    with pytest.raises(ConfigError, match=r"the part after the question mark was a secret.*--shards"):
        entries_of(shareable(Config(data=Data(shards="https://host/a?token=1"))).data.shards)


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("pipe:gzip -dc /data/x-{0..9}.tar.gz", "pipe:gzip -dc /data/x-{0..9}.tar.gz"),
        ("pipe:cat /data/x.tar", "pipe:cat /data/x.tar"),
        ("pipe:cat x | openssl enc -d -k tok3n", "pipe:cat ?…"),
        ("pipe:aws s3 cp --token tok3n s3://b/x.tar -", "pipe:aws ?…"),
        ("pipe:cat https://me:tok3n@h/x", "pipe:cat ?…"),
        ("pipe:", "pipe: ?…"),
    ],
)
def test_a_command_may_hold_a_token_anywhere(command: str, kept: str) -> None:
    assert without_secrets(command) == kept


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://clae:s3cret@db:5432/mlflow", "postgresql://clae@db:5432/mlflow"),
        ("postgresql://clae@db/mlflow?password=s3cret&sslmode=require", "postgresql://clae@db/mlflow?sslmode=require"),
        ("https://s3cret@host:5000", "https://host:5000"),
        ("https://me:s3cret@host:5000/a", "https://host:5000/a"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("sqlite:///mlflow.db?timeout=5", "sqlite:///mlflow.db?timeout=5"),
        ("", ""),
    ],
)
def test_the_address_of_a_store_without_its_password(uri: str, shown: str) -> None:
    assert uri_without_secrets(uri) == shown
