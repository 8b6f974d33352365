"""Base class of the methods: what one training step minimises, written as the paper's algorithm.

Nothing here imports torch, and neither do the files of methods/ when they are imported: settings are read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from clae_dist.config import MethodSettings

if TYPE_CHECKING:
    import torch

    from clae_dist.contrast.interface import Step

State = dict[str, "torch.Tensor"]  # name -> a tensor that every rank has
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

    def state(self, embedding_dim: int, seed: int) -> State:
        """Tensors that outlive a step, such as a queue of keys, as they are at the start of a run: a function of the arguments.

        Every rank has them, equal; steps read them (`Step.state`) and `after_update` changes them in place. They are saved in
        checkpoints, and a run resumes with them on any number of ranks.
        """
        return {}

    def after_update(self, s: Step) -> None:
        """Change `s.state`, the same on every rank. Called after every update of the weights, and not after a skipped step."""

    def from_the_start(self) -> Method:
        """The same method with every term present from the first step (see MethodSettings.from_the_start)."""
        return type(self)(self.settings.from_the_start())
