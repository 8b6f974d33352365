"""Recipes, config.yaml and override values follow YAML 1.2: what is written is what is meant, or is refused."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from clae_dist import core_yaml
from clae_dist.config import Config
from clae_dist.errors import ConfigError
from clae_dist.recipe import build, from_yaml, parse_overrides, resolve, to_yaml


def in_a_recipe(folder: Path, text: str) -> Config:
    (folder / "recipe.yaml").write_text(text)
    return resolve(folder / "recipe.yaml")[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0256", 256), ("-012", -12), ("+7", 7), ("0o17", 15), ("0x1F", 31), ("0", 0),
        ("1e-3", 1e-3), ("1E3", 1000.0), ("1.", 1.0), (".5", 0.5), ("-1.5e+2", -150.0), ("-.inf", -float("inf")),
        (".INF", float("inf")),
        ("true", True), ("False", False), ("null", None), ("~", None),
        ("12:30:00", "12:30:00"), ("1_000", "1_000"), ("0b11", "0b11"), ("2026-11-28", "2026-11-28"), ("=", "="),
        ("0o8", "0o8"),
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("OFF", "OFF"), ("y", "y"), ("inf", "inf"), ("nan", "nan"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_the_core_schema(text: str, value: Any) -> None:
    """YAML 1.2.2, section 10.3.2. PyYAML alone makes 174 of 0256, 45000 of 12:30:00 and true of yes."""
    node = core_yaml.compose(text)
    assert node is not None
    read = core_yaml.construct(node)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("batch.global_size", "0256", 256),
        ("batch.global_size", "0x100", 256),
        ("train.epochs", "010", 10.0),
        ("attack.epsilon", "1e-3", 1e-3),
        ("data.metadata", "[007, yes, 1e3, 0o17]", ("007", "yes", "1e3", "0o17")),
        ("data.mixture", "{007: 0.25, yes: 1e-1}", {"007": 0.25, "yes": 0.1}),
    ],
)
def test_the_same_in_a_recipe_and_on_the_command_line(tmp_path: Path, key: str, text: str, value: Any) -> None:
    section, _, name = key.partition(".")
    for config in (
        in_a_recipe(tmp_path, f"{section}:\n  {name}: {text}\noptim:\n  warmup_epochs: 0\n"),
        build(parse_overrides([f"{key}={text}", "optim.warmup_epochs=0"])),
    ):
        assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch.global_size=1_000", r"batch\.global_size is '1_000' .* expected an integer"),
        ("guard.hang_s=12:30:00", r"guard\.hang_s is '12:30:00' .* expected a number, such as 0\.25, 1e-3 or 8/255"),
        ("attack.epsilon=1_0", r"attack\.epsilon is '1_0' .* expected a number"),  # Python's float() takes it for 10
        ("attack.epsilon=1_0/255", r"expected a number"),
        ("attack.epsilon=infinity", r"expected a number"),
        ("attack.clip=yes", r"attack\.clip is 'yes' .* expected true or false"),
        ("attack.clip=off", r"attack\.clip is 'off' .* expected true or false"),
        ("attack.epsilon=!!binary aGk=", r"is not valid YAML"),
    ],
)
def test_what_version_1_2_does_not_read_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(parse_overrides([setting]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: &base\n  seed: 1\n", r"base\.seed .* is not a known key; did you mean seed\?"),
        (
            "<<: {seed: 1}\n",
            r"<< \(.*:1\) is a merge key, which recipes do not have .* start from another recipe with `extends: other\.yaml`",
        ),
        ("batch: &b\n  global_size: 4\nattack:\n  <<: *b\n", r"attack\.<< \(.*:4\) is a merge key"),
        ("batch: &b\n  more: *b\n", r"batch\.more\.more \(.*\) is not a known key"),
        ("batch: &b\n  global_size: *b\n", r"batch\.global_size"),
        ("&a attack: *a\n", r"attack .* is a section|is not"),
        ("data:\n  metadata: &m [*m]\n", r"data\.metadata .* cannot be read .*recursive"),
        ("data:\n  mixture: &m {/a: *m}\n", r"data\.mixture .* cannot be read .*recursive"),
        ("? [a, b]\n: 1\n", r"a key \(.*:1\) is a list or a mapping"),
        ("batch:\n  global_size: 4\nbatch:\n  micro_size: 2\n", r"batch is a section twice .*:1 and .*:3\); merge them"),
        ("seed: {}\n", r"seed is \{\}"),
        ("seed: !!float 0x1\n", r"seed \(.*:1\) cannot be read"),
        ("run_dir: !!binary aGk=\n", r"run_dir .*the tag !!binary"),
        ("seed: 1\n---\nseed: 2\n", r"is not valid YAML.*single document"),
    ],
)
def test_structures_that_recipes_do_not_have(tmp_path: Path, text: str, message: str) -> None:
    """A section that holds itself ended in a RecursionError."""
    with pytest.raises(ConfigError, match=message):
        in_a_recipe(tmp_path, text)


def test_any_text_comes_back_from_config_yaml(tmp_path: Path) -> None:
    """U+0085 came back as a line feed, and a value of more than 1,000 characters was broken over lines."""
    draws = random.Random(0)
    letters = "a~yn01 ._-:#'\"{}[],&*!|>%@`\\\n\t\r\x85\u2028\x07é😀\udc80\x00\ufeffoxeE+=?/<"
    words = [
        "yes",
        "0o17",
        "0256",
        "1e3",
        "12:30:00",
        "1_000",
        "null",
        "",
        "true",
        "<<",
        ".inf",
        "2026-11-28",
        " a",
        "a b " * 500,
    ]
    words += ["".join(draws.choices(letters, k=draws.randint(1, 10))) for _ in range(100)]
    for word in words:
        data = dataclasses.replace(Config().data, train_split=word, metadata=(word, "a"), mixture={f"./{word}": 0.25})
        config = Config(run_dir=f"./{word}", data=data)
        (tmp_path / "config.yaml").write_bytes(to_yaml(config, {"run_dir": f"{word}:1"}).encode())
        assert from_yaml(tmp_path / "config.yaml") == config, repr(word)


# ---- home folders ----


def test_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_dir=~/runs` made a folder with the name ~: no shell expands it there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {
        "run_dir": ("~/runs/a", f"{tmp_path}/runs/a"),
        "data.shards": ("~/a.tar::file://~/b.tar::pipe:cat ~/c", f"{tmp_path}/a.tar::file://{tmp_path}/b.tar::pipe:cat ~/c"),
        "data.cache": ("~", str(tmp_path)),
        "tracking.uri": ("sqlite:///~/mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"),
        "data.mixture": ("{~/more: 0.25, ./~: 0.5}", {f"{tmp_path}/more": 0.25, "./~": 0.5}),
        "name": ("~x", "~x"),  # a word, no path
    }
    config = build(parse_overrides([f"{key}={text}" for key, (text, _) in settings.items()]))
    lines = [f"{key}: {text if text[0] == '{' else repr(text)}\n" for key, (text, _) in settings.items()]
    assert in_a_recipe(tmp_path, "".join(lines)) == config
    for key, (_, value) in settings.items():
        section, _, name = key.rpartition(".")
        assert getattr(getattr(config, section) if section else config, name) == value


@pytest.mark.parametrize("key", ["run_dir", "data.shards", "data.cache", "tracking.uri", "data.mixture"])
def test_a_user_without_a_home_is_named(key: str) -> None:
    text = "{~nobody-here/x: 0.5}" if key == "data.mixture" else "~nobody-here/x"
    with pytest.raises(ConfigError, match=rf"{key} begins with ~nobody-here \(command line\).* write the full path"):
        build(parse_overrides([f"{key}={text}"]))
