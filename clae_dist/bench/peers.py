"""Losses that ours are compared with: plainly written dense cross-entropy, and those of other packages, if installed.

# B rows on this rank, N rows on all ranks, D embedding width. a, b the two views.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # this rank's rows of both views -> a scalar
Gather = Callable[[torch.Tensor], Sequence[torch.Tensor]]  # this rank's rows -> those of each rank

PACKAGES = {"lightly": "lightly", "open_clip": "open_clip_torch"}


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def missing() -> list[str]:
    """A line for each package that is not installed."""
    return [
        f"{package} is not installed; pip install {package}" for module, package in PACKAGES.items() if not is_installed(module)
    ]


@contextmanager
def quietly() -> Iterator[None]:
    """Context that suppresses the warnings of other packages."""
    with warnings.catch_warnings(action="ignore"):
        yield


def dense_nt_xent(gather: Gather, rank: int, temperature: float) -> Loss:
    """NT-Xent by torch's cross-entropy on all logits: (B, 2N) of each view at once."""

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        views = (a, b)
        everyone = [torch.cat(list(gather(view))) for view in views]
        images = torch.arange(len(a), device=a.device)
        halves = []
        for number in range(2):
            logits = views[number] @ torch.cat([everyone[1 - number], everyone[number]]).T / temperature
            logits[images, len(everyone[0]) + rank * len(a) + images] = -torch.inf  # a row is not its own negative
            halves.append(F.cross_entropy(logits, rank * len(a) + images))
        return (halves[0] + halves[1]) / 2

    return loss


def dense_instance(gather: Gather, rank: int, temperature: float) -> Loss:
    """Instance discrimination across views, both directions, by torch's cross-entropy on all logits: (B, N) twice."""

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        all_a, all_b = torch.cat(list(gather(a))), torch.cat(list(gather(b)))
        images = rank * len(a) + torch.arange(len(a), device=a.device)
        of_a = F.cross_entropy(a @ all_b.T / temperature, images)
        return (of_a + F.cross_entropy(b @ all_a.T / temperature, images)) / 2

    return loss


def lightly_nt_xent(temperature: float) -> Loss:
    """lightly's NTXentLoss(gather_distributed=True)."""
    with quietly():
        from lightly.loss import NTXentLoss

    made: Any = NTXentLoss(temperature=temperature, gather_distributed=True)
    return lambda a, b: made(a, b)


def open_clip_loss(temperature: float, rank: int, world_size: int) -> Loss:
    """open_clip's ClipLoss(local_loss=True, gather_with_grad=True): instance discrimination in both directions."""
    with quietly():
        from open_clip import ClipLoss

    made: Any = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world_size)
    return lambda a, b: made(a, b, 1 / temperature)
