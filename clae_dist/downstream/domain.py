"""Adversarial transfer between domains: labels of a source serve a target without labels (DANN, CDAN, CDAN+E).

The adversary is a network that tells the domains apart by their features, and no attack on pixels.

References: Ganin et al. 2016, Domain-adversarial training of neural networks; Long et al. 2018, Conditional adversarial domain
adaptation. The domain head has LayerNorm where public code has BatchNorm, so that no row depends on those of its rank.

# B rows on this rank, of which every second one is of the target; C classes, F feature width
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, Terms
from clae_dist.downstream.task import TaskSettings, cross_entropy_each
from clae_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from clae_dist.config import Attack
    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class DomainSettings(TaskSettings):
    """The keys `method.*` of the task `domain`."""

    title: ClassVar[str] = "domain-adversarial classifier"
    pairs_sets: ClassVar[bool] = True
    name: str = name_of("domain")
    form: Literal["dann", "cdan", "cdan_e"] = setting(
        "dann",
        help="What the domain head sees: features (dann), or their products with the predicted probabilities (cdan); cdan_e: "
        "images with a sure prediction also count more.",
    )
    domain_weight: float = setting(
        1.0, ge=0, zero="source only", help="Weight λ of the reversed gradient at the end of its rise; 0: the source alone."
    )
    rise: float = setting(
        10.0, ge=0, zero="the full weight from the first step", help="λ rises as 2 / (1 + exp(-rise · progress)) - 1."
    )
    norms: Literal["joint", "separate"] = setting(
        "joint", help="Norm layers: one set for both domains in one forward (joint), or a set for each domain (separate)."
    )
    hidden: int = setting(256, ge=1, help="Width of the two hidden layers of the domain head.")

    @property
    def two_routes(self) -> bool:
        return self.norms == "separate"

    @property
    def evaluated_route(self) -> Literal["clean", "adversarial"]:  # type: ignore[override]
        """That of the target."""
        return "adversarial" if self.two_routes else "clean"

    def make_classifiers(self, width: int) -> nn.Module:
        from clae_dist.models.domain_head import DomainHead

        return DomainHead(width, self.classes, self.hidden, conditional=self.form != "dann")

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float | None:
        return {-1: 3.0, 0: 1.0}.get(self.blocks)

    def check_rows(self, rows: int, micro_size: int) -> None:
        if rows % 2 or micro_size % 2:
            name = "batch.micro_size" if micro_size % 2 else "batch.global_size"
            raise ConfigError(
                f"{name} leaves an odd number of rows, but method.name=domain takes half of them from each domain; use an even "
                "number of rows for every rank."
            )

    def weight_at(self, progress: float) -> float:
        """λ after the share `progress` of the run."""
        return self.domain_weight * (2 / (1 + math.exp(-self.rise * progress)) - 1 if self.rise else 1.0)

    def describe(self, attack: Attack) -> str:
        return f"{super().describe(attack)}; {self.form}, domain weight {self.domain_weight:g}, {self.norms} norm layers"


class Domain(Method):
    """CE of the source's labels + BCE of the domain, whose gradient turns round and takes the weight λ before the features.

    The mean of each is over its own rows: all source rows, all rows. Labels of the target are never used.
    """

    Settings = DomainSettings
    settings: DomainSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        import torch
        import torch.nn.functional as F

        s.reverse_gradients(self.settings.weight_at(s.epoch / s.epochs))
        if self.settings.two_routes:
            source, target = s.classify(x[0::2]), s.classify(x[1::2], "adversarial")
        else:
            rows = s.classify(x)
            source, target = rows[0::2], rows[1::2]
        clean = cross_entropy_each(source[:, :-1], s.labels[0::2]).mean()
        both = torch.cat([source, target])
        of_source = torch.cat([torch.ones_like(source[:, -1]), torch.zeros_like(target[:, -1])])
        each = F.binary_cross_entropy_with_logits(both[:, -1], of_source, reduction="none")
        if self.settings.form == "cdan_e":
            each = each * self._sureness(s, both[:, :-1].detach())
        return {"clean": (1.0, clean), "domain": (1.0, each.mean())}

    def _sureness(self, s: Step, logits: torch.Tensor) -> torch.Tensor:
        """1 + exp(-entropy) of each row's prediction, with mean 1 over the rows of all ranks."""
        log_p = logits.log_softmax(1)
        sure_B = 1 + (log_p.exp() * log_p).sum(1).exp()
        return sure_B / s.everyones(sure_B).mean()
