from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clae_dist.cli import main
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.manifest import load_manifest
from clae_dist.errors import ConfigError, DataError
from clae_dist.evaluation.evaluate import evaluate_run
from clae_dist.evaluation.features import Features, extract
from clae_dist.evaluation.knn import knn_accuracy
from clae_dist.evaluation.linear import linear_probe
from clae_dist.models import build_model
from clae_dist.recipe import from_yaml
from clae_dist.runs.checkpoint import load_model
from tests.checkpoints import write_checkpoint

MakeRun = Callable[..., Path]


def test_before_and_after_are_the_initial_and_the_trained_encoder(make_run: MakeRun) -> None:
    """Settings, pixels and mode are the same for both; only the weights differ."""
    run = make_run()
    said: list[str] = []
    found = evaluate_run(run, said.append)
    config = from_yaml(run / "config.yaml")
    manifest = load_manifest(config.data.shards)
    for when, model in (("before", build_model(config)), ("after", load_model(run)[1])):
        model.to(memory_format=torch.channels_last)  # as evaluation does; the other layout rounds differently
        train, test = (extract(model, EvaluationSet(manifest, split, 16), "cpu", 500) for split in ("train", "test"))
        assert found["results"]["knn"]["accuracy"][when] == knn_accuracy(train, test, 20, config.evaluation.knn_temperature)
        assert found["results"]["linear"]["accuracy"][when] == linear_probe(train, test, seed=config.seed).accuracy
    assert found["results"]["knn"]["accuracy"]["before"] > 80  # three plain colours
    assert (found["train_images"], found["bank_images"], found["test_images"], found["images_seen"]) == (150, 150, 30, 224)
    assert found["manifest_digest"] == manifest.digest
    assert json.loads((run / "evaluation.json").read_text()) == found
    assert any("images/s" in line for line in said)


def test_can_be_repeated_and_leaves_no_partial_file(make_run: MakeRun) -> None:
    run = make_run()
    first, second = ({**evaluate_run(run, _quiet), "wall_s": 0} for _ in range(2))
    assert first == second
    names = ["checkpoints", "config.yaml", "evaluation", "evaluation.json", "run.json"]
    assert sorted(path.name for path in run.iterdir()) == names


def test_a_part_of_the_train_split_as_bank(make_run: MakeRun) -> None:
    """The part is the same whatever the run's seed, so that runs can be compared; all of the test split is classified."""
    run = make_run("evaluation.train_images=60", "seed=5")
    said: list[str] = []
    found = evaluate_run(run, said.append)
    config = from_yaml(run / "config.yaml")
    manifest = load_manifest(config.data.shards)
    model = load_model(run)[1].to(memory_format=torch.channels_last)  # as evaluation does
    bank, test = (extract(model, EvaluationSet(manifest, split, 16, 60), "cpu", 500) for split in ("train", "test"))
    assert (len(bank), len(test)) == (60, 30)
    assert found["results"]["knn"]["accuracy"]["after"] == knn_accuracy(bank, test, 20, config.evaluation.knn_temperature)
    assert found["results"]["linear"]["accuracy"]["after"] == linear_probe(bank, test, seed=config.seed).accuracy
    assert (found["train_images"], found["bank_images"], found["test_images"]) == (150, 60, 30)
    assert {id_ for query in found["neighbours"] for id_ in query["neighbour_ids"]} <= set(bank.ids_N.tolist())
    assert any("features, train (60 of 150): 60 of 60 images" in line for line in said)


def test_neighbours_are_drawn_over_the_classes(make_run: MakeRun) -> None:
    shown = evaluate_run(make_run(), _quiet)["neighbours"]
    assert len(shown) == 8
    assert sorted(query["label"] for query in shown[:3]) == [0, 1, 2]
    assert len({query["id"] for query in shown}) == 8
    assert all(query["cosines"] == sorted(query["cosines"], reverse=True) for query in shown)


@pytest.mark.parametrize("test_split", [True, False])
def test_without_labels_or_test_split_there_are_no_accuracies(
    make_run: MakeRun, shards: Callable[..., Path], test_split: bool
) -> None:
    said: list[str] = []
    found = evaluate_run(make_run(data=shards(labelled=False, test=test_split)), said.append)
    assert found["results"] == {}
    assert bool(found["neighbours"]) == test_split
    assert any("no accuracies" in line for line in said)


