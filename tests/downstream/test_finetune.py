"""`clae finetune` from a run: what it takes from where, its accuracies, its refusals, and a kill."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clae_dist.cli import main, parse
from clae_dist.commands.finetune import settings_of
from clae_dist.config import Config
from clae_dist.data.long_tail import long_tail
from clae_dist.data.manifest import load_manifest
from clae_dist.data.mixture import MixedFiles, mix
from clae_dist.data.shards import ShardReader
from clae_dist.deploy.export import export_encoder
from clae_dist.errors import ConfigError, DataError
from clae_dist.recipe import Recipe, resolve
from clae_dist.runs.checkpoint import SharedCheckpoint, load_checkpoint
from clae_dist.training.sets import check_sets
from clae_dist.training.suspects import write_suspects
from clae_dist.training.train import train as train_here
from clae_dist.world import World
from tests import processes
from tests.ranks import RankPool
from tests.small_run import Undisturbed, train_quietly

LEFT, RIGHT = (220, 40, 40), (40, 40, 220)


def write_colours(folder: Path, classes: dict[str, tuple[int, int, int]], count: int = 48) -> Path:
    """A set whose classes have colours of their own: each image has a shade of it, and any encoder can tell them apart."""
    for split in ("train", "test"):
        for name, colour in classes.items():
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                shade = tuple(min(255, value + 2 * (number % 16)) for value in colour)
                Image.new("RGB", (16, 16), shade).save(place / f"{number:03d}.png")
    done = processes.run(sys.executable, "-m", "data_prep", "prepare", folder / "images", folder / "shards")
    assert done.returncode == 0, done.stderr
    return folder / "shards"


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("colours"), {"left": LEFT, "right": RIGHT})


def settings(*words: object) -> Recipe:
    return settings_of(parse(["finetune", *map(str, words)]))


def metrics(run: Path) -> dict[str, Any]:
    """The last value of every logged metric."""
    found: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        found |= json.loads(line)
    return found


SHORT = (
    "train.epochs=3",
    "train.knn_every=0",
    "batch.global_size=16",
    "data.workers=0",
    "tracking.name=none",
    "train.threads=1",
    "optim.learning_rate=0.1",
    "optim.scaling=none",
)


@pytest.mark.parametrize("task", ["classify", "adversarial", "noisy"])
def test_a_task_learns_on_two_ranks_what_the_set_shows(
    ranks: RankPool, undisturbed: Undisturbed, colours: Path, tmp_path: Path, task: str
) -> None:
    short = [*SHORT, "attack.epsilon=2/255", "attack.steps=2"] if task == "adversarial" else list(SHORT)
    if task == "noisy":
        short.append("method.warmup_epochs=1")
    recipe = settings(undisturbed(1), f"finetune/{task}", *short, f"data.shards={colours}", f"run_dir={tmp_path / 'run'}")
    config = recipe.config
    assert (config.method.num_classes, config.model.encoder, config.data.image_size) == (2, "small_resnet", 16)
    assert config.model.init == str(undisturbed(1))
    assert ranks.run(2, train_quietly, _evaluated(config)) == ["finished"] * 2
    found = metrics(config.folder)
    assert found["accuracy"] > 95
    assert found["accuracy_low"] < found["accuracy"] <= found["accuracy_high"] + 1e-6
    if task == "noisy":
        assert len((config.folder / "suspects.jsonl").read_text().splitlines()) <= 5  # of 96


def test_suspects_of_a_part_or_a_mixture_name_the_set_that_they_are_in(
    undisturbed: Undisturbed, colours: Path, tmp_path: Path
) -> None:
    words = [f"data.shards={colours}", f"run_dir={tmp_path / 'run'}"]
    config = settings(undisturbed(1), "finetune/noisy", *words).config
    config.folder.mkdir()
    whole = load_manifest(colours)
    other = replace(whole, name="other", digest="0" * 64)
    for train in (whole, long_tail(whole, "train", 8, 0), mix([whole, other], [0.5, 0.5], "train")):
        count = train.num_samples("train")
        write_suspects(config, {"belief": torch.zeros(count), "guess": torch.zeros(count, dtype=torch.long)}, train)
        lines = [json.loads(line) for line in (config.folder / "suspects.jsonl").read_text().splitlines()]
        assert len({(line["digest"], line["shard"], line["row"]) for line in lines}) == count
        digests = {whole.digest, other.digest} if isinstance(train.files, MixedFiles) else {whole.digest}
        assert {line["digest"] for line in lines} == digests
        reader = ShardReader(whole, "train")
        names = [shard.name for shard in whole.splits["train"]]
        assert all(reader.stored_name(names.index(line["shard"]), line["row"]) == line["name"] for line in lines)


@pytest.mark.slow
def test_doubted_labels_are_quarantined_and_the_new_set_trains(
    ranks: RankPool, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Eight of 96 images lie in the wrong folder; the run's own list takes away most of them, and few others."""
    images = write_colours(tmp_path, {"left": LEFT, "right": RIGHT}).parent / "images" / "train"
    for number in range(4):
        for one, other in (("left", "right"), ("right", "left")):
            (images / one / f"{number:03d}.png").rename(images / other / f"wrong-{number:03d}.png")
    shutil.rmtree(tmp_path / "shards")
    prepared = processes.run(sys.executable, "-m", "data_prep", "prepare", images.parent, tmp_path / "shards")
    assert prepared.returncode == 0, prepared.stderr
    words = [*SHORT, "method.warmup_epochs=1", f"data.shards={tmp_path / 'shards'}", f"run_dir={tmp_path / 'noisy'}"]
    noisy = settings(undisturbed(1), "finetune/noisy", *words).config
    assert ranks.run(1, train_quietly, noisy) == ["finished"]
    listed = ["--list", noisy.folder / "suspects.jsonl", "--to", tmp_path / "clean"]
    done = processes.run(sys.executable, "-m", "data_prep", "quarantine", tmp_path / "shards", *listed)
    assert done.returncode == 0, done.stderr
    dropped = (tmp_path / "clean" / "quarantine.jsonl").read_text().splitlines()
    wrong = sum("wrong" in line for line in dropped)
    assert wrong >= 6
    assert len(dropped) - wrong <= 5
    words = [*SHORT[1:], "train.epochs=1", f"data.shards={tmp_path / 'clean'}", f"run_dir={tmp_path / 'again'}"]
    again = settings(undisturbed(1), "finetune/classify", *words).config
    assert again.method.num_classes == 2
    assert ranks.run(1, train_quietly, again) == ["finished"]


