"""ASCL: its targets and its loss against the formulas, and their limits.

# B rows on this rank, K rows of the queue, D embedding width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from clae_dist.config import Batch, Config, Objective
from clae_dist.contrast.distributed import Contrast
from clae_dist.errors import ConfigError
from clae_dist.methods.ascl import AsclSettings, targets
from clae_dist.objectives.form import Rows
from clae_dist.world import World
from tests.methods.test_supcon import unit_rows

TEMPERATURE = 0.2
SETTINGS = AsclSettings(queue=12, neighbours=3, teacher_temperature=0.3)
KEYS, QUEUE = unit_rows(1, 4), unit_rows(2, 12)
WRITTEN = torch.tensor([True] * 8 + [False] * 4)


def by_hand(key: torch.Tensor, settings: AsclSettings) -> list[float]:
    """y of one image, with its 1 + K entries."""
    valid = [n for n in range(len(QUEUE)) if WRITTEN[n]]
    mass = [math.exp(float(key @ QUEUE[n]) / settings.teacher_temperature) for n in valid]
    p = [m / sum(mass) for m in mass]
    certainty = 1 + sum(share * math.log(share) for share in p) / math.log(len(valid))
    weights = [min(1.0, settings.neighbours * certainty * share) for share in p]
    if settings.form != "soft":
        nearest = sorted(p)[-settings.neighbours :]
        weights = [(1.0 if settings.form == "hard" else certainty) * (share in nearest) for share in p]
    y = [1.0, *weights] + [0.0] * (len(QUEUE) - len(valid))
    return [entry / sum(y) for entry in y]


@pytest.mark.parametrize("form", ["soft", "adaptive_hard", "hard"])
def test_targets_are_those_of_the_formulas(form: Any) -> None:
    settings = replace(SETTINGS, form=form)
    found = targets(KEYS, QUEUE, WRITTEN, settings)
    expected = torch.tensor([by_hand(key, settings) for key in KEYS], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64), atol=1e-14, rtol=0)


def test_the_loss_is_the_cross_entropy_to_the_targets_and_only_queries_have_gradients() -> None:
    queries, keys = unit_rows(3, 4).requires_grad_(), KEYS.clone().requires_grad_()
    y = targets(keys, QUEUE, WRITTEN, SETTINGS)
    contrast = Contrast(Objective(temperature=TEMPERATURE), World.single("cpu"))
    loss = contrast.match(queries, Rows(keys, keys), QUEUE, with_batch=False, index=slice(None), targets=y)
    logits = torch.cat([(queries * KEYS).sum(1, keepdim=True), queries @ QUEUE.T], 1) / TEMPERATURE
    torch.testing.assert_close(loss, -(y * logits.log_softmax(1)).sum(1).mean(), atol=1e-12, rtol=0)
    loss.backward()
    assert queries.grad is not None
    assert keys.grad is None


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        (replace(SETTINGS, neighbours=0), WRITTEN),
        (replace(SETTINGS, teacher_temperature=1e9), WRITTEN),
        (SETTINGS, torch.zeros(12, dtype=torch.bool)),
        (SETTINGS, torch.arange(12) == 3),
    ],
)
def test_without_neighbours_or_certainty_it_is_moco(settings: AsclSettings, written: torch.Tensor) -> None:
    found = targets(KEYS, QUEUE, written, settings)
    torch.testing.assert_close(found[:, 0], torch.ones(4, dtype=torch.float64), atol=1e-9, rtol=0)
    assert found[:, 1:].abs().max() < 1e-9


def test_equal_keys_are_no_neighbours_and_a_certain_one_has_half() -> None:
    equal = targets(KEYS, QUEUE[:1].expand(12, -1), WRITTEN, SETTINGS)
    torch.testing.assert_close(equal[:, 0], torch.ones(4, dtype=torch.float64), atol=1e-12, rtol=0)
    certain = targets(KEYS, QUEUE, WRITTEN, replace(SETTINGS, neighbours=1, teacher_temperature=1e-4))
    nearest = (KEYS @ QUEUE.T).masked_fill(~WRITTEN, -torch.inf).argmax(1)
    expected = torch.zeros_like(certain)
    expected[:, 0] = expected[torch.arange(4), 1 + nearest] = 0.5
    torch.testing.assert_close(certain, expected, atol=1e-9, rtol=0)


def test_permuting_the_queue_permutes_the_targets_and_half_precision_keys_are_compared_in_float32() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    y, moved = targets(KEYS, QUEUE, WRITTEN, SETTINGS), targets(KEYS, QUEUE[order], WRITTEN[order], SETTINGS)
    torch.testing.assert_close(moved[:, 1:], y[:, 1:][:, order], atol=1e-14, rtol=0)
    assert targets(KEYS.bfloat16(), QUEUE.float(), WRITTEN, SETTINGS).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"queue": 0}, "method.queue is 0, but the certainty of ASCL needs two keys; try 12"),
        ({"queue": 12, "neighbours": 13}, "method.neighbours is 13, but method.queue has 12 keys"),
        ({"queue": 12, "teacher_temperature": 0.0}, "method.teacher_temperature is 0"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(batch=Batch(global_size=12), method=AsclSettings(**settings))
