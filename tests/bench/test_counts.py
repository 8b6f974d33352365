"""Kernels, bytes and host waits by dispatch, of operations whose counts are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from clae_dist.counts import Counts, counted

X = torch.ones(4, 5)
MIB = X.numel() * X.element_size()


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda: X.view(20)[3:].unflatten(0, (17, 1)).expand(17, 3), Counts()),
        (lambda: torch.empty(7), Counts()),
        (lambda: X + X, Counts(1, 3 * MIB)),
        (lambda: X.clone().add_(1), Counts(2, 4 * MIB)),
        (lambda: torch.add(X, X[:1].expand(4, 5), out=torch.empty(4, 5)), Counts(1, 2 * MIB + MIB // 4)),
        (lambda: X[torch.arange(2)], Counts(2, 2 * 8 + 2 * 8 + 2 * MIB // 2)),
        (lambda: X.sum().item(), Counts(1, MIB + 4, 1)),
    ],
)
def test_known_counts(action: Callable[[], object], expected: Counts) -> None:
    assert counted(action) == expected


def test_copies_between_devices() -> None:
    assert counted(lambda: X.to("meta"), "meta") == Counts(waits=1)
    assert counted(lambda: X.to("meta", non_blocking=True), "meta") == Counts()
    assert counted(lambda: X + X, "meta") == Counts()
    assert counted(lambda: torch.empty(4, device="meta")[torch.ones(4, dtype=torch.bool)], "meta").waits >= 1
