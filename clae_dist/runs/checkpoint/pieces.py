"""Parts of tensors in a checkpoint, each held by one or more ranks, and full tensors by name.

Names: model/PARAMETER or BUFFER, optimizer/PARAMETER/exp_avg (and the like), average/PARAMETER.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of the flattened tensor `name`, from `start` on; `holders` are all ranks that hold them.

    `tensor` is either the full tensor in its shape, or a part as one row, which may be empty.
    `changes_in_forward`: a forward may write to it, as to running statistics; other tensors change in an update only.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: torch.Tensor
    holders: tuple[int, ...]
    changes_in_forward: bool = False


@dataclass(frozen=True)
class Place:
    """The position of a rank's part in the flattened tensor, and the ranks that hold the same part."""

    shape: tuple[int, ...]
    start: int
    length: int
    holders: tuple[int, ...]

    def piece(self, name: str, part: torch.Tensor, *, changes_in_forward: bool = False) -> Piece:
        """`part`, which may be padded at its end, as a piece of `name`."""
        tensor = part.detach() if self._is_all(part) else part.detach().view(-1)[: self.length]
        return Piece(name, self.shape, self.start, tensor, self.holders, changes_in_forward)

    @torch.no_grad()
    def fill(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Copy this rank's part of the full tensor into `part`."""
        assert whole.shape == self.shape, f"shape {tuple(whole.shape)}, expected {self.shape}"
        if self._is_all(part):
            part.copy_(whole)
        else:
            part.view(-1)[: self.length].copy_(whole.reshape(-1)[self.start : self.start + self.length])

    def _is_all(self, part: torch.Tensor) -> bool:
        return part.shape == self.shape and self.length == part.numel()  # the shape alone may be of one element's padding


def share_of(pieces: Sequence[Piece], rank: int) -> list[Piece]:
    """The pieces that `rank` writes. Replicated pieces are divided among their holders by bytes; each is written once.

    All holders of a piece compute the same division without communication, since they hold the same replicated pieces.
    """
    loads: dict[tuple[int, ...], dict[int, int]] = {}
    assigned = set()
    for i in sorted(range(len(pieces)), key=lambda i: (-pieces[i].tensor.nbytes, i)):
        piece = pieces[i]
        load = loads.setdefault(piece.holders, dict.fromkeys(piece.holders, 0))
        writer = min(load, key=lambda holder: (load[holder], holder))
        load[writer] += piece.tensor.nbytes
        if writer == rank and (piece.tensor.numel() or 0 in piece.shape):
            assigned.add(i)
    return [piece for i, piece in enumerate(pieces) if i in assigned]


class StateSection(Mapping[str, torch.Tensor]):
    """A section of the tensors of a mapping, under shorter names; each is read on access."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: dict[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def sections(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """{"model": {name: tensor}, "optimizer": {parameter: {"exp_avg": tensor, …}}, "average": {name: tensor},
    "method": {name: tensor}, "keys": {name: tensor}}; the last two only where the method has a state or a momentum encoder.

    The average, if any, has the model's names: buffers, which are not averaged, are the model's own.
    """
    model: dict[str, str] = {}
    average: dict[str, str] = {}
    others: dict[str, dict[str, str]] = {"method": {}, "keys": {}}
    optimizer: dict[str, dict[str, str]] = {}
    for name in tensors:
        section, _, rest = name.partition("/")
        if section == "model":
            model[rest] = name
        elif section == "average":
            average[rest] = name
        elif section in others:
            others[section][rest] = name
        elif section == "optimizer":
            parameter, _, key = rest.rpartition("/")
            optimizer.setdefault(parameter, {})[key] = name
    state: dict[str, Any] = {
        "model": StateSection(tensors, model),
        "optimizer": {parameter: StateSection(tensors, keys) for parameter, keys in optimizer.items()},
    }
    state |= {section: StateSection(tensors, names) for section, names in others.items() if names}
    if average:
        state["average"] = StateSection(tensors, {**model, **average})
    return state
