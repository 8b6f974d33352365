"""Protocols on a whole run: on one rank and on two, and what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clae_dist.config import Augment
from clae_dist.evaluation import passes
from clae_dist.evaluation.evaluate import evaluate, evaluate_run
from clae_dist.evaluation.examined import examined_run
from clae_dist.evaluation.geometry import alignment, view_of
from clae_dist.evaluation.protocol import headlines
from clae_dist.evaluation.suite import PROTOCOLS, make_suite
from clae_dist.report.record import read_record, summarise, summary_table
from clae_dist.world import World
from tests.ranks import RankPool

MINE = "corruptions,adapt,calibration,ood,transfer,retrieval,learnability,geometry"
FEW = [
    "corruptions.images=12",
    "corruptions.kinds=[shot_noise,elastic,jpeg]",
    "adapt.images=12",
    "adapt.batch=5",
    "adapt.kinds=[contrast]",
    "ood.knn_k=5",
    "geometry.images=40",
    "learnability.splits=2",
]


def _evaluate(world: World, run: str, overrides: list[str], names: str = MINE) -> dict[str, Any]:
    torch.set_num_threads(1)
    return evaluate(examined_run(Path(run)), make_suite(names, overrides), world, lambda _: None)


@pytest.fixture(scope="module")
def sets(shards: Callable[..., Path]) -> list[str]:
    return [f"{name}.sets=[{shards()}]" for name in ("ood", "transfer")]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> str:
    return "evaluation.batch_size=10"  # so that two ranks share every pass


def test_two_ranks_get_the_same_results(
    make_run: Callable[..., Path], ranks: RankPool, sets: list[str], tmp_path: Path, small_batches: str
) -> None:
    """A rank that took its share for the whole set, or corrupted an image by its place in the batch, would differ."""
    runs = [str(make_run(small_batches, run_dir=tmp_path / name)) for name in ("alone", "shared")]
    (alone,) = ranks.run(1, _evaluate, runs[0], FEW + sets)
    shared = ranks.run(2, _evaluate, runs[1], FEW + sets)
    assert set(alone["results"]) == set(MINE.split(","))
    for results in (one["results"] for one in shared):
        for protocol, metrics in alone["results"].items():
            assert set(results[protocol]) == set(metrics)
            for metric, pair in metrics.items():
                # The passes are the same, batch by batch; only the number of threads may differ.
                assert results[protocol][metric] == pytest.approx(pair, rel=1e-9), (protocol, metric)


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, labelled_shards: Path, sets: list[str]
) -> Callable[[Callable[..., Path]], tuple[Path, dict[str, Any]]]:
    done: list[tuple[Path, dict[str, Any]]] = []

    def once(make_run: Callable[..., Path]) -> tuple[Path, dict[str, Any]]:
        if not done:
            run = make_run(run_dir=tmp_path_factory.mktemp("evaluated") / "run")
            suite = make_suite(f"knn,linear,{MINE}", FEW + sets)
            done.append((run, evaluate_run(run, lambda _: None, suite=suite)))
        return done[0]

    return once


def test_results_are_finite_shares_and_are_read_back(
    make_run: Callable[..., Path], evaluated: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    run, content = evaluated(make_run)
    assert json.loads((run / "evaluation.json").read_text())["details"] == content["details"]
    record = read_record(run)
    assert record.evaluation is not None, "the readers refuse what the protocols write"
    for protocol, metrics in content["results"].items():
        for metric, pair in metrics.items():
            assert all(math.isfinite(value) for value in pair.values())
            if "accuracy" in metric or "auroc" in metric or "ece" in metric:
                assert all(0 <= value <= 100 for value in pair.values()), (protocol, metric)
    for kind in content["details"]["corruptions"]["after"].values():
        assert len(kind) == 5


def test_a_headline_that_is_no_percentage_says_so(
    make_run: Callable[..., Path], evaluated: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    run, content = evaluated(make_run)
    assert content["protocols"]["geometry"]["unit"] == ""
    rank = headlines(content["results"], "geometry", "")["after"]
    assert rank.name == "features_rank_me"
    table = summary_table(summarise(read_record(run)))
    line = next(line for line in table.splitlines() if line.startswith("effective rank"))
    assert rank.text() in line
    assert "%" not in line


def test_no_corruption_is_the_linear_probe(
    make_run: Callable[..., Path], evaluated: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    _, content = evaluated(make_run)
    run = make_run()
    suite = make_suite("corruptions,linear", ["corruptions.images=0"])
    full = evaluate_run(run, lambda _: None, suite=suite)["results"]
    assert full["corruptions"]["clean_accuracy"] == pytest.approx(full["linear"]["accuracy"])
    assert full["linear"] == content["results"]["linear"]


def test_transfer_to_the_set_itself_is_the_linear_probe(
    make_run: Callable[..., Path], evaluated: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    """The further set is made like the run's own."""
    _, content = evaluated(make_run)
    assert content["results"]["transfer"]["mean_accuracy"] == pytest.approx(content["results"]["linear"]["accuracy"])
    assert "colours_accuracy" in content["results"]["transfer"]