def _evaluated(config: Config) -> Config:
    return replace(config, train=replace(config.train, knn_every=3.0))


@pytest.mark.slow
def test_a_target_is_learned_without_its_labels(
    ranks: RankPool, undisturbed: Undisturbed, colours: Path, tmp_path: Path
) -> None:
    """Both domains are alike here: their distance is small, and the source's labels serve the target."""
    target = write_colours(tmp_path, {"left": LEFT, "right": RIGHT, "third": (40, 220, 40)})
    words = ["--shards", colours, "--target", target, f"run_dir={tmp_path / 'run'}"]
    config = settings(undisturbed(1), "finetune/domain", *SHORT, *words).config
    assert config.data.mixture == {str(target): 0.5}
    assert config.method.num_classes == 3
    assert ranks.run(2, train_quietly, _evaluated(config)) == ["finished"] * 2
    found = metrics(config.folder)
    assert found["accuracy"] > 95
    assert 60 < found["target_accuracy"] <= 67  # the third class is not the source's
    assert 0 <= found["domain_distance"] <= 2


@pytest.mark.slow
def test_domains_that_share_no_class_have_a_distance_and_no_accuracy(
    ranks: RankPool, undisturbed: Undisturbed, colours: Path, tmp_path: Path
) -> None:
    target = write_colours(tmp_path, {"green": (40, 220, 40), "grey": (90, 90, 90)})
    words = ["--shards", colours, "--target", target, f"run_dir={tmp_path / 'run'}", "method.domain_weight=0"]
    config = settings(undisturbed(1), "finetune/domain", *SHORT, *words).config
    assert ranks.run(1, train_quietly, _evaluated(config)) == ["finished"]
    found = metrics(config.folder)
    assert "target_accuracy" not in found
    assert found["domain_distance"] > 1.5


def test_what_the_task_says_wins_over_the_source(undisturbed: Undisturbed, colours: Path, tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text(f"method:\n  name: classify\n  classes: 2\ndata:\n  image_size: 24\n  shards: {colours}\n")
    config = settings(undisturbed(1), task).config
    assert (config.data.image_size, config.data.shards) == (24, str(colours))
    assert config.name == f"{undisturbed(1).name}-mine"


def test_the_settings_as_a_recipe_are_the_same_run(undisturbed: Undisturbed, colours: Path, tmp_path: Path) -> None:
    words = [undisturbed(1), "finetune/classify", f"data.shards={colours}", "--write", tmp_path / "task.yaml"]
    assert main(["finetune", *map(str, words)]) == 0
    assert resolve(tmp_path / "task.yaml").config == settings(*words).config


def test_a_command_for_images_in_anothers_run_is_not_run(undisturbed: Undisturbed, colours: Path, tmp_path: Path) -> None:
    run = tmp_path / "theirs"
    shutil.copytree(undisturbed(1), run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"  shards: .*", "  shards: 'pipe:cat images.tar'", text))
    with pytest.raises(ConfigError, match="may run a command or contact a server"):
        settings(run, "finetune/classify")
    assert settings(run, "finetune/classify", "--shards", colours).config.data.shards == str(colours)


def test_an_export_is_a_source(ranks: RankPool, undisturbed: Undisturbed, colours: Path, tmp_path: Path) -> None:
    run = tmp_path / "first"
    shutil.copytree(undisturbed(1), run)
    export_encoder(run)
    short = [*SHORT[1:], "train.epochs=1", f"data.shards={colours}", f"run_dir={tmp_path / 'run'}"]
    config = settings(run / "export", "finetune/classify", *short).config
    assert (config.name, config.model.encoder, config.data.image_size) == ("first-classify", "small_resnet", 16)
    assert ranks.run(1, train_quietly, config) == ["finished"]


