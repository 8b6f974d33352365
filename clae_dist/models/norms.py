"""Normalisation layers with several routes (clean, adversarial, …), one for each view of a forward."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clae_dist.config.method import Route, Views
from clae_dist.models.batch_norm import GlobalBatchNorm, normalise_views

ROUTES: tuple[Route, ...] = get_args(Route)


class RoutedNorm(nn.Module):
    """A batch norm for each route, with its own weights and statistics. Reference: Xie et al. 2020."""

    def __init__(self, norms: Mapping[Route, nn.Module]) -> None:
        super().__init__()
        for route, norm in norms.items():
            self.add_module(route, norm)
        self.route: Route | Views = "clean"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.route, str):
            return normalise_views(x, [getattr(self, route) for route, _ in self.route], [rows for _, rows in self.route])
        y: torch.Tensor = getattr(self, self.route)(x)
        return y


def _replace(module: nn.Module, make: Any) -> int:
    """Replace every batch norm below `module` by make(child). Returns their number."""
    replaced = 0
    for name, child in list(module.named_children()):
        if isinstance(child, _BatchNorm):
            setattr(module, name, make(child))
            replaced += 1
        else:
            replaced += _replace(child, make)
    return replaced


def add_routes(module: nn.Module, adversarial_momentum: float, routes: Sequence[Route] = ROUTES[:2]) -> int:
    """Replace every batch norm in `module` by one for each route, which start equal; the first is the clean one.

    Args:
        adversarial_momentum: of the running statistics of the other routes.

    Returns: the number of batch norms that were replaced.
    """

    def routed(norm: _BatchNorm) -> RoutedNorm:
        others = {route: copy.deepcopy(norm) for route in routes[1:]}
        for other in others.values():
            other.momentum = adversarial_momentum
        return RoutedNorm({routes[0]: norm, **others})

    return _replace(module, routed)


def use_global_statistics(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Make every batch norm in `module` use the statistics of the batches of all ranks of `group`; None: of this rank's."""
    if group is not None:
        _replace(module, lambda norm: GlobalBatchNorm(norm, group))


def set_route(module: nn.Module, route: Route | Views) -> None:
    """Select the norm layers that the next forward of `module` uses: one for all rows, or one for the rows of each view."""
    for child in module.modules():
        if isinstance(child, (RoutedNorm, GlobalBatchNorm)):
            child.route = route


def takes_views(module: nn.Module) -> bool:
    """True if a forward of several views gives each its own statistics: batch norms, if there are any, must be global ones."""
    return all(isinstance(child, GlobalBatchNorm) for child in module.modules() if isinstance(child, _BatchNorm))


def has_global_statistics(module: nn.Module) -> bool:
    """True if forwards in training mode communicate."""
    return any(isinstance(child, GlobalBatchNorm) for child in module.modules())


def has_route(module: nn.Module, route: Route) -> bool:
    """True if `module` has norm layers of this route: every module has a clean one."""
    return route == "clean" or any(isinstance(child, RoutedNorm) and hasattr(child, route) for child in module.modules())


def route_parameters(module: nn.Module, route: Route) -> list[nn.Parameter]:
    """Parameters that only this route uses."""
    routed = [child for child in module.modules() if isinstance(child, RoutedNorm) and hasattr(child, route)]
    return [parameter for child in routed for parameter in getattr(child, route).parameters()]


@contextmanager
def untouched_statistics(module: nn.Module) -> Iterator[None]:
    """Context in which forwards in training mode use batch statistics and do not change running statistics."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Context in which `module` is in evaluation mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def statistics_on_copies(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Context in which forwards change copies of the running statistics of these layers, not the originals."""
    own = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: value.clone() for name, value in norm._buffers.items() if value is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)


def single_route_state(state: dict[str, torch.Tensor], route: Route = "clean") -> dict[str, torch.Tensor]:
    """The state of one route of an encoder, under the names of the encoder without routes."""
    plain: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if any(other in parts for other in ROUTES if other != route):
            continue
        plain[".".join(part for part in parts if part != route)] = value
    return plain


def load_every_route(encoder: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load weights with the names of the encoder without routes, in every route alike; tensors that `weights` lacks stay.

    Raises RuntimeError for a tensor of another shape.
    """
    routed = [name + "." for name, module in encoder.named_modules() if isinstance(module, RoutedNorm)]

    def plain(key: str) -> str:
        prefix = next((name for name in routed if key.startswith(name)), None)
        return key if prefix is None else prefix + key.removeprefix(prefix).partition(".")[2]

    state = {key: weights[plain(key)] for key in encoder.state_dict() if plain(key) in weights}
    encoder.load_state_dict(state, strict=False)


def statistics(module: nn.Module) -> list[torch.Tensor]:
    """Running means and variances."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]


def has_batch_statistics(module: nn.Module) -> bool:
    """True if an image's embedding depends on the other images of its batch."""
    return any(isinstance(child, _BatchNorm) for child in module.modules())


def random_layers(module: nn.Module) -> list[str]:
    """Names of the layers that draw random numbers while training: dropout, stochastic depth."""
    rates = ("p", "drop_prob", "drop_rate", "dropout")
    return [
        name
        for name, child in module.named_modules()
        if any(isinstance(rate := getattr(child, key, 0.0), float) and rate > 0 for key in rates)
    ]


def routes_are_one_function(module: nn.Module) -> bool:
    """True if both routes compute the same function: no batch statistics, and nothing random."""
    return not has_batch_statistics(module) and not random_layers(module)
