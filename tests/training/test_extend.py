"""`clae train RUN --extend epochs=N`: a new run continues a finished one with a longer schedule."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.cli import main
from clae_dist.config import Config, Model, Optim, Parallel
from clae_dist.data.manifest import Manifest
from clae_dist.deploy.export import export_encoder
from clae_dist.errors import ConfigError
from clae_dist.methods.moco import MoCo
from clae_dist.recipe import Recipe
from clae_dist.report.run_page import write_report
from clae_dist.runs.folder import RunFolder
from clae_dist.training.train import train
from clae_dist.world import World
from tests.ranks import RankPool
from tests.small_run import assert_same_weights, train_quietly, weights, whole_run
from tests.training.disturbed import train_on

CONSTANT = Optim(name="adamw", learning_rate=1e-3, scaling="none", warmup_epochs=0, schedule="constant")
HALF, STEPS = 4, 8  # of the parent and of its continuation


def pair(shards: Manifest, folder: Path, **sections: Any) -> tuple[Config, Config]:
    """A run of an epoch and its continuation until 2, with an average, a momentum encoder and a queue."""
    sections = {"optim": CONSTANT, "method": MoCo.Settings(momentum=0.9, queue=48), **sections}
    settings = {"every_steps": 2, "epochs": 1, "ema_decay": 0.9, "precision": "float64"}
    parent = whole_run(shards, folder / "parent", sections=sections, **settings)
    return parent, extension(parent, folder / "child")


def extension(parent: Config, run_dir: Path, epochs: float = 2) -> Config:
    return replace(parent, run_dir=str(run_dir), train=replace(parent.train, epochs=epochs, parent=parent.run_dir))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def say(config: Config) -> str:
    said = io.StringIO()
    assert train(Recipe(config), World.single("cpu"), said).status == "finished"
    return said.getvalue()


@pytest.fixture(scope="module")
def finished(shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run, which no test changes."""
    parent, _ = pair(shards, tmp_path_factory.mktemp("finished"))
    say(parent)
    return parent


