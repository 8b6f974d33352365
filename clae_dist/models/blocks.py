"""The blocks of an encoder, which are the units of recomputation, compilation and sharding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from clae_dist.errors import ConfigError
from clae_dist.models.batch_norm import GlobalBatchNorm
from clae_dist.models.norms import RoutedNorm, statistics_on_copies
from clae_dist.wording import count_of


def encoder_blocks(encoder: nn.Module) -> list[nn.Module]:
    """The outermost children, with parameters, of the encoder's sequences of modules: residual or transformer blocks."""
    found: list[nn.Module] = []
    for child in encoder.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            for block in child:
                inner = encoder_blocks(block) if isinstance(block, (nn.Sequential, nn.ModuleList)) else []
                found += inner or ([block] if any(True for _ in block.parameters()) else [])
        else:
            found += encoder_blocks(child)
    return found


def depths(encoder: nn.Module) -> dict[nn.Parameter, int]:
    """The depth of every parameter: 0 before the first block, n in block n, and one more for what comes after the last.

    The order is that in which the encoder registers its parameters.
    """
    numbers = {parameter: n for n, block in enumerate(encoder_blocks(encoder), 1) for parameter in block.parameters()}
    found: dict[nn.Parameter, int] = {}
    reached = 0
    for parameter in encoder.parameters():
        within = numbers.get(parameter)
        reached = max(reached, within or 0)
        found[parameter] = within or (len(encoder_blocks(encoder)) + 1 if reached else 0)
    return found


def freeze_first(encoder: nn.Module, trained_blocks: int) -> list[nn.Module]:
    """Stop the training of all but the last blocks, and of what comes after them. Returns the modules that are not trained.

    Args:
        trained_blocks: -1: all is trained; 0: nothing.

    Raises ConfigError for more blocks than the encoder has.
    """
    if trained_blocks < 0:
        return []
    count = len(encoder_blocks(encoder))
    if trained_blocks > count:
        raise ConfigError(
            f"method.blocks is {trained_blocks}, but the encoder has {count_of(count, 'block')}; use at most {count}, or -1 "
            "for the whole encoder."
        )
    first = count - trained_blocks + 1
    for parameter, depth in depths(encoder).items():
        parameter.requires_grad_(trained_blocks > 0 and depth >= first)
    asked = [encoder, *encoder_blocks(encoder), *(module for module in encoder.modules() if not list(module.children()))]
    return [one for one in asked if any(True for _ in one.parameters()) and not any(p.requires_grad for p in one.parameters())]


def compile_blocks(encoder: nn.Module) -> None:
    """Compile every block, or the encoder if it has none, with torch.compile. Names of parameters do not change.

    Blocks of one class share their code, each with a graph for both routes, with and without gradient: torch gives up on
    code after 8 graphs, and would run the rest of a ResNet uncompiled.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    for module in encoder_blocks(encoder) or [encoder]:
        module.compile(dynamic=False)


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Make blocks keep only their input and recompute the rest in the backward pass. Reference: Chen et al. 2016.

    The second forward takes the route of the first, whatever was run in between, and leaves no trace in running statistics.
    """
    for module in encoder_blocks(encoder) or [encoder]:
        module.forward = _checkpointed(module, module.forward)


def _checkpointed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        routes = [(norm, norm.route) for norm in module.modules() if isinstance(norm, (RoutedNorm, GlobalBatchNorm))]
        return nullcontext(), _again(module, routes)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


@contextmanager
def _again(module: nn.Module, routes: list[tuple[RoutedNorm | GlobalBatchNorm, Any]]) -> Iterator[None]:
    before = [(norm, norm.route) for norm, _ in routes]
    # On copies: without running statistics a batch norm would save other tensors than in the first forward.
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    for routed, route in routes:
        routed.route = route
    try:
        with statistics_on_copies(norms):
            yield
    finally:
        for routed, route in before:
            routed.route = route
