"""What can be known before ranks start is said before: by `clae train` under every launcher, and by `clae dry-run`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.recipe import resolve, to_yaml
from tests import processes

SMALL = ["data.image_size=16", "model.encoder=small_resnet", "tracking.name=none", "launch.workers=2", "optim.warmup_epochs=0"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 40, 16)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "other", 12, 16)


CASES = {
    "no shards": ([], ["data.shards=nowhere"], 3, "nowhere is not a folder"),
    "no plain shard": ([], ["data.shards=nowhere.tar"], 3, "nowhere.tar is no file; correct data.shards"),
    "no set of a mixture": (["data.shards"], ["data.mixture={nowhere: 0.25}"], 3, "nowhere is not a folder"),
    "images": (["data.shards"], ["batch.global_size=64"], 3, "the train split has 40 images, fewer than batch.global_size 64"),
    "split": (["data.shards"], ["data.train_split=valid"], 3, "has no split 'valid'; it has"),
    "ranks": (["data.shards"], ["batch.global_size=9"], 2, "batch.global_size is 9, but 2 ranks need equal rows"),
    "encoder": (["data.shards"], ["model.encoder=timm/resnet51"], 2, "did you mean timm/resnet"),
    "image size": (["data.shards"], ["model.encoder=torchvision/vit_b_16", "data.image_size=24"], 2, "data.image_size is 24"),
    "tracking": (["data.shards"], ["tracking.name=mlflow", "tracking.uri=nowhere"], 2, "tracking.uri"),
}


def words(case: str, shards: Manifest, run_dir: Path) -> tuple[list[str], int, str]:
    named, changed, code, says = CASES[case]
    given = {text.partition("=")[0] for text in changed}
    settings = [text for text in (*SMALL, "batch.global_size=16", f"run_dir={run_dir}") if text.partition("=")[0] not in given]
    settings += [f"data.shards={shards.folder}"] if named else []
    return [*settings, *changed], code, says


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["train local", "train ray", "dry-run ray"])
def test_it_is_refused_before_any_rank_starts(
    command: str,
    case: str,
    shards: Manifest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray took 55 s to report a missing folder, and a dry run passed with fewer images than a batch."""
    settings, code, says = words(case, shards, tmp_path / "run")
    monkeypatch.setattr("clae_dist.launchers.local.spawn", pytest.fail)
    monkeypatch.setattr("clae_dist.launchers.ray.start_ray", pytest.fail)
    verb, launcher = command.split()
    (tmp_path / "recipe.yaml").write_text("")
    assert main([verb, str(tmp_path / "recipe.yaml"), *settings, "--launcher", launcher]) == code
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""
    assert not (tmp_path / "run").exists()


def test_another_run_s_folder(shards: Manifest, other: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config, origins = resolve(None, [*SMALL, "batch.global_size=8", f"data.shards={shards.folder}", f"run_dir={run_dir}"])
    (run_dir / "config.yaml").write_text(to_yaml(config, origins))
    identity = {"package_version": "", "git_revision": "", "manifest_digest": shards.digest, "world_size": 1, "backend": "ddp"}
    (run_dir / "run.json").write_text(json.dumps({**identity, "collectives": "gloo", "run_key": "k", "started": 0.0}))
    (tmp_path / "recipe.yaml").write_text("")
    for images, batch, says in (
        (shards, 4, "batch.global_size was 8 and is 4. Give another run_dir"),
        (other, 8, "(digest of the manifest). Give another run_dir"),
    ):
        settings = [*SMALL, f"batch.global_size={batch}", f"data.shards={images.folder}", f"run_dir={run_dir}"]
        assert main(["train", str(tmp_path / "recipe.yaml"), *settings, "--launcher", "ray"]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_ray_s_user_waits_no_minute(tmp_path: Path) -> None:
    began = time.monotonic()
    done = processes.clae("train", "quickstart", f"data.shards={tmp_path}/nowhere", "launch.launcher=ray")
    assert done.returncode == 3
    assert "nowhere is not a folder" in done.stderr
    assert "ray:" not in done.stdout
    assert time.monotonic() - began < 40  # an import of torch on a busy machine; Ray's start alone is longer than this


def test_a_dry_run_names_no_path_that_is_gone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    settings = [text for text in SMALL if not text.startswith("launch.")] + ["launch.workers=1", "train.threads=1"]
    assert main(["dry-run", str(tmp_path / "recipe.yaml"), *settings, "data.workers=0", "batch.global_size=8"]) == 0
    said = capsys.readouterr()
    assert "finished: 1 step" in said.out
    assert "clae-dry-run" not in said.out + said.err
