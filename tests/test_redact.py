"""Secrets in every form in which they were seen, in everything that is printed or written."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.config import Config, Data, Tracking
from clae_dist.config.sharing import shareable
from clae_dist.launchers.rank import Console
from clae_dist.recipe import to_yaml
from clae_dist.redact import redact, redact_list, redact_text, redact_word, uri_without_secrets, without_secrets
from tests import processes

URLS = [  # S3CR3T must go, keepme stays where it is
    "https://keepme:S3CR3T@host/x".replace("keepme", "me"),
    "https://S3CR3T@keepme:5000/a",
    "https://keepme:5000/?token=S3CR3T",
    "https://keepme/a?x=1&sig=S3CR3T#f",
    "https://keepme/a#access_token=S3CR3T",
    "https://keepme/a;session=S3CR3T",
    "HTTPS://me:S3CR3T@keepme/x",
    "https://me:p@S3CR3T@keepme/x",
    "https://me:p/S3CR3T@keepme/x",
    "https://me:p@a/S3CR3T@keepme/x",
    "https://me:p?S3CR3T@keepme/x",
    "https://me:p#S3CR3T@keepme/x",
    "https://me:S3CR3T@[::1]:5000/keepme",
    "databricks://S3CR3T@keepme",
    "databricks://token:S3CR3T@keepme",
    "databricks://dapi0123456789abcdef0123456789abcdefS3CR3T".replace("S3CR3T", ""),
    "s3://AKEY:S3CR3T@keepme/x",
    "postgresql://keepme:S3CR3T@db:5432/mlflow",
    "postgresql+psycopg2://keepme:p@S3CR3T@db/mlflow",
    "postgresql://keepme:p/S3CR3T@db/mlflow",
    "postgresql://keepme@db/mlflow?password=S3CR3T&sslmode=require",
    "postgresql://keepme@db/mlflow?options=-c%20pass%3DS3CR3T",
    "mysql+pymysql://keepme:S3CR3T@db/mlflow?ssl_key=S3CR3T",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BUID%3Dme%3BPWD%3DS3CR3T",
    "keepme.yaml",
    "me:S3CR3T@keepme:5000/x",
    "https:/me:S3CR3T@keepme/x",
]


def test_tokens_are_known_by_their_beginnings() -> None:
    tokens = ["ya29.a0AfB_byC-Sl0ng.t0ken-0f-Google", "ghp_0123456789abcdefghij", "AKIA0123456789ABCDEF"]
    for token in tokens:
        assert redact_text(f"refused: {token}, and more") == "refused: …, and more"


@pytest.mark.parametrize("url", URLS)
def test_no_form_of_a_url_shows_its_secret(url: str) -> None:
    for show in (redact, redact_list, redact_text, redact_word, without_secrets, uri_without_secrets):
        shown = show(url)
        assert "S3CR3T" not in shown, show.__name__
        assert "dapi" not in shown
        assert ("keepme" in shown) == ("keepme" in url) or show in (redact, redact_list, without_secrets), (
            shown,
            show.__name__,
        )
        assert show(shown) == shown, "done twice, nothing changes: what config.yaml holds is read again"


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach 'https://me:S3CR3T@keepme/x': refused",
        "401 for Authorization: Bearer S3CR3Tabcdef, keepme",
        "Authorization: Basic UzNDUjNU keepme".replace("UzNDUjNU", "S3CR3Tab"),
        "MLFLOW_TRACKING_TOKEN=S3CR3T keepme",
        "password=S3CR3T, keepme",
        '{"url": "https://keepme/?token=S3CR3T"}',
        "postgresql://me:S3CR3T@db/x keepme",
    ],
)
def test_no_message_shows_one(text: str) -> None:
    shown = redact_text(text)
    assert "S3CR3T" not in shown
    assert "keepme" in shown


@pytest.mark.parametrize(
    "text",
    [
        "step  10/600  epoch   1.67  loss 6.3685 (clean 3.8888, adversarial 2.4796)  lr 0.000999  left 1:23:44",
        "data: colours, 2 shards at /data/a@b/x; cache /c (as much as the disk has)",
        "MLflow's page: mlflow ui --backend-store-uri sqlite:////runs/mlflow.db",
        "ray: 2 workers, with Ray 2.60.0; 12:03:01 user@host:/path",
        "https://h/a.tar?…::https://h/b.tar?…::pipe:curl … and",
        "https://host:5000/a/b.tar and s3://bucket/x-{000000..000009}.tar",
        "compressed ones through pipe:gzip -dc FILE.tar.gz",
        "rank 0 of 2: KeyError: 'model/key=value'",
        "a reader: me@example.org, 10:30",
    ],
)
def test_what_holds_none_stays_as_it_is(text: str) -> None:
    assert redact_text(text) == text


LINES = [
    ["{url}"],
    ["{url}=x"],
    ["tracking.url={url}"],
    ["tracking.name={url}"],
    ["train.epochs={url}"],
    ["data.mixture={url}"],
    ["data.mixture={{{url}: lots}}"],
    ["data.mixture={{{url}: [}}"],
    ["data.metadata={url}"],
    ["model.encoder={url}"],
    ["--tracking.uri={url}"],
    ["run_dir={url}"],
    ["data.cache={url}"],
    ["data.shards={url}/{{0..x}}.tar::y"],
    ["pipe:curl -u me:S3CR3T h"],
    ["data.shards=pipe:false -H 'X: S3CR3T' h"],
    ["data.workers=pipe:curl -H 'X: S3CR3T' h"],
    ["tracking.uri=file://me:S3CR3T@h/x"],
    ["tracking.uri=//me:S3CR3T@h/x", "data.shards=/nowhere"],
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0])
def test_typing_errors_do_not_show_one(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "https://me:S3CR3T@h/?token=S3CR3T"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    for command in (["train", "recipe.yaml"], ["config", "recipe.yaml"]):
        with monkeypatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
            with contextlib.suppress(SystemExit):  # argparse's own
                main([*command, "launch.workers=1", "data.retries=0", *(word.format(url=url) for word in line)])
    said = capsys.readouterr()
    assert "S3CR3T" not in said.out + said.err
    assert said.err
    for path in tmp_path.rglob("*"):
        assert "S3CR3T" not in str(path)
        assert path.is_dir() or b"S3CR3T" not in path.read_bytes()


def test_a_runs_files_hold_none_wherever_it_stood(tmp_path: Path) -> None:
    url = "https://me:S3CR3T@h/x?token=S3CR3T"
    config = Config(
        run_dir=str(tmp_path),
        data=Data(shards=f"{url}::pipe:curl -u me:S3CR3T h", mixture={url: 0.5}, cache=f"/c/{url}"),
        tracking=Tracking(uri="databricks://S3CR3T@h", experiment=url),
    )
    assert "S3CR3T" not in to_yaml(shareable(config))
    assert shareable(shareable(config)) == shareable(config)
    plain = replace(config, name="x", data=Data(shards="/d/x-{0..9}.tar"), tracking=Tracking(uri="sqlite:////d/m.db"))
    assert shareable(plain) == plain


def test_the_console_shows_none(tmp_path: Path) -> None:
    Console(Config(run_dir=str(tmp_path)), None).write("away: https://me:S3CR3T@h/x\n")
    assert (tmp_path / "console.log").read_text() == "away: https://h/x\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_scripts_show_none() -> None:
    urls = [url for url in URLS if "S3CR3T" in url and "odbc" not in url]
    words = " ".join(f"'tracking.uri={url}'" for url in urls)
    for script in ("hosts.sh", "show.sh"):
        line = f"source launch/{script}; show clae train {words} 'data.shards=pipe:curl -u me:S3CR3T h' seed=1"
        shown = processes.run("bash", "-c", line, check=True).stdout
        assert "S3CR3T" not in shown, [word for word in shown.split() if "S3CR3T" in word]
        assert shown.startswith("$ clae train tracking.uri=")
        assert "seed=1" in shown