def test_a_long_tail_weighs_its_classes(undisturbed: Undisturbed, colours: Path) -> None:
    config = settings(undisturbed(1), "finetune/longtail", f"data.shards={colours}", "data.long_tail=8").config
    assert config.method.class_counts == (48, 6)  # type: ignore[attr-defined]
    assert config.method.weights() == [pytest.approx(54 / 96), pytest.approx(54 / 12)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere", "finetune/classify"), "SOURCE is 'nowhere', which is no run"),
        (("RUN", "cifar10/simclr"), "method.name is 'simclr', which is no task; name one"),
        (("RUN", "finetune/classify", "method.classes=1"), "method.classes is 1; use at least 2"),
        (("RUN", "finetune/domain"), r"data.mixture is {}, but method.name=domain takes half of every batch from a source"),
        (("RUN", "finetune/classify", "method.classes=5"), r"method.classes is 5, but .* has 2 classes \(left, right\)"),
        (("RUN", "finetune/noisy", "method.images=7"), "method.images is 7, but .* has 96"),
        (
            ("RUN", "finetune/longtail", "method.classes=2", "method.class_counts=[1, 2]"),
            r"method.class_counts is \[1, 2\].*\[48, 48\]",
        ),
    ],
)
def test_bad_input(undisturbed: Undisturbed, colours: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    where = [f"data.shards={colours}", "batch.global_size=16", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=message):
        check_sets(settings(*(str(undisturbed(1)) if word == "RUN" else word for word in words), *where).config)


def test_a_source_without_labels(undisturbed: Undisturbed, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(images / f"{number:03d}.png")
    done = processes.run(sys.executable, "-m", "data_prep", "prepare", images, tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    with pytest.raises(DataError, match="has 0 classes; a head needs two or more"):
        settings(undisturbed(1), "finetune/classify", f"data.shards={tmp_path / 'shards'}")


@pytest.mark.slow
def test_the_command_is_killed_and_resumes_to_the_same_weights(
    undisturbed: Undisturbed, colours: Path, tmp_path: Path, ranks: RankPool
) -> None:
    words = ["finetune", undisturbed(1), "finetune/classify", *SHORT, f"data.shards={colours}", "checkpoint.every_steps=4"]
    whole = [*words, "launch.launcher=local", "launch.workers=2", "train.log_every=1"]
    assert processes.clae(*whole, f"run_dir={tmp_path / 'one'}").returncode == 0
    with processes.started(*processes.CLAE, *whole, f"run_dir={tmp_path / 'two'}") as killed:
        processes.read_until(killed, "step 9/")
        os.killpg(killed.pid, signal.SIGKILL)
    done = processes.clae(*whole, f"run_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming after step [48]", done.stdout)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def assert_same_weights(one: Path, other: Path) -> None:
    found = [load_checkpoint(run, lambda _: None, World.single("cpu"), None) for run in (one, other)]
    states = [SharedCheckpoint(checkpoint, World.single("cpu")).state()["model"] for checkpoint in found if checkpoint]
    assert len(states) == 2
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune/classify", "--target", "elsewhere"], "--target is 'elsewhere', but method.name is 'classify'"),
        (["finetune/domain"], "name one target with the share 0.5"),
        (["finetune/noisy", "method.images=7"], "method.images is 7"),
        (["finetune/classify", "method.classes=7"], "method.classes is 7, but .* has 2 classes"),
        (["finetune/classify", "model.encoder=timm/nosuch", "model.init="], "model.encoder is 'timm/nosuch', which timm"),
        (["finetune/classify", "method.blocks=99"], "method.blocks is 99"),
        (["classify"], "TASK is 'classify', .*did you mean finetune/classify.*one of finetune/adversarial"),
    ],
)
def test_nothing_is_written_that_training_would_refuse(
    undisturbed: Undisturbed, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    to = tmp_path / "task.yaml"
    assert main(["finetune", str(undisturbed(1)), *words, f"data.shards={colours}", "--write", str(to)]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not to.exists()


def test_a_set_without_a_test_split_is_said_to_give_no_accuracy(
    ranks: RankPool, undisturbed: Undisturbed, colours: Path, tmp_path: Path
) -> None:
    words = [*SHORT, f"data.shards={colours}", "data.test_split=val", f"run_dir={tmp_path / 'run'}"]
    config = settings(undisturbed(1), "finetune/classify", *words).config
    assert f"no accuracy: {colours} has no split 'val'" in ranks.run(1, said_while_training, _evaluated(config))[0]
    assert "accuracy" not in metrics(tmp_path / "run")


def said_while_training(world: World, config: Config) -> str:
    console = io.StringIO()
    train_here(Recipe(config), world, console)
    return console.getvalue()
