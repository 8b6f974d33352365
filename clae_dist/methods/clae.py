"""CLAE: SimCLR with adversarial images as a third view.

Reference: Ho & Vasconcelos 2020, Contrastive Learning with Adversarial Examples, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, Terms
from clae_dist.errors import ConfigError
from clae_dist.methods.adversarial_term import AdversarialTerm
from clae_dist.methods.local_crops import local_terms

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack
    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class ClaeSettings(AdversarialTerm):
    """The keys `method.*` of CLAE."""

    title: ClassVar[str] = "CLAE"
    takes_local_crops: ClassVar[bool] = True
    name: str = name_of("clae")
    anchor: Literal["same", "other"] = setting(
        "same", help="View that is attacked: the anchor's own (same), or the other view of its image (other)."
    )
    cost: Literal["exact", "original"] = setting(
        "exact",
        help="exact: the paper's gradient at the lowest cost. original: the same, with the anchor's forward and the weight "
        "gradients that the paper's code computes and discards.",
    )

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        if self.cost == "original":  # a forward with a graph and a backward, of anchor and attacked view
            return 6 + self.fraction * (3 + 6 * attack.num_steps)
        apart = self.anchor == "other" or attack.random_start  # the anchor's own forward
        shared = shared_norms and attack.num_steps == 1 and self.fraction == 1 and not apart
        return 6 + self.fraction * (3 + apart + 2 * attack.num_steps - shared)

    def describe_attack(self) -> str:
        return f", anchor {self.anchor}, cost {self.cost}"

    def check_rows(self, rows: int, micro_size: int) -> None:
        if micro_size and self.cost == "original":
            raise ConfigError(
                "method.cost is 'original', which keeps a rank's whole share in one graph, as the paper's code does; "
                "use method.cost=exact (the same gradient) with batch.micro_size."
            )
        super().check_rows(rows, micro_size)


class Clae(Method):
    """L(z(x), z(y)) + α · L(z(x), z(x_adv)), where x_adv raises L(z(x), z(x')) on the global batch the most within ε of x.

    At x' = x the positive pair cannot get closer: the negatives, on every rank, drive the attack.
    """

    Settings = ClaeSettings
    settings: ClaeSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        settings = self.settings
        if not settings.present(s):
            first, second = s.embed_views(x, y)
            return {"clean": (1.0, s.contrast(first, second)), **local_terms(s, first, second)}
        rows = s.choose(settings.num_attacked(len(x)), len(x))
        # Where both routes are the same function, the attack uses the clean forward of x and costs no forward of its own.
        shared = settings.cost == "exact" and settings.anchor == "same" and settings.fraction == 1 and s.can_share_forward()
        a = s.embed(x, image_gradient=True) if shared else None

        anchor = x[rows]
        start = y[rows] if settings.anchor == "other" else anchor
        live = settings.cost == "original"
        x_adv = s.attack(start, s.contrast, anchor=anchor, rows=rows, through=a, live_anchor=live)

        if a is None:
            a, b, c = s.embed_views(x, y, adversarial=[x_adv])
        else:
            b, c = s.embed_views(y, adversarial=[x_adv])
        adversarial = s.contrast(s.select(a, rows), c)
        return {"clean": (1.0, s.contrast(a, b)), "adversarial": (settings.alpha, adversarial), **local_terms(s, a, b)}
