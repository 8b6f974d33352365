"""An encoder with a linear head as one differentiable network, and heads that are fitted once.

# n images, S side, F width of the features, C classes
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from clae_dist.config.method import Route
from clae_dist.errors import ConfigError
from clae_dist.evaluation.linear import LinearHead, fit_head
from clae_dist.evaluation.protocol import Subject
from clae_dist.evaluation.scored import scored
from clae_dist.models import PretrainModel
from clae_dist.models.domain_head import DomainHead
from clae_dist.models.norms import RoutedNorm
from clae_dist.runs.checkpoint.safetensors_file import weights_digest


class Classifier(nn.Module):
    """Logits (n, C) of images (n, 3, S, S) with pixels in [0, 1], along one route of norm layers; in evaluation mode."""

    def __init__(self, model: PretrainModel, head: LinearHead, route: Route) -> None:
        super().__init__()
        self.model, self.route = model, route
        self.weight, self.bias = (nn.Parameter(value.to(model.mean)) for value in (head.weight, head.bias))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.features(images, self.route) @ self.weight + self.bias


def own_classifier(subject: Subject) -> Classifier:
    """The classifier that the run itself has trained (clae finetune). Raises ConfigError without one, and for other classes."""
    model, _ = subject.parts()
    head = model.classifiers
    layer = head.classes if isinstance(head, DomainHead) else head
    if not isinstance(layer, nn.Linear):
        raise ConfigError("robust.heads has 'own', but the run has trained no classifier; use slf, or a run of clae finetune.")
    if len(layer.bias) != subject.num_classes:
        raise ConfigError(
            f"robust.heads has 'own', but the head of the run has {len(layer.bias)} classes, and the images have "
            f"{subject.num_classes}; evaluate it on the set that it was trained for."
        )
    return Classifier(model, LinearHead(layer.weight.detach().T, layer.bias.detach()), model.evaluated_route)


def has_routes(model: PretrainModel) -> bool:
    """True if adversarial images have norm layers of their own."""
    return any(isinstance(module, RoutedNorm) for module in model.encoder.modules())


def along(subject: Subject, route: Route) -> Subject:
    """The subject with features and classifier of a route of its model. Collective."""
    model, place = subject.parts()
    if route == model.evaluated_route and subject.head is not None:
        return subject
    data, model = place.config.data, copy.copy(model)
    model.evaluated_route = route
    splits = (data.train_split, data.test_split)
    limits = (subject.settings.train_images, 0)
    parts = [
        place.features({"after": model}, place.images(split, limit), f"features, {split}, {route} route")["after"]
        for split, limit in zip(splits, limits, strict=True)
    ]
    pair = scored(parts[0], parts[1], *splits)
    return with_head(replace(subject, bank=pair.bank, queries=pair.queries, model=model))


def with_head(subject: Subject) -> Subject:
    """The subject with a linear classifier of its bank, fitted once on rank 0. Collective."""
    (model, place), settings = subject.parts(), subject.settings
    key = {
        "weights": weights_digest(model.state_dict()),
        "route": model.evaluated_route,
        "images": place.manifest.digest,
        "bank": len(subject.bank),
        "settings": [settings.linear_iterations, settings.linear_penalty, subject.seed],
    }

    def fit() -> dict[str, torch.Tensor]:
        iterations, penalty = settings.linear_iterations, settings.linear_penalty
        return fit_head(subject.bank, subject.num_classes, iterations, penalty, subject.seed, subject.device).tensors()

    head = LinearHead.from_tensors(place.world.run_on_main(lambda: place.kept("heads", key, fit)))
    return replace(subject, head=head)
