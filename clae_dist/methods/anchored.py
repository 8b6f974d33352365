"""Anchored: unsupervised adversarial fine-tuning of a pretrained encoder towards its own frozen features.

Reference: Schlarmann et al. 2024, Robust CLIP: unsupervised adversarial fine-tuning of vision embeddings (FARE), equation 3.

# B rows on this rank, F feature width. x the view that is trained on; the other view is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from clae_dist.config import Attack, MethodSettings
from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, Terms
from clae_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Config
    from clae_dist.contrast.interface import Step
    from clae_dist.objectives.form import Rows


@dataclass(frozen=True)
class AnchoredSettings(MethodSettings):
    """The keys `method.*` of anchored."""

    title: ClassVar[str] = "Anchored"
    uses_attack: ClassVar[bool] = True
    embeds: ClassVar[Literal["projections", "features"]] = "features"

    name: str = name_of("anchored")
    clean: float = setting(
        0.0, ge=0, zero="none, as FARE", help="Weight of the squared distance of the clean features from the frozen encoder's."
    )

    @property
    def two_routes(self) -> bool:
        return False  # the encoder that is used afterwards is the one that is attacked

    @property
    def key_decay(self) -> float:
        return 1.0  # the frozen original

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 4 + 2 * attack.num_steps + 3 * (self.clean > 0)

    def check(self, attack: Attack) -> None:
        if not attack.random_start:
            raise ConfigError(
                "attack.random_start is false, but the first attack of method.name=anchored starts where the encoder and its "
                "frozen original agree and the distance has no gradient; use attack.random_start=true."
            )

    def check_run(self, config: Config) -> None:
        if not config.model.init:
            raise ConfigError(
                "model.init is '', but method.name=anchored fine-tunes a pretrained encoder and has nothing to learn from an "
                "untrained one; name its weights: model.init=RUN, an export, a .safetensors file or pretrained."
            )

    def describe(self, attack: Attack) -> str:
        clean = f", clean {self.clean:g}" if self.clean else ""
        return f"method: {self.name}{clean}; attack {attack.describe()}, away from the frozen encoder's features"


class Anchored(Method):
    """|f(x_adv) - f₀(x)|² + w · |f(x) - f₀(x)|², where x_adv raises |f(x') - f₀(x)|² within ε of x.

    f is the encoder without projector, its features not normalised; f₀ is f as the run began, in evaluation mode. No image's
    loss or attack depends on another's, except through batch statistics of f.
    """

    Settings = AnchoredSettings
    settings: AnchoredSettings

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        original_BF = s.embed_constant(x, momentum=True).mine

        def distance(rows: Rows) -> torch.Tensor:
            return (rows.mine - original_BF).square().sum(1).mean()

        def loss(views: Sequence[Rows]) -> torch.Tensor:
            return distance(views[0])

        (x_adv,) = s.attack_views([x], loss, route="clean")
        clean: Terms = {"clean": (self.settings.clean, distance(s.embed(x)))} if self.settings.clean else {}
        return {**clean, "adversarial": (1.0, distance(s.embed(x_adv)))}
