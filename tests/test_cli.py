"""The command line: what is asked is done, what is wrong is one readable line and an exit code of its own."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from clae_dist.cli import main
from clae_dist.commands.train import exit_at_signals
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ConfigError
from clae_dist.recipe import from_yaml

RECIPE = str(Path(__file__).parents[1] / "configs" / "cifar10" / "clae.yaml")


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert "Traceback" not in error
    return code, error


def test_config_prints_values_that_read_back_and_where_they_come_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["config", RECIPE, "batch.global_size=512", "attack.epsilon=8/255"]) == 0
    printed = capsys.readouterr().out
    assert "global_size: 512  # command line" in printed
    assert "clae.yaml:" in printed
    assert "simclr.yaml:" in printed
    assert "# default" in printed
    (tmp_path / "again.yaml").write_text(printed)
    assert from_yaml(tmp_path / "again.yaml").attack.epsilon == pytest.approx(8 / 255)
    assert yaml.safe_load(printed)["optim"]["name"] == "adamw"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("attack.epsilom=1", "did you mean attack.epsilon?"),
        ("attack.epsilon=-1", "attack.epsilon is -1.0; use 0 or more"),
        ("batch.global_size=many", "expected an integer"),
        ("model.encoder=timm/resnet51", "did you mean timm/resnet"),
        ("run_dir=/proc/nowhere", "which cannot be created"),
    ],
)
def test_a_setting_that_cannot_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, words: str) -> None:
    shards = write_synthetic_set(tmp_path / "shards", 300, 16).folder
    settings = [f"data.shards={shards}", "tracking.name=none", "data.image_size=16", override]
    settings += [] if override.startswith("run_dir=") else [f"run_dir={tmp_path / 'run'}"]
    code, error = failing(capsys, "train", RECIPE, *settings, "--launcher", "local")
    assert code == 2
    assert words in error


def test_settings_may_follow_options_and_paths_stay_as_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """argparse took no settings after --launcher; YAML cut a path at " #"."""
    odd = tmp_path / "my #1: x"
    shards = write_synthetic_set(odd / "shards", 64, 16).folder
    settings = [f"data.shards={shards}", f"run_dir={odd / 'run'}", "tracking.name=none", "data.image_size=16", "data.workers=0"]
    more = ["model.encoder=small_resnet", "batch.global_size=32", "train.epochs=1", "train.knn_every=0"]
    assert main(["train", RECIPE, *settings, "--launcher", "local", "launch.workers=1", *more]) == 0
    assert (odd / "run" / "checkpoints" / "step-00000002" / "checkpoint.json").is_file()
    with pytest.raises(SystemExit):
        main(["train", RECIPE, "--launcher", "local", "--epochs"])
    assert "unrecognized arguments: --epochs" in capsys.readouterr().err


def test_data_that_cannot_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = [f"data.shards={tmp_path / 'nowhere'}", f"run_dir={tmp_path / 'run'}", "tracking.name=none"]
    code, error = failing(capsys, "train", RECIPE, *settings, "--launcher", "local")
    assert code == 3
    assert "nowhere is not a folder; name the folder that `python -m data_prep prepare" in error


def test_help_of_evaluate_names_every_protocol() -> None:
    from clae_dist.commands import evaluate
    from clae_dist.evaluation.suite import PROTOCOLS

    assert evaluate.PROTOCOLS.split() == list(PROTOCOLS)


@pytest.mark.parametrize("command", ["evaluate", "report", "export"])
def test_a_folder_that_is_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    code, error = failing(capsys, command, str(tmp_path))
    assert code == 2
    assert ("SUBJECT is" if command == "evaluate" else "RUN is") in error


def test_torchrun_s_launcher_without_torchrun(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    code, error = failing(capsys, "train", RECIPE, "--launcher", "torchrun")
    assert code == 2
    assert "torchrun --nproc-per-node=2 -m clae_dist train" in error


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "--debug", str(tmp_path / "no.yaml")]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_tracking_server_of_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert main(["config", RECIPE]) == 0
    assert "uri: http://127.0.0.1:1  # MLFLOW_TRACKING_URI" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["cifar10/clae-original.yaml", "quickstart.yaml"])
def test_dry_run_takes_a_recipe_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no quickstart has left a run of other settings
    path = Path(__file__).parents[1] / "configs" / recipe
    small = ["launch.workers=1", "train.threads=1", "data.workers=0"]
    assert main(["dry-run", str(path), *small, "--launcher", "local"]) == 0
    said = capsys.readouterr().out
    assert "step 1/1" in said
    assert "dry run passed: " in said
    assert "images of noise" in said


def test_dry_run_finds_what_would_fail(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failing(capsys, "dry-run", RECIPE, "model.encoder=timm/nothing", "launch.workers=1", "--launcher", "local")
    assert code == 2
    assert "timm/nothing" in error


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "config", "dry-run", "evaluate", "report", "export", "doctor"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert len(capsys.readouterr().out) > 200


def test_errors_are_config_errors() -> None:
    """The exit code belongs to the type: a subclass stays what it is."""
    from clae_dist.errors import BAD_CONFIG, UNEXPECTED, exit_code

    class Special(ConfigError):
        pass

    assert exit_code(Special("x")) == BAD_CONFIG
    assert exit_code(ZeroDivisionError()) == UNEXPECTED


def test_a_signal_whose_exit_was_lost_still_ends_the_command_before_ranks_start() -> None:
    """SystemExit from a handler is lost where it interrupts code that catches everything."""
    with exit_at_signals() as exit_if_asked:
        exit_if_asked()
        with suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            exit_if_asked()
    assert ended.value.code == 75
