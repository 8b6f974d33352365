"""A pytest fixture for your own suite: put `pytest_plugins = ["clae_dist.testing"]` into its conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from clae_dist.parity.loss import LossCase, loss_parity
from clae_dist.parity.loss_verdict import LossParity, table


@pytest.fixture
def assert_loss_parity() -> Callable[..., LossParity]:
    """A function that fails the test where a distributed loss is not, in value and gradient, the loss of one process.

    Its arguments: the loss (a class or function of a module that can be imported, or package.module:name), `world_size` (2),
    `rows` a rank (4), `stop_gradient` (False: see `clae parity --help`), and any others, which the loss is given. It returns
    what was measured.
    """

    def check(
        loss: str | Callable[..., Any],
        *,
        world_size: int = 2,
        rows: int = 4,
        stop_gradient: bool = False,
        **arguments: Any,
    ) -> LossParity:
        name = loss if isinstance(loss, str) else f"{loss.__module__}:{loss.__qualname__}"
        parity = loss_parity(LossCase(name, arguments, world_size, rows, stop_gradient))
        assert parity.passed, "\n".join(table(parity))
        return parity

    return check
