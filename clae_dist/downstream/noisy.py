"""A classifier on labels of which some are wrong: a frozen encoder that never learned from them tells which to believe.

In the manner of Feng et al. 2023 (CLIP-guided sample selection) and DivideMix (Li et al. 2020), and neither of them: the second
expert is the pretrained encoder itself with one prototype a class, one network is trained instead of two, without MixUp.

# B rows on this rank, N rows on all ranks, M training images, C classes, F feature width
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, State, Terms
from clae_dist.downstream.task import TaskSettings, cross_entropy_each
from clae_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack
    from clae_dist.config.method import TrainingSet
    from clae_dist.contrast.interface import Step

_TEMPERATURE = 0.1  # of cosines to prototypes
_SHARPEN = 0.5  # temperature of guessed labels (DivideMix)


@dataclass(frozen=True)
class NoisySettings(TaskSettings):
    """The keys `method.*` of the task `noisy`."""

    title: ClassVar[str] = "classifier on noisy labels"
    name: str = name_of("noisy")
    images: int = setting(0, ge=0, help="Images of the training set. `clae finetune` takes their number from the set.")
    warmup_epochs: int = setting(
        5, ge=1, help="Epochs in which all labels are believed; after each later one it is decided again which are."
    )

    @property
    def key_decay(self) -> float:
        """The second expert is the encoder as the run began."""
        return 1.0

    def check_set(self, of_set: TrainingSet) -> None:
        super().check_set(of_set)
        if self.images != of_set.images:
            raise ConfigError(f"method.images is {self.images}, but {of_set.where} has {of_set.images}; name their number.")

    def for_few_rows(self, global_size: int) -> Self:
        return replace(super().for_few_rows(global_size), images=global_size)

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float | None:
        return {-1: 4.0, 0: 2.0}.get(self.blocks)


class Noisy(Method):
    """The cross-entropy with w · y + (1 - w) · p̄: w is the probability that label y is right, p̄ a sharpened guess.

    w is the posterior of a mixture of two Gaussians of (scaled loss, share of y by the frozen encoder's prototypes) over all
    images, fitted after every epoch; until method.warmup_epochs it is 1. p̄ is the mean of both experts' probabilities.
    Prototypes are means of unit features over an epoch, in which images weigh w.
    """

    Settings = NoisySettings
    settings: NoisySettings

    def state(self, embedding_dim: int, seed: int) -> State:
        import torch

        images, classes = max(1, self.settings.images), self.settings.classes
        return {
            "belief": torch.ones(images),
            "loss": torch.zeros(images),
            "share": torch.zeros(images),
            "guess": torch.full((images,), -1),
            "prototypes": torch.zeros(classes, embedding_dim),
            "sums": torch.zeros(classes, embedding_dim),
        }

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        import torch.nn.functional as F

        frozen = s.embed_constant(x, momentum=True)
        logits = s.classify(x)
        labels_B, ids_B = s.labels, s.ids.to(x.device, non_blocking=True)
        known = labels_B.clamp_min(0)
        wanted = F.one_hot(known, self.settings.classes).to(logits)
        frozen_p = self._shares(s, F.normalize(frozen.mine, dim=1))
        own_p = logits.detach().softmax(1)
        guess = ((own_p + frozen_p) / 2) ** (1 / _SHARPEN)
        guess = guess / guess.sum(1, keepdim=True)
        belief = s.state["belief"][ids_B % len(s.state["belief"])][:, None].to(logits)
        target = belief * wanted + (1 - belief) * guess
        each = -(target * logits.log_softmax(1)).sum(1) * (labels_B >= 0)
        of_label = cross_entropy_each(logits.detach(), labels_B)
        share = frozen_p.gather(1, known[:, None])[:, 0]
        s.kept |= {
            "ids": s.everyones(ids_B),
            "labels": s.everyones(labels_B),
            "loss": s.everyones(of_label),
            "share": s.everyones(share),
            "guess": s.everyones(guess.argmax(1)),
            "features": F.normalize(frozen.all, dim=1),
        }
        return {"clean": (1.0, each.mean())}

    def _shares(self, s: Step, features: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, C) of the classes by the prototypes; equal ones while there are none."""
        return (features @ s.state["prototypes"].to(features).T / _TEMPERATURE).softmax(1)

    def after_update(self, s: Step) -> None:
        import torch.nn.functional as F

        kept, state = s.kept, s.state
        labelled = (kept["labels"] >= 0).to(state["loss"])
        ids = kept["ids"] % len(state["belief"])
        for name in ("loss", "share", "guess"):
            state[name][ids] = kept[name].to(state[name].dtype)
        weight = (state["belief"][ids] * labelled)[:, None]
        state["sums"].index_add_(0, kept["labels"].clamp_min(0), weight * kept["features"].to(state["sums"]))
        done = s.step + 1
        if done % s.steps(1):
            return
        state["prototypes"].copy_(F.normalize(state["sums"], dim=1))
        state["sums"].zero_()
        if done >= s.steps(self.settings.warmup_epochs):
            seen = [state[name].double().cpu() for name in ("loss", "share")]
            state["belief"].copy_(s.decided(lambda: believed(*seen)))


def believed(loss_M: torch.Tensor, share_M: torch.Tensor) -> torch.Tensor:
    """The probability (M,) that each label is right: the posterior of the component with the lower loss, of a mixture of two
    Gaussians of (scaled loss, share). All ones if the components do not differ (`_ALIKE`).

    Args:
        loss_M: cross-entropies of the given labels.
        share_M: probabilities of the given labels by the second expert.
    """
    import numpy as np
    import torch
    from sklearn.mixture import GaussianMixture

    low, high = float(loss_M.min()), float(loss_M.max())
    scaled = (loss_M - low) / (high - low) if high > low else torch.zeros_like(loss_M)
    rows = np.stack([scaled.numpy(), share_M.numpy()], 1)
    mixture = GaussianMixture(2, max_iter=100, tol=1e-3, reg_covar=5e-4, random_state=0).fit(rows)
    right = int(np.argmin(mixture.means_[:, 0] - mixture.means_[:, 1]))
    difference = mixture.means_[right] - mixture.means_[1 - right]
    spread = np.sqrt(sum(np.diagonal(one) for one in mixture.covariances_) / 2)
    if np.abs(difference / spread).max() < _ALIKE:
        return torch.ones_like(loss_M)
    return torch.from_numpy(mixture.predict_proba(rows)[:, right])


_ALIKE = 2.0  # standard deviations between the means below which two components are one
