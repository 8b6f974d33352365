"""Supervised training for protocols: schedules, subsets, losses; the same on two ranks and after an interruption."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clae_dist.data.shard_set import open_shards
from clae_dist.evaluation import tuning
from clae_dist.evaluation.classifier import Classifier, with_head
from clae_dist.evaluation.evaluate import evaluate_run
from clae_dist.evaluation.examined import examined_run
from clae_dist.evaluation.place import Place, evenly
from clae_dist.evaluation.protocol import Subject
from clae_dist.evaluation.scored import scored
from clae_dist.evaluation.suite import make_suite
from clae_dist.evaluation.tuning import Schedule, cross_entropy, fit, trades
from clae_dist.world import World

MakeRun = Callable[..., Path]


def _subject(run: Path, world: World, folder: Path) -> Subject:
    found = examined_run(run)
    config, model = found.config, found.encoders["after"].float()
    manifest = open_shards(config.data, world)
    place = Place(world, folder, config, manifest, lambda _: None)
    parts = [place.features({"after": model}, place.images(split), split)["after"] for split in ("train", "test")]
    pair = scored(parts[0], parts[1], "train", "test")
    return with_head(Subject(pair.bank, pair.queries, config.evaluation, config.seed, world.device, "after", model, place))


def _trained(world: World, run: str, folder: str, loss: str, whole: bool) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    subject = _subject(Path(run), world, Path(folder))
    assert subject.model is not None
    assert subject.head is not None
    model = subject.model.double()
    classifier = Classifier(model, subject.head, "adversarial" if loss == "trades" else "clean")
    tuned = fit(classifier, subject, Schedule(1, 0.05, 1e-4, 50, drops=(0.5,)), getattr(tuning, loss), "test", whole=whole)
    return {name: value.clone() for name, value in tuned.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("loss, whole", [("trades", True), ("attacked_cross_entropy", False)])
def test_two_ranks_train_what_one_trains(make_run: MakeRun, ranks: Any, tmp_path: Path, loss: str, whole: bool) -> None:
    """In float64: batch norms see the global batch, and augmentation and noise do not depend on ranks."""
    run = make_run()
    (one,) = ranks.run(1, _trained, str(run), str(tmp_path / "one"), loss, whole)
    two = ranks.run(2, _trained, str(run), str(tmp_path / "two"), loss, whole)
    changed = [name for name, value in examined_run(run).encoders["after"].state_dict().items() if value.is_floating_point()]
    for name, value in one.items():
        for found in two:
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    before = examined_run(run).encoders["after"].double().state_dict()
    assert all(torch.equal(one[f"model.{name}"], before[name]) for name in changed) != whole
    assert one["weight"].abs().max() > 0


def test_an_interrupted_training_continues_bit_for_bit(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("method.name=simclr")
    monkeypatch.setattr(tuning, "_SAVE_EVERY_S", 0.0)
    schedule, steps = Schedule(2, 0.05, 1e-4, 50, cosine=True), []

    def counted(*arguments: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 4 and not torch.is_inference_mode_enabled() and interrupted:
            raise KeyboardInterrupt
        return cross_entropy(*arguments)

    results = []
    for name, interrupted in (("whole", False), ("cut", True)):
        subject, steps = _subject(run, World.single("cpu"), tmp_path / name), []
        assert subject.model is not None
        assert subject.head is not None
        classifier = Classifier(subject.model, subject.head, "clean")
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                fit(classifier, subject, schedule, counted, "test", whole=True)
            interrupted, steps = False, []
        results.append(fit(classifier, subject, schedule, counted, "test", whole=True).state_dict())
    assert len(steps) == 6 - 3
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_rates() -> None:
    drops, cosine = Schedule(10, 1.0, 0, 8, drops=(0.4, 0.8)), Schedule(10, 2.0, 0, 8, cosine=True)
    assert [drops.rate(done) for done in (0.0, 0.39, 0.4, 0.79, 0.8)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert [cosine.rate(done) for done in (0.0, 0.5, 1.0)] == pytest.approx([2, 1, 0])


def test_subsets_are_balanced_nested_and_a_function_of_the_seed() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)[torch.randperm(83, generator=torch.Generator().manual_seed(0))]
    chosen = {count: evenly(labels, count, 5) for count in (3, 6, 9, 30, 83)}
    assert {count: len(rows) for count, rows in chosen.items()} == {count: count for count in chosen}
    for small, large in ((3, 6), (6, 9), (9, 30), (30, 83)):
        assert set(chosen[small].tolist()) <= set(chosen[large].tolist())
    assert labels[chosen[9]].bincount().tolist() == [3, 3, 3]
    assert labels[chosen[30]].bincount().tolist() == [14, 13, 3] or labels[chosen[30]].bincount().tolist() == [13, 14, 3]
    assert torch.equal(evenly(labels, 9, 5), chosen[9])
    assert not torch.equal(evenly(labels, 9, 6), chosen[9])


def test_trades_is_cross_entropy_and_six_times_the_divergence(make_run: MakeRun, tmp_path: Path) -> None:
    """KL(clean ‖ adversarial), as kl_div(log p_adversarial, p_clean) computes it; without an attack the term is zero."""
    subject = _subject(make_run("method.name=simclr"), World.single("cpu"), tmp_path)
    assert subject.model is not None
    assert subject.head is not None
    classifier = Classifier(copy.deepcopy(subject.model).double(), subject.head, "clean")
    images, noise = torch.rand((2, 5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1])
    clean = F.cross_entropy(classifier(images), labels, reduction="none")
    loss = trades(classifier, images, labels, noise)
    assert (loss >= clean - 1e-9).all()
    assert (loss - clean).mean() > 1e-4
    with torch.no_grad():
        start = (images + 1e-3 * (2 * noise - 1)).clamp(0, 1)
        moved = tuning._raise_divergence(classifier, images, start, F.softmax(classifier(images), dim=1))
        p, q = (F.softmax(classifier(x), dim=1) for x in (images, moved))
    torch.testing.assert_close(loss, clean + 6 * (p * (p / q).log()).sum(1))
    assert (moved - images).abs().max() <= 8 / 255 + 1e-9


def test_semi_and_finetune(make_run: MakeRun) -> None:
    """With all labels the share's accuracy is that of plain fine-tuning under the same settings."""
    run = make_run("method.name=simclr")
    overrides = ("semi.shares=[0.1, 1]", "semi.epochs=2", "semi.batch=50", "semi.subsets=2", "semi.learning_rate=0.256")
    overrides += ("finetune.learning_rates=[0.05]", "finetune.weight_decays=[0]", "finetune.epochs=2", "finetune.batch=50")
    found = evaluate_run(run, lambda _: None, suite=make_suite("semi,finetune", overrides))
    semi, full = found["results"]["semi"], found["results"]["finetune"]
    assert semi["accuracy_100"] == full["accuracy"]
    assert semi["accuracy_100_deviation"]["after"] == 0
    assert next(iter(semi)) == "accuracy_10"
    assert full["accuracy"]["after"] > 50
    assert len(found["details"]["semi"]["after"]["ids of 10 %, seed 0"]) == 15


@pytest.mark.slow
def test_linear_sgd_and_the_choice_of_a_learning_rate(make_run: MakeRun) -> None:
    run = make_run("method.name=simclr")
    sgd = make_suite("linear_sgd", ("linear_sgd.epochs=20", "linear_sgd.batch=50", "linear_sgd.learning_rate=5"))
    assert evaluate_run(run, lambda _: None, suite=sgd)["results"]["linear_sgd"]["accuracy"]["before"] > 80
    grid = ("finetune.learning_rates=[0.05, 1e-6]", "finetune.weight_decays=[0]", "finetune.epochs=2", "finetune.batch=50")
    chosen = evaluate_run(run, lambda _: None, suite=make_suite("finetune", grid))["results"]["finetune"]
    assert chosen["learning_rate"]["after"] == 0.05
    one = ("finetune.learning_rates=[0.05]", *grid[1:])
    assert (
        chosen["accuracy"]
        == evaluate_run(run, lambda _: None, suite=make_suite("finetune", one))["results"]["finetune"]["accuracy"]
    )