def test_the_same_set_is_not_foreign(
    make_run: Callable[..., Path], evaluated: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    _, content = evaluated(make_run)
    for score in ("knn", "msp", "energy", "mahalanobis", "relative_mahalanobis"):
        assert content["results"]["ood"][f"colours_{score}_auroc"]["after"] == pytest.approx(50)  # the same images


@pytest.mark.slow
def test_fine_tuned_transfer_to_the_set_itself_is_fine_tuning(
    make_run: Callable[..., Path], shards: Callable[..., Path]
) -> None:
    words = (f"transfer.sets=[{shards()}]", "transfer.finetune_epochs=1", "finetune.epochs=1")
    results = evaluate_run(make_run("method.name=simclr"), lambda _: None, suite=make_suite("transfer,finetune", words))[
        "results"
    ]
    for metric, values in results["finetune"].items():
        assert results["transfer"][f"colours_finetuned_{metric}"] == values, metric


def test_transfer_without_sets_is_skipped_with_a_reason(make_run: Callable[..., Path]) -> None:
    result = evaluate_run(make_run(), lambda _: None, suite=make_suite("transfer,knn"))
    assert set(result["results"]) == {"knn"}
    assert any("transfer.sets is empty" in note for note in result["notes"])


def test_a_pass_resumes_with_the_batches_that_are_missing(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, small_batches: str
) -> None:
    run, calls = make_run(small_batches), []
    embed = passes.embed

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return embed(*arguments)

    monkeypatch.setattr(passes, "embed", counted)
    suite = ["ood.sets=[noise]"]
    with pytest.raises(KeyboardInterrupt):
        _evaluate(World.single("cpu"), str(run), suite, "ood")
    interrupted = len(calls)
    result = _evaluate(World.single("cpu"), str(run), suite, "ood")
    assert len(calls) - interrupted == 6 - 4  # three batches of the encoder before and of that after pretraining
    monkeypatch.setattr(passes, "embed", embed)
    fresh = _evaluate(World.single("cpu"), str(make_run(small_batches, run_dir=run.parent / "other")), suite, "ood")
    assert result["results"] == fresh["results"]


CPU = torch.device("cpu")


def test_alignment_views_are_pure_functions_of_the_image() -> None:
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = np.arange(5)
    whole = view_of(images, ids, 3, 0, Augment(), CPU)
    order = [4, 1]
    assert torch.allclose(view_of(images[order], ids[order], 3, 0, Augment(), CPU), whole[order], atol=1e-6)
    assert not torch.equal(view_of(images, ids, 3, 1, Augment(), CPU), whole)
    nothing = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0, jitter=0, grey=0)
    assert torch.equal(view_of(images, ids, 3, 0, nothing, CPU), images.float() / 255)
    assert alignment(whole.flatten(1).double(), whole.flatten(1).double()) == 0


def test_the_neighbour_in_use_is_recorded(make_run: Callable[..., Path]) -> None:
    """A bank of 150 images has no 1000th neighbour that says anything."""
    suite = make_suite("ood", ["ood.knn_k=1000", "ood.sets=[noise]"])
    about = evaluate_run(make_run(), lambda _: None, suite=suite)["protocols"]["ood"]
    assert about["settings"]["knn_k"] == 50
    assert "50th neighbour" in about["description"]


def test_every_protocol_describes_itself(
    make_run: Callable[..., Path], evaluated: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    _, content = evaluated(make_run)
    for name, about in content["protocols"].items():
        assert about["title"] == PROTOCOLS[name].title
        assert len(about["description"]) > 20
