"""AdvCL: two views, a high-pass view and an adversarial view of the image, each contrasted with all others.

With `pseudo_labels`, linear classifiers learn the clusters of another encoder's features, on adversarial images of their own.

Reference: Fan et al. 2021, When does contrastive learning preserve adversarial robustness from pretraining to finetuning?, and
its code. With `asymmetry` and `tau_plus`: A-InfoNCE (Yu et al. 2022, Adversarial contrastive learning via asymmetric InfoNCE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from clae_dist.config.method import Route, ThirdView, name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, State, Terms
from clae_dist.errors import ConfigError
from clae_dist.methods.views import HardSettings
from clae_dist.objectives.multi_view import ViewPairs, every_pair

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack, Config
    from clae_dist.contrast.interface import Step
    from clae_dist.objectives.form import Rows

_CLUSTERS = (2, 10, 50, 100, 500)  # of AdvCL's code, also for CIFAR-10
_BASE_TEMPERATURE = 0.07  # SupCon's, which its code divides by: part of the published learning rate


@dataclass(frozen=True)
class AdvClSettings(HardSettings):
    """The keys `method.*` of AdvCL."""

    title: ClassVar[str] = "AdvCL"
    third_view: ClassVar[ThirdView] = "weak"
    evaluated_route: ClassVar[Literal["clean", "adversarial"]] = "adversarial"
    name: str = name_of("advcl")
    radius: float = setting(8.0, ge=0, zero="the whole image", help="Frequencies below it are not in the high-pass view.")
    asymmetry: float = setting(
        -1.0,
        ge=-1,
        le=1,
        hint="-1 is AdvCL itself; A-InfoNCE has 0.2",
        help="Share of the pairs with the adversarial view that move the clean one; columns are then constants. -1: AdvCL.",
    )
    adversarial_weight: float = setting(
        1.0, ge=0, used_by="method.asymmetry", help="Weight of the pairs with the adversarial view (A-InfoNCE)."
    )

    adaptive_epochs: int = setting(
        0,
        ge=0,
        zero="constant asymmetry",
        used_by="method.asymmetry",
        help="Epochs after which the asymmetry becomes 1/2 where attacks move the features little (A-InfoNCE has 30).",
    )
    min_distance: float = setting(
        0.4, ge=0, used_by="method.adaptive_epochs", help="Mean distance of attacked features at which the asymmetry is 1/2."
    )

    pseudo_labels: str = setting(
        "",
        zero="no cross-entropy",
        help="A run or an exported encoder, by whose features the training images are clustered when the run begins: a "
        "cross-entropy with the clusters is added to the loss.",
    )
    pseudo_weight: float = setting(
        0.2, ge=0, zero="no cross-entropy", used_by="method.pseudo_labels", help="Weight of the cross-entropy."
    )

    @property
    def clusters_from(self) -> str:
        return self.pseudo_labels if self.pseudo_weight else ""

    @property
    def cluster_counts(self) -> tuple[int, ...]:
        return _CLUSTERS if self.clusters_from else ()

    @property
    def routes(self) -> tuple[Route, ...]:
        return (*super().routes, "classified") if self.clusters_from else super().routes

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        classified = 3 + 2 * attack.num_steps if self.clusters_from else 0
        return 15 + 2 * attack.num_steps + 2 * (self.adaptive_epochs > 0) + classified

    def check_run(self, config: Config) -> None:
        super().check_run(config)
        if self.adaptive_epochs and self.asymmetry < 0:
            raise ConfigError(
                f"method.adaptive_epochs is {self.adaptive_epochs}, but method.asymmetry is {self.asymmetry:g}, which is AdvCL "
                "itself; set method.asymmetry, such as 0.2, or remove method.adaptive_epochs."
            )

    def describe_attack(self) -> str:
        adaptive = f", adaptive after {self.adaptive_epochs} epochs" if self.adaptive_epochs else ""
        pseudo = f", pseudo-labels of {self.pseudo_labels} with weight {self.pseudo_weight:g}" if self.clusters_from else ""
        return f", high-pass radius {self.radius:g}" + self.describe_pairs(self.asymmetry) + adaptive + pseudo

    def pairs(self, asymmetry: float) -> ViewPairs:
        """The pairs of views (adversarial, x, y, high-pass)."""
        pairs = dict(every_pair(4, 1 / 12))
        if asymmetry < 0:
            return ViewPairs(live=pairs, hard=self.hard)
        live = {pair: weight for pair, weight in pairs.items() if 0 not in pair}
        towards, away = (2 * self.adversarial_weight / 12 * share for share in (asymmetry, 1 - asymmetry))
        constant = {(view, 0): towards for view in (1, 2, 3)} | {(0, view): away for view in (1, 2, 3)}
        return ViewPairs(live, constant, self.hard)


class AdvCl(Method):
    """The mean over the ordered pairs of (x_adv, x, y, high-pass of o) of each view's loss, all views in the denominators.

    o is the weakly augmented image, and x_adv raises the same loss (without A-InfoNCE's changes) within ε of o. With
    pseudo-labels: + w · the mean over clusterings of the cross-entropy of x_ce, which raises that within ε of o.
    """

    Settings = AdvClSettings
    settings: AdvClSettings

    def state(self, embedding_dim: int, seed: int) -> State:
        """With an adaptive asymmetry: the sum of the first epochs' mean distances, and their number."""
        import torch

        return {"distances": torch.zeros(2)} if self.settings.adaptive_epochs else {}

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        sharp = high_pass(s.third, self.settings.radius)
        plain = ViewPairs(live=every_pair(4, 1 / 12))
        with s.attack_forwards():
            others = [s.embed_constant(view) for view in (x, y, sharp)]

        def loss(views: Sequence[Rows]) -> torch.Tensor:
            return s.contrast_views([*views, *others], plain)

        (x_adv,) = s.attack_views([s.third], loss, noise_of=2)
        pairs = self.settings.pairs(self._asymmetry(s, x_adv))
        *clean, attacked = s.embed_views(x, y, sharp, adversarial=[x_adv])
        views = [attacked, *clean]
        classified = self._cross_entropy(s)
        return {"four_views": (s.temperature / _BASE_TEMPERATURE, s.contrast_views(views, pairs)), **classified}

    def _cross_entropy(self, s: Step) -> Terms:
        """The term of the pseudo-labels; {} without them."""
        settings = self.settings
        if not settings.clusters_from:
            return {}
        labels_BK = s.pseudo_labels

        def loss(logits: torch.Tensor) -> torch.Tensor:
            return cross_entropy(logits, labels_BK, settings.cluster_counts)

        x_ce = s.attack_logits(s.third, loss, noise_of=0)
        return {"pseudo_labels": (settings.pseudo_weight, loss(s.classify(x_ce, "classified")))}

    def after_update(self, s: Step) -> None:
        if s.epoch < self.settings.adaptive_epochs:
            s.state["distances"] += s.kept["distances"]

    def _asymmetry(self, s: Step, x_adv: torch.Tensor) -> float:
        """The asymmetry of this step, by how far the attack moves the clean route's features over the global batch."""
        import torch

        settings = self.settings
        if not settings.adaptive_epochs:
            return settings.asymmetry
        distance = s.everyones((s.features(x_adv) - s.features(s.third)).norm(dim=1)).mean()
        s.kept["distances"] = torch.stack([distance, torch.ones_like(distance)])
        total, count = s.state["distances"].tolist()
        if s.epoch < settings.adaptive_epochs or not count:
            return settings.asymmetry
        return adapted(settings.asymmetry, distance.item(), total / count, settings.min_distance)


def cross_entropy(logits: torch.Tensor, labels_BK: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The mean over images and K clusterings of the cross-entropy; a label of -1 counts as 0.

    Args:
        logits: (B, Σ counts), of each clustering in turn.
    """
    import torch.nn.functional as F

    each = zip(logits.split(tuple(counts), 1), labels_BK.unbind(1), strict=True)
    sums = [F.cross_entropy(part, labels_B, ignore_index=-1, reduction="sum") for part, labels_B in each]
    return sum(sums[1:], sums[0]) / (len(logits) * len(counts))


def adapted(asymmetry: float, distance: float, usual: float, least: float) -> float:
    """`asymmetry` for distances from `usual` on, 1/2 up to `least`, and linear in between (A-InfoNCE's code)."""
    if distance >= usual:
        return asymmetry
    share = 1.0 if distance <= least else (usual - distance) / (usual - least)
    return asymmetry + share * (0.5 - asymmetry)


def high_pass(images: torch.Tensor, radius: float) -> torch.Tensor:
    """The images without the frequencies closer than `radius` to 0, in cycles per image side. Not clipped. (B, 3, S, S)"""
    import torch

    side = images.shape[-1]
    cycles = torch.fft.fftfreq(side, d=1 / side, device=images.device, dtype=images.dtype)
    low = cycles[:, None].square() + cycles[None, :].square() < radius**2
    return torch.fft.ifft2(torch.fft.fft2(images).masked_fill(low, 0)).real
