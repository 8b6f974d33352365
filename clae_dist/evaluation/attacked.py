"""A trained model's own attack on real images, for the report's pictures.

# n images, S side
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from clae_dist.config import Attack, Config
from clae_dist.contrast.distributed import Contrast
from clae_dist.contrast.encoding import Encoding, Route
from clae_dist.contrast.step import Attacking, adversarial_view
from clae_dist.models import PretrainModel
from clae_dist.models.norms import untouched_statistics
from clae_dist.world import World


@dataclass(frozen=True)
class Attacked:
    """Clean and adversarial images (n, 3, S, S) in [0, 1], and the loss of the batch before and after."""

    clean: torch.Tensor
    adversarial: torch.Tensor
    loss_before: float
    loss_after: float
    attack: Attack
    borrowed: bool  # the run itself has no attack; the default one was used


class _BareModel:
    """A model that is attacked and not trained (contrast/encoding.py)."""

    def __init__(self, model: PretrainModel) -> None:
        self._model = model

    def attack_embed(self, images: torch.Tensor, route: Route) -> torch.Tensor:
        return self._model(images, route)

    def untouched(self) -> AbstractContextManager[None]:
        return untouched_statistics(self._model)

    def frozen(self) -> AbstractContextManager[None]:
        return nullcontext()

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._model.parameters())


def attack_images(config: Config, model: PretrainModel, images_n3SS: torch.Tensor) -> Attacked:
    """The run's attack on uint8 images, as in training: batch statistics, all n images as negatives, no trace in the model.

    With attack.name "none" it is the default attack. With anchor "other", the other view is the mirrored image.
    """
    attack = config.attack if config.attack.name != "none" else Attack()
    world = World.single(model.mean.device)
    run = Attacking(
        world=world,
        attack=attack,
        contrast=Contrast(config.objective, world),
        encoding=Encoding(_BareModel(model)),
        pixel_std=model.std,
    )
    clean = images_n3SS.to(model.mean.device, model.mean.dtype) / 255
    mirrored = clean.flip(3)
    training = model.training
    model.train()
    with untouched_statistics(model):
        noise = torch.rand(clean.shape, generator=torch.Generator().manual_seed(0), dtype=clean.dtype).to(clean.device)
        found = adversarial_view(run, clean, mirrored, noise=noise if attack.random_start else None)
        anchor, attacked = (run.encoding.constant(images, "adversarial") for images in (clean, found.images))
        loss_after = run.contrast(run.contrast.rows(anchor), run.contrast.rows(attacked))
    model.train(training)
    return Attacked(
        clean=(mirrored if attack.anchor == "other" else clean).float().cpu(),
        adversarial=found.images.float().cpu(),
        loss_before=float(found.loss_before),
        loss_after=float(loss_after),
        attack=attack,
        borrowed=config.attack.name == "none",
    )


def amplification(attacked: Attacked) -> int:
    """The whole factor that makes the largest change a third of the pixel range."""
    largest = float((attacked.adversarial - attacked.clean).abs().max())
    return max(1, int(1 / 3 / largest)) if largest > 0 else 1
