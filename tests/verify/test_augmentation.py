"""The check of the device's augmentation, with faults that are planted in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.data import augment as grouped
from clae_dist.verify import augmentation
from clae_dist.world import World
from tests.verify.planted import subject


def test_the_augmentation_of_a_cpu_passes(tmp_path: Path) -> None:
    verdict = augmentation.check(subject(tmp_path), World.single("cpu"))
    assert verdict.state == "pass", verdict
    assert verdict.figures["path"] == "augment"
    assert set(verdict.figures["differences"]) == {"20", "33", "16"}


@pytest.mark.parametrize("operation", ["_contrast", "_hue", "_blur"])
def test_a_missing_operation_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, operation: str) -> None:
    right = getattr(grouped, operation)

    def only_in_float64(x: torch.Tensor, amount: torch.Tensor) -> Any:
        return right(x, amount) if x.dtype == torch.float64 else x

    monkeypatch.setattr(grouped, operation, only_in_float64)
    verdict = augmentation.check(subject(tmp_path), World.single("cpu"))
    assert verdict.state == "fail"
    assert "images of 33 pixels differ by up to" in verdict.reason
