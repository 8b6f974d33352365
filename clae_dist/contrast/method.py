"""Base class of the methods: what one training step minimises, written as the paper's algorithm.

Nothing here imports torch, and neither do the files of methods/ when they are imported: settings are read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from clae_dist.config import MethodSettings

if TYPE_CHECKING:
    import torch

    from clae_dist.contrast.interface import Step

Terms = dict[str, "tuple[float, torch.Tensor]"]  # name -> (weight, loss of this rank's anchors)


class Method:
    """A pretraining method. Subclasses set `Settings` and write `losses`."""

    Settings: ClassVar[type[MethodSettings]] = MethodSettings

    def __init__(self, settings: MethodSettings) -> None:
        self.settings = settings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        """The terms of the loss for two views (B, 3, S, S) of this rank's images. Collective.

        Every rank must return the same names in the same order, with the same weights. The first term is the one between
        clean views, if there is one; it is logged as `loss_NAME` like the others.
        """
        raise NotImplementedError

    def from_the_start(self) -> Method:
        """The same method with every term present from the first step (see MethodSettings.from_the_start)."""
        return type(self)(self.settings.from_the_start())
