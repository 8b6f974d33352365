"""What is given twice is refused: the last value won without a word, as after `data.shards=/d/x-{000000..000003}.tar`, which a
shell turns into four arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.config import Config
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ConfigError, DataError
from clae_dist.launchers import start
from clae_dist.recipe import parse_overrides, resolve
from clae_dist.training.session import Session
from clae_dist.training.sets import open_sets
from clae_dist.world import World
from data_prep.__main__ import main as data_prep
from tests.small_run import small_run

RECIPE = str(Path(__file__).parents[1] / "configs" / "cifar10" / "clae.yaml")


def test_unquoted_braces_are_four_settings_of_one_key() -> None:
    words = [f"data.shards=/d/train-{number:06d}.tar" for number in range(4)]
    with pytest.raises(
        ConfigError, match=r"data\.shards is given 4 times \(command line\); .*unquoted braces: quote them"
    ) as error:
        parse_overrides(words)
    assert "/d/train" not in str(error.value)  # it may hold a login


def test_a_number_given_twice() -> None:
    with pytest.raises(ConfigError, match=r"seed is given 2 times \(command line\); keep one\.$"):
        parse_overrides(["seed=1", "seed=1"])
    assert resolve(None, ["seed=2"], ["seed=1"])[0].seed == 2  # a command's own default is no second value


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["train", RECIPE, "--launcher", "local", "launch.launcher=local"], "--launcher and launch.launcher="),
        (["train", RECIPE, "launch.launcher=ray", "--launcher", "local"], "--launcher and launch.launcher="),
        (["dry-run", RECIPE, "--launcher", "local", "launch.launcher=local"], "--launcher and launch.launcher="),
        (["parity", "--backend", "ddp", "parallel.backend=fsdp2"], "--backend and parallel.backend="),
    ],
)
def test_an_option_beside_the_setting_that_it_stands_for(
    capsys: pytest.CaptureFixture[str], words: list[str], option: str
) -> None:
    assert main(words) == 2
    assert f"{option} are the same setting, and both are given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (main, ["evaluate", "runs/a", "--shards=/d/x-0.tar", "--shards=/d/x-1.tar"]),
        (main, ["train", RECIPE, "--launcher", "local", "--launcher", "ray"]),
        (data_prep, ["index", "x.tar", "--to", "a", "--to", "b"]),
        (data_prep, ["demo", "--workers=0", "dst", "--workers=1"]),
    ],
)
def test_an_option_given_twice(capsys: pytest.CaptureFixture[str], program: object, words: list[str]) -> None:
    assert callable(program)
    with pytest.raises(SystemExit) as ended:
        program(words)
    assert ended.value.code == 2
    assert "is given twice; keep one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "words", "usage"),
    [
        (main, ["export", "runs/a", "runs/b"], "usage: clae export"),
        (main, ["bench", "data", "/d/x-0.tar", "/d/x-1.tar"], "usage: clae bench"),
        (data_prep, ["verify", "a", "b"], "usage: python -m data_prep verify"),
    ],
)
def test_arguments_that_are_too_many_show_the_command_s_usage(
    capsys: pytest.CaptureFixture[str], program: object, words: list[str], usage: str
) -> None:
    """`clae export R1 R2` showed the usage of `clae`."""
    assert callable(program)
    with pytest.raises(SystemExit):
        program(words)
    error = capsys.readouterr().err
    assert error.startswith(usage)
    assert f"unrecognized arguments: {words[-1]}; " in error
    assert "takes one" in error


@pytest.mark.parametrize(
    "mixture", ["{/a: 0.25, /a: 0.25}", "{/a: 0.25, /a/: 0.25}", "{a/../b: 0.25, ./b: 0.25}", "{/shards: 0.5}"]
)
def test_a_set_named_twice_in_a_mixture(mixture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two spellings of one path, the last share alone was left."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"is set twice|names '.*' twice"):
        start(resolve(None, [f"data.mixture={mixture}", "data.shards=/shards", "run_dir=run"]))
    assert list(tmp_path.iterdir()) == []


def test_the_same_images_under_two_paths(tmp_path: Path) -> None:
    shards = write_synthetic_set(tmp_path / "shards", 48, 16).folder
    (tmp_path / "link").symlink_to(shards)
    config: Config = small_run(shards, tmp_path / "run")
    changed, _ = resolve(None, [f"data.shards={shards}", f"data.mixture={{{tmp_path / 'link'}: 0.25}}", "batch.global_size=8"])
    with pytest.raises(DataError, match=r"are the same images \(digest"):
        open_sets(Session(changed, World.single("cpu"), print))
    assert open_sets(Session(config, World.single("cpu"), print)).main.name
