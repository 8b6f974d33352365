"""`clae bench contrast` on small shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clae_dist import cli
from clae_dist.bench import contrast, peers
from clae_dist.bench.measure import UnequalError
from clae_dist.bench.one_rank import OneRank
from clae_dist.bench.peers import Loss
from clae_dist.objectives import find
from clae_dist.objectives.dense import dense_loss
from clae_dist.objectives.form import Rows

CPU = torch.device("cpu")
TINY = contrast.Shapes(beside=((16, 64),), growing=((16, 64),), dim=8, repeats=2)
FIELDS = "case what median_s spread ratio_to floor_s added_bytes wire_bytes bytes_ratio_to more".split()


def silent(text: str) -> None:
    pass


@pytest.mark.slow
def test_rows_of_one_shape_with_those_peers_that_are_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contrast, "QUICK", TINY)
    assert cli.main(["bench", "contrast", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(list(row) == FIELDS for row in found["rows"])
    names = [row["what"].split(":")[0] for row in found["rows"]]
    nt_xent = ["log_sum_exp", "reduce_scatter", *["lightly"] * peers.is_installed("lightly"), "dense"]
    instance = ["log_sum_exp", "reduce_scatter", *["open_clip"] * peers.is_installed("open_clip"), "dense"]
    assert names == [*nt_xent, *instance, "log_sum_exp"]
    assert set(found["rows"][0]["ratio_to"]) == set(nt_xent[1:])
    assert {"s_per_pair", "added_bytes_per_row"} <= set(found["rows"][-1]["more"])


def test_a_missing_peer_is_one_plain_line_and_the_rest_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contrast, "QUICK", replace(TINY, growing=()))
    monkeypatch.setattr(peers, "is_installed", lambda module: False)
    assert cli.main(["bench", "contrast", "--quick"]) == 0
    printed = capsys.readouterr()
    assert "lightly is not installed; pip install lightly" in printed.err.splitlines()
    assert "open_clip_torch is not installed; pip install open_clip_torch" in printed.err.splitlines()
    assert "reduce_scatter" in printed.out
    assert "NTXentLoss" not in printed.out


@pytest.mark.parametrize("objective", ["nt_xent", "instance"])
def test_the_reference_is_the_gradient_of_all_ranks_losses(objective: str) -> None:
    """By the definition: every rank's loss, summed, with one graph through all rows."""
    place = OneRank.of(objective, 16, 64, 8, 0.2, CPU).in_float64().with_computed_shifts()
    a, b = (view.clone().requires_grad_() for view in place.views)
    losses = []
    for rank in range(place.size):
        mine = slice(rank * 8, rank * 8 + 8)
        rows = Rows(a[mine], a), Rows(b[mine], b)
        both = (rows, rows[::-1]) if objective == "instance" else (rows,)
        losses.append(sum(dense_loss(find(objective), *pair, mine.start, place.settings) for pair in both) / len(both))
    truth = [grad[place.mine] for grad in torch.autograd.grad(sum(losses), (a, b))]
    alone, together = place.reference()
    assert torch.allclose(together[0], losses[place.rank].detach(), atol=1e-12)  # float64: only the order of sums differs
    for found, expected in zip(together[1:], truth, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)
    own = torch.autograd.grad(place.by_reduce_scatter(*(leaves := place.leaves())), leaves)
    for found, expected in zip(own, alone[1:], strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


def wrong_by_a_mask(place: OneRank) -> Loss:
    """A dense NT-Xent that forgot that a row is no negative of itself."""

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        columns = torch.cat([torch.cat(place.parts(b)), torch.cat(place.parts(a))])
        return F.cross_entropy(a @ columns.T / place.temperature, place.mine.start + torch.arange(len(a)))

    return loss


def wrong_in_the_gradient_alone(place: OneRank) -> Loss:
    """The right loss from rows that others' gradients do not reach: a detached gather."""

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows = [Rows(mine, place.received(view, mine).detach()) for view, mine in enumerate((a, b))]
        return dense_loss(find("nt_xent"), rows[0], rows[1], place.mine.start, place.settings)

    return loss


@pytest.mark.parametrize("wrong", [wrong_by_a_mask, wrong_in_the_gradient_alone])
def test_a_contender_that_computes_something_else_is_refused(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def contenders(place: OneRank) -> Iterator[tuple[str, str, Loss]]:
        yield "rival", "wrong", wrong(place)  # type: ignore[operator]

    monkeypatch.setattr(contrast, "_contenders", contenders)
    with pytest.raises(UnequalError, match="rival differs"):
        contrast.beside("nt_xent", 16, 64, TINY, CPU, silent)


def test_ours_with_wrong_shifts_of_other_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OneRank.with_computed_shifts
    monkeypatch.setattr(
        OneRank, "with_computed_shifts", lambda self: replace(made := honest(self), shifts=tuple(t + 1 for t in made.shifts))
    )
    with pytest.raises(UnequalError, match="log_sum_exp differs"):
        contrast.beside("nt_xent", 16, 64, TINY, CPU, silent)


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    printed = capsys.readouterr().out
    for word in ("contrast", "gather", "step", "ratio_to", "floor_s", "interquartile", "--quick"):
        assert word in printed