@pytest.fixture(scope="module")
def extended(finished: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Its continuation, which no test changes."""
    child = extension(finished, tmp_path_factory.mktemp("extended") / "child")
    say(child)
    return child


def test_with_a_constant_rate_it_is_the_run_that_was_long_from_the_start(finished: Config, tmp_path: Path) -> None:
    """Bit for bit: optimiser, average, momentum encoder, queue and position in the images are all taken over."""
    before = snapshot(finished.folder)
    child = extension(finished, tmp_path / "child")
    said = say(child)
    assert f"continuing {finished.run_dir} after its 4 steps, 4 more follow; the learning rate stays 0.001" in said
    assert snapshot(finished.folder) == before, "the parent is never written to"
    long = replace(child, run_dir=str(tmp_path / "long"), train=replace(child.train, parent=""))
    say(long)
    assert_same_weights(child.folder, long.folder, STEPS)


@pytest.mark.parametrize(("num_ranks", "backend"), [(2, "ddp"), pytest.param(2, "fsdp2", marks=pytest.mark.slow)])
def test_on_other_ranks_and_backends(ranks: RankPool, extended: Config, tmp_path: Path, num_ranks: int, backend: Any) -> None:
    other = replace(extended, run_dir=str(tmp_path / "other"), parallel=Parallel(backend=backend))
    assert ranks.run(num_ranks, train_quietly, other) == ["finished"] * num_ranks
    expected = weights(extended.folder, STEPS)
    for name, value in weights(other.folder, STEPS).items():
        torch.testing.assert_close(value, expected[name], atol=1e-8, rtol=0)  # float64 over 4 steps of Adam


def test_killed_and_resumed_without_its_parent(ranks: RankPool, finished: Config, extended: Config, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "parent")
    parent = replace(finished, run_dir=str(tmp_path / "parent"))
    child = extension(parent, tmp_path / "child")
    assert ranks.run(1, train_on, child, 2) == ["lost"]
    shutil.rmtree(parent.folder)
    assert ranks.run(1, train_on, child, 4) == ["lost"]
    say(child)
    assert_same_weights(child.folder, extended.folder, STEPS)


def test_killed_before_the_parents_state_was_complete(finished: Config, extended: Config, tmp_path: Path) -> None:
    child = extension(finished, tmp_path / "child")
    child.folder.mkdir()
    names = RunFolder(child.folder), RunFolder(extended.folder)
    for new, old in zip(*[(folder.identity_file, folder.config_file) for folder in names], strict=True):
        new.write_text(old.read_text())
    folder = names[0]
    partial = folder.checkpoints / "step-00000004.partial-parent"
    partial.mkdir(parents=True)
    (partial / "checkpoint.json").write_text("{")
    say(child)
    assert_same_weights(child.folder, extended.folder, STEPS)
    shutil.rmtree(folder.checkpoints)
    identity = json.loads(folder.identity_file.read_text())
    identity["parent"]["checkpoint"] = "0" * 64
    folder.identity_file.write_text(json.dumps(identity))
    with pytest.raises(ConfigError, match="train.parent is .*, which has changed since this run was begun"):
        say(child)


def test_it_names_its_parent(finished: Config, extended: Config) -> None:
    identity = RunFolder(extended.folder).read_identity()
    parent = RunFolder(finished.folder).read_identity()
    assert identity.parent["run"] == finished.run_dir
    assert identity.parent["step"] == str(HALF)
    assert identity.tags["parent_run_key"] == parent.run_key != identity.run_key
    assert json.loads((export_encoder(extended.folder) / "config.json").read_text())["parent"] == identity.parent
    write_report(extended.folder, say=lambda text: None)
    assert f"{finished.run_dir}, after its 4 steps" in RunFolder(extended.folder).report_page.read_text()
    assert json.loads(RunFolder(extended.folder).summary_file.read_text())["parent"] == finished.run_dir


def test_its_initial_weights_are_its_parents(finished: Config, shards: Manifest, tmp_path: Path) -> None:
    """The source of model.init is gone; evaluation still knows the encoder before training."""
    source = tmp_path / "source"
    shutil.copytree(finished.folder, source)
    parent, child = pair(shards, tmp_path, model=Model(encoder="small_resnet", projector_dim=16, init=str(source)))
    say(parent)
    shutil.rmtree(source)
    say(child)
    folders = RunFolder(parent.folder), RunFolder(child.folder)
    assert folders[0].initial_weights.read_bytes() == folders[1].initial_weights.read_bytes()
    assert folders[0].read_identity().initial == folders[1].read_identity().initial != {}


def test_a_warm_restart_is_printed(finished: Config, shards: Manifest, tmp_path: Path) -> None:
    """The cosine of 2 epochs is at half its peak where that of one has ended."""
    parent, child = pair(shards, tmp_path, optim=replace(CONSTANT, schedule="cosine"))
    say(parent)
    assert (
        "the learning rate ended at 0.0001464 there and is 0.0005 here, by the cosine schedule of 2 epochs: a warm restart"
        in say(child)
    )
    logged = [json.loads(line) for line in (child.folder / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in logged if "learning_rate" in line}
    assert min(rates) == HALF + 1
    assert rates[HALF + 1] == pytest.approx(0.0005)


REFUSED = {
    "fewer epochs": ({"train": {"epochs": 0.75}}, "train.epochs is 0.75, but the run that it extends has 1 epochs already"),
    "the same": ({"train": {"epochs": 1}}, "train.epochs is 1, but the run that it extends has 1 epochs already"),
    "batch": ({"batch": {"global_size": 48}}, r"batch.global_size was 24 and is 48.*model.init="),
    "no run": ({"train": {"parent": "nowhere"}}, "train.parent is 'nowhere', which holds no run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(finished: Config, tmp_path: Path, case: str) -> None:
    changed, words = REFUSED[case]
    child = extension(finished, tmp_path / "child")
    sections: Any = {name: replace(getattr(child, name), **values) for name, values in changed.items()}
    with pytest.raises(ConfigError, match=words):
        say(replace(child, **sections))


def test_an_unfinished_parent_and_other_images(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    parent, child = pair(shards, tmp_path)
    assert ranks.run(1, train_on, parent, 4) == ["lost"]
    with pytest.raises(ConfigError, match="has not finished: its newest complete checkpoint is of step 2 of 4; finish it"):
        say(child)
    say(parent)
    path = RunFolder(parent.folder).identity_file
    path.write_text(path.read_text().replace(shards.digest, "0" * 64))
    with pytest.raises(ConfigError, match="trained on the images 000000000000, but data.shards has"):
        say(child)


def test_a_folder_of_something_else(finished: Config, tmp_path: Path) -> None:
    child = extension(finished, tmp_path / "child")
    child.folder.mkdir()
    (child.folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"which is no run and holds thesis.tex; give another run_dir"):
        say(child)
    with pytest.raises(ConfigError, match="belongs to another configuration: train.epochs was 1.0 and is 2"):
        say(extension(finished, finished.folder))


def test_the_command(finished: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its folder is beside the parent's, and lies where the command line says otherwise."""
    shutil.copytree(finished.folder, tmp_path / "first")
    command = ["train", str(tmp_path / "first"), "--extend", "epochs=2", "--launcher", "local", "launch.workers=1"]
    assert main(command) == 0
    assert main(command) == 0  # again: it is finished
    assert "this run is finished already" in capfd.readouterr().out
    again = RunFolder(tmp_path / "first-epochs2")
    assert again.read_identity().parent["run"] == str(tmp_path / "first")
    assert again.read_config().name == "run-epochs2"
    assert main(["train", str(again.path), "--extend", "epochs=3", "name=longer", "launch.workers=1"]) == 0
    assert RunFolder(tmp_path / "longer").find_checkpoints()[0].name == "step-00000012"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--extend", "steps=9"], "'steps=9' is not epochs=N"),
        (["--extend", "epochs=4", "train.epochs=4"], "--extend and train.epochs= are the same setting"),
        (["--extend", "epochs=0.75"], "train.epochs is 0.75, but the run that it extends has 1 epochs already"),
        (["--extend", "epochs=4", "seed=3"], "seed was 0 and is 3. An extended run may change optim.learning_rate"),
    ],
)
def test_the_command_refuses(finished: Config, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    try:
        code = main(["train", finished.run_dir, *arguments])
    except SystemExit as end:  # argparse
        code = int(end.code or 0)
    assert code == 2
    assert words in capsys.readouterr().err
