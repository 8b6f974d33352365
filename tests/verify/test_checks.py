"""Each check finds a fault that is planted in the part that it examines, and passes without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from clae_dist import collectives as calls
from clae_dist.contrast.adversary import Ball
from clae_dist.parity.compare import Parity
from clae_dist.parity.observe import SyntheticRun
from clae_dist.parity.run import examine
from clae_dist.verify import attacks, checkpoints, collectives, equality, host, norms, program, resume
from clae_dist.verify.attacks import _cases
from clae_dist.verify.check import Verdict, verdict_of
from clae_dist.verify.program import CommandError, Completed
from clae_dist.world import World
from tests.checkpoints import write_checkpoint
from tests.ranks import RankPool
from tests.verify.planted import subject

DDP_AND_FSDP2 = {name: parallel for name, parallel in equality.backends(subject(Path())).items() if "zero" not in name}


def _own_rows(everyone: torch.Tensor, own: torch.Tensor, group: Any) -> None:
    everyone.view(-1, *own.shape).copy_(own)


def _too_far(ball: Ball, x: torch.Tensor, at: torch.Tensor, gradient: torch.Tensor, length: Any) -> torch.Tensor:
    return x + 1.5 * ball.epsilon * gradient.sign()


def _nowhere(ball: Ball, x: torch.Tensor, at: torch.Tensor, gradient: torch.Tensor, length: Any) -> torch.Tensor:
    return x


_load = SyntheticRun.load


def _load_something_else(run: SyntheticRun, state: Any) -> None:
    _load(run, state)
    next(run.backend.model.parameters()).data.add_(1)


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "all-gather": (calls, "all_gather", _own_rows),
    "local statistics": (norms, "use_global_statistics", lambda module, group: None),
    "too far": (Ball, "step", _too_far),
    "nowhere": (Ball, "step", _nowhere),
    "loading": (SyntheticRun, "load", _load_something_else),
}


def verdict(world: World, check: Any, folder: Path, fault: str) -> Verdict:
    """The verdict of a check with a planted fault; checkpoints under DDP and FSDP2."""
    with (
        mock.patch.multiple(checkpoints, backends=lambda subject: DDP_AND_FSDP2),
        mock.patch.object(collectives, "QUICK", (4096,)),
    ):
        if not fault:
            return check(subject(folder), world)
        with mock.patch.object(*FAULTS[fault]):
            return check(subject(folder), world)


CASES = [
    (collectives.check, "all-gather", "all-gather of 4 KiB: wrong values on rank 0, 1"),
    (norms.check, "local statistics", "ours, torch.float64: "),
    (checkpoints.check, "loading", "ddp to fsdp2: 1 tensor differ"),
]


@pytest.mark.parametrize(("check", "fault", "words"), CASES)
def test_a_planted_fault_is_found(ranks: RankPool, tmp_path: Path, check: Any, fault: str, words: str) -> None:
    if check is not checkpoints.check:  # the slow tests see it pass
        assert {found.state for found in ranks.run(2, verdict, check, tmp_path / "right", "")} == {"pass"}
    for found in ranks.run(2, verdict, check, tmp_path / "wrong", fault):
        assert found.state == "fail"
        assert words in found.reason


def attacks_of_some_kinds(world: World, folder: Path, kinds: tuple[str, ...], fault: str) -> Verdict:
    def some(given: Any, world_size: int) -> Iterator[Any]:
        yield from (case for case in _cases(given, world_size) if case[0] in kinds)

    with mock.patch.object(attacks, "_cases", some), mock.patch.object(*FAULTS[fault]) if fault else nullcontext():
        return attacks.check(subject(folder), world)


def test_an_attack_that_leaves_the_ball_or_has_no_effect_is_found(ranks: RankPool, tmp_path: Path) -> None:
    kinds = ("the recipe", "pgd l2, random start")
    right = ranks.run(2, attacks_of_some_kinds, tmp_path, kinds, "")[0]
    assert right.state == "pass", right
    assert "2 methods and attacks" in right.figure
    for fault, words in (("too far", "δ exceeds ε, or a pixel leaves [0, 1]"), ("nowhere", "raises the loss less than random")):
        wrong = ranks.run(2, attacks_of_some_kinds, tmp_path, kinds[:1], fault)[0]
        assert wrong.state == "fail"
        assert words in wrong.reason


def under_ddp(world: World, folder: Path, norm: str) -> Verdict:
    given = subject(folder)
    config = replace(given.recipe.config, model=replace(given.recipe.config.model, norm=norm))
    with mock.patch.object(equality, "PRECISIONS", ("float64",)), mock.patch.object(equality, "_STEPS", 1):
        return equality._Parity(config.parallel)(replace(given, recipe=given.recipe._replace(config=config)), world)


def test_ranks_that_compute_another_model_are_found(ranks: RankPool, tmp_path: Path) -> None:
    right = ranks.run(2, under_ddp, tmp_path, "global")[0]
    assert right.state == "pass", right
    assert "float64" in right.figure
    wrong = ranks.run(2, under_ddp, tmp_path, "local")[0]
    assert wrong.state == "fail"
    assert "float64: model.norm is 'local'" in wrong.reason


def test_a_gradient_far_from_float64_exceeds_the_bound_of_bfloat16(ranks: RankPool, tmp_path: Path) -> None:
    """In a single element of a tensor, bfloat16 may be as wrong as the element is large; the whole gradient may not."""
    parity = ranks.run(2, bfloat16, tmp_path)[0]
    assert 0 < parity.param_grad.distance < equality.distance_bound(parity) < 1
    far = replace(parity, passed=True, param_grad=replace(parity.param_grad, distance=1.0))
    found = equality._verdict({"bfloat16": far})
    assert found.state == "fail"
    assert "bfloat16: the parameter gradient is 1.0e+00 of its length from float64" in found.reason


def bfloat16(world: World, folder: Path) -> Parity:
    return examine(subject(folder).tiny(world.size, "bfloat16"), world, 1)


def test_different_bits_after_a_kill_are_found(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("same", 1.0), ("other", 1.0 + 1e-7)):
        write_checkpoint(tmp_path / name, resume._STEPS, {"model/a": torch.ones(3), "model/b": torch.tensor([value])})
    assert resume._compare(tmp_path / "one", tmp_path / "same", 9).state == "pass"
    found = resume._compare(tmp_path / "one", tmp_path / "other", 9)
    assert (found.state, found.reason) == ("fail", "1 of 2 tensors differ, model/b first")


@pytest.mark.parametrize(
    ("check", "code", "stdout", "stderr", "state", "words"),
    [
        (host.doctor, 0, "ok  torch  2.9\n1 ok, 0 warnings, 0 problems\n", "", "pass", "1 ok, 0 warnings"),
        (host.doctor, 1, "problem  clock  wrong\n0 ok, 0 warnings, 1 problem\n", "", "fail", "clock wrong"),
        (host.bench_step, 1, "", "clae: exact differs from the reference", "fail", "exact differs from the reference"),
        (host.bench_data, 1, "", "ModuleNotFoundError: No module named 'psutil'", "skipped", "install the extra bench"),
    ],
)
def test_other_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check: Any, code: int, stdout: str, stderr: str, state: str, words: str
) -> None:
    for module in (host, program):
        monkeypatch.setattr(module, "clae", lambda words, limit_s: Completed(code, stdout, stderr))
    found = verdict_of(lambda: check(subject(tmp_path)))
    assert found.state == state
    assert words in found.reason + found.figure


def test_a_command_that_takes_too_long() -> None:
    with pytest.raises(CommandError, match=r"clae config had not ended after 0\.01 s"):
        program.clae(["config", "quickstart"], 0.01)
