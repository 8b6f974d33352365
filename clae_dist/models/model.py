"""PretrainModel maps pixels in [0, 1] to projections of unit length, along one of the routes of its norm layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clae_dist.config import Config, Model
from clae_dist.config.method import Output, Route, Views
from clae_dist.errors import ConfigError
from clae_dist.models.blocks import freeze_first
from clae_dist.models.encoders import build_encoder
from clae_dist.models.norms import add_routes, set_route, use_global_statistics
from clae_dist.models.regions import feature_map, region_features
from clae_dist.objectives.softmax import at_least_float32


class PretrainModel(nn.Module):
    """Normalisation of pixels, encoder, projector. # B rows, F feature width, D embedding width.

    With an empty projector, embeddings are the features themselves, of any length. `classifiers` are the method's on the
    features, as one module with the logits of all of them side by side; None: there are none.

    `evaluated_route` is the route of norm layers whose features stand for the model in evaluation.
    """

    evaluated_route: Route = "clean"
    fixed: Sequence[nn.Module] = ()  # modules that stay in evaluation mode: of model.norm=fixed, and those that are not trained

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        projector: nn.Sequential,
        dim: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        classifiers: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.feature_dim, self.embedding_dim = feature_dim, dim
        self.encoder = encoder
        self.projector = projector
        self.classifiers = classifiers
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.fixed:
            module.train(False)
        return self

    def features(self, images_B3HW: torch.Tensor, route: Route | Views | None = None) -> torch.Tensor:
        """Features (B, F) of pixels in [0, 1], along the evaluated route unless another is given, or one for each view."""
        set_route(self.encoder, route or self.evaluated_route)
        return self.encoder((images_B3HW - self.mean) / self.std).flatten(1)

    def forward(
        self,
        images_B3HW: torch.Tensor,
        route: Route | Views = "clean",
        *,
        output: Output = "projections",
        boxes_BL4: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows of pixels in [0, 1], at least float32: projections (B, D), features (B, F), which models without a projector
        have instead of projections, or logits. With boxes, rows of regions (see models/regions.py): (B L, D)."""
        if boxes_BL4 is None:
            z = self.features(images_B3HW, route)
        else:
            z = feature_map(self.encoder, self.feature_dim, lambda: self.features(images_B3HW, route))
            z = region_features(z, boxes_BL4)
        if output == "projections" and len(self.projector):
            set_route(self.projector, route)
            return F.normalize(at_least_float32(self.projector(z)), dim=1)
        if output == "logits":
            assert self.classifiers is not None
            z = self.classifiers(z.to(next(self.classifiers.parameters()).dtype))
        return at_least_float32(z)


def mlp(width: int, hidden: int, dim: int) -> nn.Sequential:
    """SimCLR's projector: Linear-ReLU-Linear."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))


def make_projector(settings: Model, width: int) -> nn.Sequential:
    """The projector of model.projector, from features (B, width) to projections (B, D)."""
    hidden, dim = settings.projector_hidden or width, settings.projector_dim
    match settings.projector:
        case "linear":
            return nn.Sequential(nn.Linear(width, dim))
        case "mlp":
            return mlp(width, hidden, dim)
        case "mlp_bn":
            return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))
    layers: list[nn.Module] = []
    for number, (inner, outer) in enumerate(((width, hidden), (hidden, hidden), (hidden, dim))):
        layers += [nn.ReLU()] * (number > 0) + [nn.Linear(inner, outer, bias=number == 0), nn.BatchNorm1d(outer)]
    return nn.Sequential(*layers)


def build_model(config: Config, group: dist.ProcessGroup | None = None) -> PretrainModel:
    """Build the model of a run. Initial weights are a pure function of config.model and config.seed, equal on every rank.

    Args:
        group: the ranks that share batch statistics if model.norm is "global" (World.norm_group).

    Raises ConfigError (see build_encoder).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder, feature_dim = build_encoder(config.model, config.data.image_size)
        if config.model.initial_weights == "torch":
            for module in encoder.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.reset_parameters()
        projects = config.method.embeds == "projections"
        projector = make_projector(config.model, feature_dim) if projects else nn.Sequential()
        dim = config.model.projector_dim if projects else feature_dim
        classifiers = config.method.make_classifiers(feature_dim)
        model = PretrainModel(encoder, feature_dim, projector, dim, config.model.mean, config.model.std, classifiers)
    model.evaluated_route = config.evaluated_route
    if config.method.two_routes:
        add_routes(model.encoder, config.model.adversarial_norm_momentum, config.method.routes)
        if config.model.projector == "mlp3_bn":
            add_routes(model.projector, config.model.adversarial_norm_momentum)
    if config.model.norm == "global":
        use_global_statistics(model, group)
    model.fixed = freeze_first(model.encoder, config.method.trained_blocks)
    if config.model.norm == "fixed":
        model.fixed += [module for module in model.encoder.modules() if isinstance(module, _BatchNorm)]
    model.train()
    return model.double() if config.train.precision == "float64" else model


def check_model(config: Config) -> None:
    """Build the model on torch's meta device, without memory for weights, to find errors. Raises ConfigError."""
    with torch.device("meta"):
        model = build_model(config).eval()
    if config.method.takes_regions:
        images = torch.empty((2, 3, config.data.image_size, config.data.image_size), device="meta", dtype=model.mean.dtype)
        feature_map(model.encoder, model.feature_dim, lambda: model.features(images))
    if config.views.local_crops:
        size = config.local_size
        try:
            model(torch.empty((2, 3, size, size), device="meta", dtype=next(model.parameters()).dtype))
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:150]
            raise ConfigError(
                f"views.local_size is {size}, which model.encoder {config.model.encoder!r} does not take beside images of "
                f"{config.data.image_size} ({reason}); use a convolutional encoder, or no local crops."
            ) from None