def test_images_without_a_label_are_in_no_accuracy(make_run: MakeRun, shards: Callable[..., Path]) -> None:
    """One of them and there were no accuracies at all, and `train` ended. The neighbours still show all images."""
    said: list[str] = []
    some = shards(label_of=lambda number: -1 if number % 10 == 0 else number % 3)
    run = make_run(data=some)
    found = evaluate_run(run, said.append)
    config = from_yaml(run / "config.yaml")
    model = load_model(run)[1].to(memory_format=torch.channels_last)  # as evaluation does
    manifest = load_manifest(config.data.shards)
    parts = [extract(model, EvaluationSet(manifest, split, 16), "cpu", 500) for split in ("train", "test")]
    bank, test = (Features(*(column[part.labels_N >= 0] for column in vars(part).values())) for part in parts)
    assert (len(bank), len(test)) == (135, 27)
    assert found["results"]["knn"]["accuracy"]["after"] == knn_accuracy(bank, test, 20, config.evaluation.knn_temperature)
    assert found["results"]["linear"]["accuracy"]["after"] == linear_probe(bank, test, seed=config.seed).accuracy
    assert found["unlabelled"] == {"train": 15, "test": 3}
    assert "images of train without a label, skipped in the accuracies: 15 of 150" in said


def test_a_set_of_one_class_has_no_accuracies(make_run: MakeRun, shards: Callable[..., Path]) -> None:
    """100 % without a word."""
    said: list[str] = []
    found = evaluate_run(make_run(data=shards(label_of=lambda number: 1 if number % 2 else -1)), said.append)
    assert found["results"] == {}
    assert found["no_accuracies"].startswith("all labelled images of train are of one class")
    assert any(line.startswith("no accuracies: all labelled images of train are of one class") for line in said)


def test_labels_with_gaps_are_the_classes_that_there_are(make_run: MakeRun, shards: Callable[..., Path]) -> None:
    """A label of 999,999 made a linear probe of a million classes (15 GB); the accuracies are those of 0, 1, 2."""
    classes = tuple(map(str, range(1000)))
    gaps = shards(label_of=lambda number: (7, 123, 999)[number % 3], classes=classes)
    found, plain = (evaluate_run(make_run(data=folder, run_dir=folder / "run"), _quiet) for folder in (gaps, shards()))
    for key in ("results", "num_classes"):
        assert found[key] == plain[key], key


def test_a_run_without_checkpoint_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint yet; start `clae train`"):
        evaluate_run(make_run(checkpoint=False), _quiet)


def test_shards_that_are_gone_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        evaluate_run(make_run(data=tmp_path / "nowhere"), _quiet)


def test_runs_in_double_precision_too(make_run: MakeRun) -> None:
    found = evaluate_run(make_run("train.precision=float64", "method.name=simclr"), _quiet)
    assert torch.tensor(found["results"]["knn"]["accuracy"]["after"]).isfinite()


def _quiet(_: str) -> None: ...


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_weights_that_are_no_numbers_are_refused_with_the_reason(make_run: Callable[..., Path], value: float) -> None:
    """They were evaluated as 10.00 %."""
    run = make_run()
    model = build_model(from_yaml(run / "config.yaml"))
    weights = {f"model/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    next(iter(weights.values())).view(-1)[3] = value
    write_checkpoint(run, 9, weights)
    for command in ("evaluate", "export"):
        assert main([command, str(run)]) == 2
    with pytest.raises(
        ConfigError, match=r"the weights after step 9 are NaN or infinite \(1 of \d+ tensors, such as .*diverged"
    ):
        evaluate_run(run, lambda text: None)
    assert not (run / "evaluation.json").exists()


def test_features_that_are_no_numbers_are_refused(make_run: Callable[..., Path]) -> None:
    run = make_run()
    model = build_model(from_yaml(run / "config.yaml"))
    parameters = {name for name, _ in model.named_parameters()}  # not the statistics, which would divide them to 0
    weights = {
        f"model/{name}": torch.full_like(tensor, 1e30) if name in parameters else tensor
        for name, tensor in model.state_dict().items()
    }
    write_checkpoint(run, 9, weights)
    with pytest.raises(ConfigError, match="the trained encoder's features of train are NaN or infinite"):
        evaluate_run(run, lambda text: None)
