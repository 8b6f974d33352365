"""Judgement of a loss that gathers by itself: is it the loss and the gradient of one process, and if not, which mistake is it?

DDP and FSDP average gradients over ranks. So the gradient of a rank's rows has to be W times that of the one process, where all
rows are one batch: rows of other ranks' losses have sent theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

# Relative, of value and gradient: rounding of float64, or of a loss that returns float32 or less.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
_SAME_MISTAKE = 1e-3  # relative distance to a known mistake's gradient, which itself comes from differences
_COARSE = 3e-2  # the same where those are of a loss in float32 or less


class Measured(NamedTuple):
    """Of one rank. Slopes are by central differences of the forward pass, so they hold whatever the backward pass does."""

    value: torch.Tensor
    gradient: torch.Tensor  # (2B, D), by autograd
    own: torch.Tensor  # slope of this rank's loss
    everyone: torch.Tensor  # slope of the sum of all ranks' losses
    constant: torch.Tensor  # slope of this rank's loss where gathered rows are constants


@dataclass(frozen=True)
class LossParity:
    """The result of `clae parity --loss`, printed by --json. `scale`, `cosine`: of the gradient against the right one."""

    loss: str
    world_size: int
    rows: int  # a rank and view
    dtype: str  # of the value that the loss returns
    value: float  # mean over ranks
    value_alone: float  # of one process on all rows
    value_difference: float  # relative
    gradient_difference: float  # relative, of the largest element
    scale: float
    cosine: float
    passed: bool
    mistake: str  # the known one that it matches, or ""
    cause: str

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)


_CAUSES = {
    "": "the gradient matches no mistake that is known here",
    "wrong value": "the value differs: rows are paired with wrong positives (the offset of a rank's rows), the sum is divided "
    "by a wrong number, or a mean, weight or statistic is that of this rank's rows",
    "nothing gathered": "the value is that of each rank alone: other ranks' rows are not among the negatives. Gather rows, "
    "with a gradient, before the similarities",
    "detached": "gathered rows are constants, a rank's own among them: torch.distributed.all_gather has no gradient. A row "
    "learns as an anchor only, never as another's positive or negative. If that is meant, use --stop-gradient",
    "own rows only": "a rank's own rows are put back among the gathered ones, and nothing comes back from other ranks: the "
    "gather's backward has to sum gradients over ranks (reduce-scatter)",
    "too small": "the direction is right, the length is not: every rank computes the whole loss, with a gradient for its own "
    "rows alone, and the backend then averages. Let each rank's loss be the mean over its own anchors, or sum over "
    "ranks in the gather's backward",
    "too large": "the direction is right, the length is not: ranks are summed twice, in the loss or in the gather's backward, "
    "which has to sum once, since the backend averages",
    "own slot of an all-reduce": "the gather's backward sums each rank's own slot over ranks, and those are different rows. "
    "All-reduce the gradient of all slots, then take your own",
}


def judge(loss: str, dtype: str, one: Measured, many: Sequence[Measured], *, stop_gradient: bool = False) -> LossParity:
    """Compare W ranks with one process that has all rows.

    Right is the one process's gradient by autograd, or its slope where the two differ: a gather without a gradient has none in
    one process either. With `stop_gradient` the loss holds rows constant on purpose, and autograd is right.
    """
    size, rows = len(many), len(many[0].gradient) // 2
    honest = stop_gradient or _apart(one.gradient, one.own) < (_SAME_MISTAKE if dtype == "float64" else _COARSE)
    right = one.gradient if honest else one.own
    right = torch.cat([view.chunk(size)[rank] for rank in range(size) for view in right.chunk(2)]) * size
    found = torch.cat([rank.gradient for rank in many])
    value = torch.stack([rank.value for rank in many]).mean()
    tolerance = TOLERANCE.get(dtype, TOLERANCE["float32"])
    value_difference = float((value - one.value).abs() / one.value.abs().clamp(min=1e-12))
    gradient_difference = _apart(found, right)
    wrong_value, wrong_gradient = not value_difference <= tolerance, not gradient_difference <= tolerance
    scale = float((found * right).sum() / right.square().sum())
    cosine = float((found * right).sum() / (found.norm() * right.norm()).clamp(min=1e-300))
    mistake = _mistake(many, found, right, wrong_value=wrong_value) if wrong_value or wrong_gradient else ""
    cause = ""
    if wrong_value or wrong_gradient:
        cause = _CAUSES[mistake]
    return LossParity(
        loss=loss,
        world_size=size,
        rows=rows,
        dtype=dtype,
        value=float(value),
        value_alone=float(one.value),
        value_difference=value_difference,
        gradient_difference=gradient_difference,
        scale=scale,
        cosine=cosine,
        passed=not (wrong_value or wrong_gradient),
        mistake=mistake,
        cause=cause,
    )


def _apart(found: torch.Tensor, other: torch.Tensor) -> float:
    return float((found - other).abs().max() / other.abs().max().clamp(min=1e-300))


def _mistake(many: Sequence[Measured], found: torch.Tensor, right: torch.Tensor, *, wrong_value: bool) -> str:
    """The known mistake whose gradient is `found`, or ""."""
    own, everyone, constant = (torch.cat([getattr(rank, name) for rank in many]) for name in Measured._fields[2:])
    if wrong_value:
        return "nothing gathered" if max(_apart(everyone, own), _apart(constant, own)) < _SAME_MISTAKE else "wrong value"
    scale = float((found * right).sum() / right.square().sum())
    if scale and _apart(found, scale * right) < _SAME_MISTAKE:
        return "too small" if scale < 1 else "too large"
    if _apart(found, constant) < _SAME_MISTAKE and _apart(own, constant) > _SAME_MISTAKE:
        return "detached"
    if _apart(found, own) < _SAME_MISTAKE:
        return "own rows only"
    mixed = sum(rank.own - rank.constant for rank in many)
    if _apart(found, torch.cat([rank.constant + mixed for rank in many])) < _SAME_MISTAKE:
        return "own slot of an all-reduce"
    return ""


def table(parity: LossParity) -> Iterator[str]:
    """Lines for people."""
    yield f"{parity.loss}: {parity.world_size} ranks of {parity.rows} images against one process ({parity.dtype})"
    yield f"  {'':<22}{'relative difference':>20}"
    yield f"  {'value':<22}{parity.value_difference:>20.2e}   {parity.value:.6f}, alone {parity.value_alone:.6f}"
    shape = f"scale {parity.scale:.4f}, cosine {parity.cosine:.6f}"
    yield f"  {'gradient of the rows':<22}{parity.gradient_difference:>20.2e}   {shape}"
    yield f"parity: {'passed' if parity.passed else 'FAILED'}"
    if parity.cause:
        yield f"known mistake: {parity.mistake or 'none'}; {parity.cause}."
