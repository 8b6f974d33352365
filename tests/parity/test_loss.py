"""`clae parity --loss`: right losses are cleared, and each historic mistake is found by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from clae_dist.bench.measure import replaced
from clae_dist.cli import main
from clae_dist.errors import ClaeError, ConfigError
from clae_dist.parity import loss as loss_module
from clae_dist.parity.loss import LossCase, loss_parity, measure
from clae_dist.parity.loss_verdict import LossParity, Measured, judge
from clae_dist.world import World
from tests.parity import losses
from tests.ranks import RankPool

pytest_plugins = ["clae_dist.testing"]


def on_ranks(world: World, case: LossCase) -> tuple[str, list[Measured]]:
    whole = distributed_c10d._get_default_group()
    group = world.group or dist.new_group([0], use_local_synchronization=True)
    distributed_c10d._update_default_pg(group)  # a loss knows no other group
    try:
        with replaced(loss_module, DIM=4):  # half of the differences to take
            return measure(case, world)
    finally:
        distributed_c10d._update_default_pg(whole)


def parity(ranks: RankPool, loss: Callable[..., Any], world_size: int = 2, **settings: Any) -> LossParity:
    return on_standing_ranks(ranks, LossCase(f"{losses.__name__}:{loss.__name__}", world_size=world_size, rows=2, **settings))


def on_standing_ranks(ranks: RankPool, case: LossCase) -> LossParity:
    """`loss_parity`, without processes of its own."""
    dtype, (one,) = ranks.run(1, on_ranks, case)[0]
    many = ranks.run(case.world_size, on_ranks, case)[0][1]
    return judge(case.loss, dtype, one, many, stop_gradient=case.stop_gradient)


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        (losses.right, {}),
        (losses.right_float32, {}),
        (losses.WithLabels, {"temperature": 0.2, "power": 1.0}),
    ],
)
def test_right_losses_pass(ranks: RankPool, loss: Callable[..., Any], arguments: dict[str, Any]) -> None:
    found = parity(ranks, loss, arguments=arguments)
    assert found.passed, found
    assert (found.mistake, found.cause) == ("", "")
    assert found.gradient_difference < (1e-5 if found.dtype == "float32" else 1e-12)


@pytest.mark.parametrize(
    ("loss", "mistake"),
    [
        (losses.detached, "detached"),
        (losses.detached_float32, "detached"),
        (losses.own_rows_only, "own rows only"),
        (losses.all_anchors, "too small"),
        (losses.TwiceSummed, "too large"),
        (losses.own_slot_of_all_reduce, "own slot of an all-reduce"),
        (losses.local, "nothing gathered"),
        (losses.wrong_offset, "wrong value"),
    ],
)
def test_mistakes_are_found_by_name(ranks: RankPool, loss: Callable[..., Any], mistake: str) -> None:
    found = parity(ranks, loss, world_size=3)
    assert not found.passed
    assert found.mistake == mistake, found
    if mistake.startswith("too"):
        assert found.cosine == pytest.approx(1)
        assert found.scale == pytest.approx(1 / 3 if mistake == "too small" else 3)


def test_constant_rows_may_be_meant(ranks: RankPool) -> None:
    """As in UEL or RoCL: with them, a gather without a gradient is right."""
    assert parity(ranks, losses.detached, stop_gradient=True).passed
    assert not parity(ranks, losses.own_rows_only, stop_gradient=True).passed


def test_the_fixture_fails_a_test_with_the_table(
    assert_loss_parity: Callable[..., LossParity], ranks: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "clae_dist.testing.loss_parity", partial(on_standing_ranks, ranks)
    )  # the command's test starts processes
    assert assert_loss_parity(losses.right_functional, rows=2).rows == 2
    with pytest.raises(AssertionError, match="known mistake: detached"):
        assert_loss_parity(losses.detached)


@pytest.mark.slow
def test_the_command_takes_a_file_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside_me.py").write_text(
        "from tests.parity.losses import all_anchors\n\ndef mine(a, b, factor): return factor * all_anchors(a, b)\n"
    )
    monkeypatch.chdir(tmp_path)
    found: list[LossParity] = []

    def once(case: LossCase) -> LossParity:
        found.extend([] if found else [loss_parity(case)])
        return found[0]

    monkeypatch.setattr(loss_module, "loss_parity", once)
    assert main(["parity", "--loss", "beside_me:mine", "--loss-args", "factor=2"]) == 1
    lines = capsys.readouterr().out
    assert "scale 0.5000, cosine 1.000000" in lines
    assert "FAILED" in lines
    assert main(["parity", "--json", "--loss", "beside_me:mine", "--loss-args", "factor=2"]) == 1
    assert json.loads(capsys.readouterr().out)["mistake"] == "too small"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (LossCase("losses"), "expected package.module:Class"),
        (LossCase("tests.parity.losses:missing"), "cannot be imported"),
        (LossCase("tests.parity.losses:right", {"temprature": 1}), "temprature, which neither"),
        (LossCase("tests.parity.losses:two_numbers"), "one number"),
    ],
)
def test_wrong_input(case: LossCase, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loss_parity(case)


def test_a_loss_that_raises_is_named() -> None:
    with pytest.raises(ClaeError, match="losses:raises raised RuntimeError in one process: no such kernel"):
        loss_parity(LossCase("tests.parity.losses:raises"))


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--loss-args", "a=1"], "--loss-args is for --loss"),
        (["--stop-gradient"], "--stop-gradient is for --loss"),
        (["--loss", "a:b", "--backend", "ddp"], "no --backend"),
        (["quickstart", "--loss", "a:b"], "no recipe"),
        (["--loss", "a:b", "--loss-args", "a"], "expected key=value"),
    ):
        assert main(["parity", *arguments]) == 2
        assert words in capsys.readouterr().err
