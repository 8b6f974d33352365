"""The attack of a trained model on real images, for the pictures of the report.

# n images, S side
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from clae_dist.config import Attack, Config
from clae_dist.config.method import Route
from clae_dist.contrast.attacks import Attacking
from clae_dist.contrast.distributed import Contrast
from clae_dist.contrast.encoding import Encoding
from clae_dist.contrast.look import look
from clae_dist.downstream.adversarial import AdversarialSettings
from clae_dist.methods import make_method
from clae_dist.models import PretrainModel
from clae_dist.models.norms import evaluation_mode, untouched_statistics
from clae_dist.world import World


@dataclass(frozen=True)
class AttackedImages:
    """Clean and adversarial images (n, 3, S, S) in [0, 1], and the loss of the batch before and after."""

    clean: torch.Tensor
    adversarial: torch.Tensor
    loss_before: float
    loss_after: float
    attack: Attack
    mirrored: bool  # the attacked view is the mirrored image
    borrowed: bool  # the run itself has no attack; the default one was used


@dataclass(frozen=True)
class _Images:
    """A batch of images of which only the order is known, and labels as the model sees them."""

    ids: torch.Tensor
    labels: torch.Tensor


class _BareModel:
    """A model that is attacked and not trained (contrast/encoding.py)."""

    def __init__(self, model: PretrainModel) -> None:
        self._model = model

    def attack_embed(self, images: torch.Tensor, route: Route, **how: Any) -> torch.Tensor:
        return self._model(images, route, **how)

    def key_encoder(self) -> AbstractContextManager[None]:
        """The model itself in evaluation mode: a trained encoder and the average of its weights are close."""
        return evaluation_mode(self._model)

    def untouched(self) -> AbstractContextManager[None]:
        return untouched_statistics(self._model)

    def evaluating(self) -> AbstractContextManager[None]:
        return evaluation_mode(self._model)

    def frozen(self) -> AbstractContextManager[None]:
        return nullcontext()

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._model.parameters())


def attack_images(config: Config, model: PretrainModel, images_n3SS: torch.Tensor) -> AttackedImages:
    """The run's attack on uint8 images, as in training: batch statistics, all n images as negatives, no trace in the model.

    A run whose method has no attack borrows the default method's; one with a head is attacked by the cross-entropy of its own
    predictions. The other view is the mirrored image.
    """
    borrowed = not config.method.uses_attack
    classes = config.method.num_classes
    lent = AdversarialSettings(classes=classes, form="at") if classes else Config().method
    method = make_method(lent if borrowed else config.method)
    device, dtype = model.mean.device, model.mean.dtype
    world = World.single(device)
    clean = images_n3SS.to(device, dtype) / 255

    def noise(_: Any, number: int) -> torch.Tensor:
        return torch.rand(clean.shape, generator=torch.Generator().manual_seed(number), dtype=dtype).to(device)

    run = Attacking(
        world=world,
        method=method,
        attack=Attack() if borrowed else config.attack,
        contrast=Contrast(config.objective, world),
        encoding=Encoding(_BareModel(model)),
        pixel_std=model.std,
        noise=noise,
        state=method.state(model.embedding_dim, config.seed),
        pseudo_labels=torch.full((len(clean), max(1, len(config.method.cluster_counts))), -1),
    )
    labels = torch.full((len(clean),), -1)
    if classes:
        with torch.no_grad(), evaluation_mode(model):
            labels = model(clean, config.evaluated_route, output="logits")[:, :classes].argmax(1)
    batch = _Images(torch.arange(len(clean)), labels)
    training = model.training
    model.train()
    with untouched_statistics(model):
        seen = look(run, batch, clean, clean.flip(3), clean)
        (attacked, *_), loss_after = seen.attacks, seen.loss_after(seen.attacks[0])
    model.train(training)
    return AttackedImages(
        clean=attacked.start.float().cpu(),
        adversarial=attacked.found.images.float().cpu(),
        loss_before=float(attacked.found.loss_before),
        loss_after=float(loss_after),
        attack=run.attack,
        mirrored=not torch.equal(attacked.start, clean[: len(attacked.start)]) and len(attacked.start) == len(clean),
        borrowed=borrowed,
    )


def amplification(attacked: AttackedImages) -> int:
    """The integer factor that makes the largest change a third of the pixel range."""
    largest = float((attacked.adversarial - attacked.clean).abs().max())
    return max(1, int(1 / 3 / largest)) if largest > 0 else 1
