"""`clae bench step` on small encoders."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from clae_dist import cli
from clae_dist.bench import step, steps
from clae_dist.bench.measure import UnequalError
from clae_dist.contrast.interface import Step

CPU = torch.device("cpu")
RESNET = steps.Kind("small residual network", "small_resnet", 16, 4)
VIT = steps.Kind("small ViT", "four_blocks/vit_tiny_patch16_224", 8, 4)
NAMES = ["plain", "original", "exact", "fused", "fused_half"]


@pytest.mark.slow
def test_rows_say_units_and_count_flops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Flops do not depend on what else the machine does: they are the units but for the first and last layers."""
    monkeypatch.setattr(step, "QUICK", step.StepBench((RESNET, VIT), repeats=1))
    assert cli.main(["bench", "step", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["what"].split(":")[0] for row in rows] == NAMES * 2
    for first, exact in ((0, 11 / 6), (5, 10 / 6)):
        plain, *others = rows[first : first + 5]
        for row, units in zip(others, (2.5, exact, 1.5, 1.25), strict=True):
            assert row["floor_s"] == pytest.approx(plain["median_s"] * units)
            assert row["more"]["flops_to_plain"] == pytest.approx(units, abs=0.06)
            assert set(row["ratio_to"]) == set(NAMES) - {row["what"].split(":")[0]}
            assert row["more"]["images_per_s"] > 0


@pytest.mark.parametrize("kind", [RESNET, VIT], ids=lambda kind: kind.name)
def test_steps_are_what_they_are_said_to_be(kind: steps.Kind) -> None:
    steps.check(replace(kind, precision="float64"), CPU)


def test_an_attack_of_another_direction_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Step._gradient_with_weights

    def descends(*arguments: Any) -> Any:
        def gradient_of(images: torch.Tensor) -> Any:
            loss, gradient = right(*arguments)(images)
            return loss, -gradient

        return gradient_of

    monkeypatch.setattr(Step, "_gradient_with_weights", descends)
    with pytest.raises(UnequalError, match="exact's perturbation differs"):
        steps.check(replace(RESNET, precision="float64"), CPU)


def test_a_fused_step_with_another_perturbation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own view y unperturbed: the loss is near, the gradients are others."""
    monkeypatch.setattr(Step, "move", lambda s, start, gradient, loss: start)
    with pytest.raises(UnequalError, match="fused differs"):
        steps.check(replace(RESNET, precision="float64"), CPU)


@pytest.mark.slow
def test_methods_cost_the_units_that_they_predict() -> None:
    """Every recipe's method and cost has a row. MoCo's attack once embedded an anchor that it did not use: 10 units, not 9."""
    kind = replace(RESNET, image_size=32, every_method=True)  # a patch of half its side has a quarter of every map
    images, compared = steps.make_images(kind, CPU), steps.variants(kind)
    assert {"acl", "advcl", "air", "clae-moco", "dynacl", "moco", "rocl"} < set(compared)
    prepared = {name: steps.prepare(kind, variant, CPU) for name, variant in compared.items()}
    flops = {name: step.work_of(step.one_step(run, images)).flops for name, run in prepared.items()}
    for name, variant in compared.items():
        units = variant.units(shared_norms=prepared[name].shared_norms)
        if units is not None:  # a first layer has an input gradient in attacks only, and not every method has a projector
            assert 6 * flops[name] / flops["plain"] == pytest.approx(units, rel=0.03), name
