"""Frozen features of an evaluation set.

# b  images of a batch, N images of a set (or of this rank's share), F width of the encoder's output
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.world import World


@dataclass(frozen=True)
class Features:
    """Features (N, F) float32, labels (N,) int64 (-1: none) and ids (N,) int64 of the same images, on the CPU."""

    features_NF: torch.Tensor  # noqa: N815 - dimensions
    labels_N: torch.Tensor  # noqa: N815
    ids_N: torch.Tensor  # noqa: N815

    def __len__(self) -> int:
        return self.features_NF.shape[0]

    def rows(self, rows: torch.Tensor) -> Features:
        """The features of some rows, in their order."""
        return Features(self.features_NF[rows], self.labels_N[rows], self.ids_N[rows])

    def choice(self, count: int, seed: int) -> Features:
        """`count` images chosen by `seed`, in the order of rows; all if there are no more, or for 0."""
        if not 0 < count < len(self):
            return self
        return self.rows(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values)

    @property
    def labelled(self) -> bool:
        """True if every image has a label."""
        return len(self) > 0 and bool((self.labels_N >= 0).all())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is back in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def extract(
    model: nn.Module,
    evaluation_set: EvaluationSet,
    device: torch.device | str,
    batch_size: int,
    start: int = 0,
    step: int = 1,
) -> Features:
    """Features of every `step`-th batch of a set, starting at batch `start`.

    The model runs in evaluation mode (running statistics, no gradient) and is returned to the modes it had. With
    start = rank and step = world size the ranks share the set, and `gather` joins their shares.

    Args:
        model: a PretrainModel on `device`.
    """
    return extract_each([model], evaluation_set, device, batch_size, start, step)[0]


def extract_each(
    models: Sequence[nn.Module],
    evaluation_set: EvaluationSet,
    device: torch.device | str,
    batch_size: int,
    start: int = 0,
    step: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Features]:
    """`extract` for several models on the same pixels: every image is read and decoded once.

    `progress` is called with the number of images of each batch.
    """
    features: list[list[torch.Tensor]] = [[torch.zeros((0, int(model.feature_dim)))] for model in models]  # type: ignore[arg-type]
    labels, ids = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]  # a rank may get no batch
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(frozen(model))
        for images_b3SS, labels_b, ids_b, *_ in evaluation_set.batches(batch_size, start, step):
            on_device = torch.as_tensor(images_b3SS).to(device)
            for model, parts in zip(models, features, strict=True):
                pixels = on_device.to(_dtype(model)) / 255
                parts.append(model.features(pixels).float().cpu())  # type: ignore[operator]
            labels.append(torch.as_tensor(labels_b).long().cpu())
            ids.append(torch.as_tensor(ids_b).long().cpu())
            if progress:
                progress(len(ids[-1]))
    return [Features(torch.cat(parts), torch.cat(labels), torch.cat(ids)) for parts in features]


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def gather(share: Features, world: World) -> Features:
    """Join the shares of all ranks, in the order of ids. Collective."""
    return _joined(world.gather_objects(_columns(share)))


def gather_on_main(share: Features, world: World) -> Features | None:
    """`gather` on rank 0, None elsewhere. Collective."""
    shares = world.gather_on_main(_columns(share))
    return _joined(shares) if shares else None


def _columns(share: Features) -> tuple[np.ndarray, ...]:
    return tuple(tensor.numpy() for tensor in (share.features_NF, share.labels_N, share.ids_N))


def _joined(shares: list[tuple[np.ndarray, ...]]) -> Features:
    """One copy of the features, row by row in its place."""
    labels, ids = (torch.from_numpy(np.concatenate([share[column] for share in shares])) for column in (1, 2))
    order = torch.argsort(ids, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    features = torch.empty((len(ids), shares[0][0].shape[1]), dtype=torch.from_numpy(shares[0][0]).dtype)
    for (share, *_), rows in zip(shares, places.split([len(share[2]) for share in shares]), strict=True):
        features[rows] = torch.from_numpy(share)
    return Features(features, labels[order], ids[order])
