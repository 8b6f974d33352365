"""What a checkpoint is made of: runs of whole tensors, each held by one or more ranks, and the whole tensors by name.

Names: model/PARAMETER or BUFFER, optimizer/PARAMETER/exp_avg (and the like), average/PARAMETER.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Piece:
    """Elements `start` … of the whole tensor `name`, laid out in a row; `holders` are all ranks that hold the same ones.

    `tensor`, in whatever layout, has them in this order: a whole tensor in its shape, a part as one row (which may be empty).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: torch.Tensor
    holders: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a rank's part of a tensor lies in the whole, laid out in a row, and which ranks hold the same part."""

    shape: tuple[int, ...]
    start: int
    length: int
    holders: tuple[int, ...]

    def piece(self, name: str, part: torch.Tensor) -> Piece:
        """`part`, which may have padding behind its elements, as a piece of `name`."""
        held = part.detach()
        return Piece(name, self.shape, self.start, held if self._is_all(part) else held.view(-1)[: self.length], self.holders)

    @torch.no_grad()
    def fill(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """This rank's part, of a whole tensor."""
        assert whole.shape == self.shape, f"{tuple(whole.shape)} where {self.shape} belongs"
        if self._is_all(part):
            part.copy_(whole)
        else:
            part.view(-1)[: self.length].copy_(whole.reshape(-1)[self.start : self.start + self.length])

    def _is_all(self, part: torch.Tensor) -> bool:
        return part.shape == self.shape and self.length == part.numel()  # the shape alone may be of one element's padding


def share_of(pieces: Sequence[Piece], rank: int) -> list[Piece]:
    """Which of its pieces `rank` writes: what several ranks hold is shared among them by bytes, each piece written once.

    All holders of a piece come to the same answer without asking, since they hold the same of what they share.
    """
    loads: dict[tuple[int, ...], dict[int, int]] = {}
    mine = set()
    for i in sorted(range(len(pieces)), key=lambda i: (-pieces[i].tensor.nbytes, i)):
        piece = pieces[i]
        load = loads.setdefault(piece.holders, dict.fromkeys(piece.holders, 0))
        writer = min(load, key=lambda holder: (load[holder], holder))
        load[writer] += piece.tensor.nbytes
        if writer == rank and (piece.tensor.numel() or 0 in piece.shape):
            mine.add(i)
    return [piece for i, piece in enumerate(pieces) if i in mine]


class StateSection(Mapping[str, torch.Tensor]):
    """Some of the tensors of a mapping, under shorter names; each is read when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: dict[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def sections(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """{"model": {name: tensor}, "optimizer": {parameter: {"exp_avg": tensor, …}}, "average": {name: tensor}}.

    The average, if any, has the model's names: buffers, which are not averaged, are the model's own.
    """
    model: dict[str, str] = {}
    average: dict[str, str] = {}
    optimizer: dict[str, dict[str, str]] = {}
    for name in tensors:
        section, _, rest = name.partition("/")
        if section == "model":
            model[rest] = name
        elif section == "average":
            average[rest] = name
        elif section == "optimizer":
            parameter, _, key = rest.rpartition("/")
            optimizer.setdefault(parameter, {})[key] = name
    found: dict[str, Any] = {
        "model": StateSection(tensors, model),
        "optimizer": {parameter: StateSection(tensors, keys) for parameter, keys in optimizer.items()},
    }
    if average:
        found["average"] = StateSection(tensors, {**model, **average})
    return found
