"""Optimiser state by parameter name, which is independent of backend and number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from clae_dist.runs.checkpoint import Piece, Place
from clae_dist.world import World

State = Mapping[str, Mapping[str, torch.Tensor]]  # parameter name -> {"exp_avg": whole tensor, …}


def everywhere(tensor: torch.Tensor, world: World) -> Place:
    """The place of a replicated tensor."""
    return Place(tuple(tensor.shape), 0, tensor.numel(), tuple(range(world.size)))


def gather_whole(pieces: Iterable[Piece], world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the unsharded tensor (on the CPU of every rank) of the ranks' pieces, one at a time. Collective."""
    for piece in pieces:
        if len(piece.holders) == world.size:
            yield piece.name, piece.tensor.to("cpu", copy=True)
            continue
        whole = piece.tensor.new_zeros(torch.Size(piece.shape).numel())
        if world.rank == piece.holders[0]:  # every element once: a sum with zeros
            whole[piece.start : piece.start + piece.tensor.numel()] = piece.tensor.reshape(-1)
        world.add_up(whole)
        yield piece.name, whole.view(piece.shape).cpu()


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()


def optimizer_pieces(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    world: World,
    place: Callable[[nn.Parameter], Place],
    part: Callable[[torch.Tensor], torch.Tensor] = _itself,
) -> Iterator[Piece]:
    """Pieces of the state of every parameter; `part` gives this rank's shard of a tensor that is sharded as its parameter."""
    for name, parameter in model.named_parameters():
        entries: dict[str, Any] = optimizer.state.get(parameter, {})
        for key, value in sorted(entries.items()):
            value = torch.as_tensor(value)
            like_parameter = value.shape == parameter.shape and value.dim() > 0
            where = place(parameter) if like_parameter else everywhere(value, world)
            yield where.piece(f"optimizer/{name}/{key}", part(value))


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    state: State,
    place: Callable[[nn.Parameter], Place],
    part: Callable[[torch.Tensor], torch.Tensor] = _itself,
) -> None:
    """The opposite."""
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        for key, value in state.get(name, {}).items():
            if value.shape == parameter.shape and value.dim():
                made = torch.zeros_like(parameter.detach())
                place(parameter).fill(part(made), value)
                optimizer.state[parameter][key] = made
            else:
                optimizer.state[parameter][key] = value.clone()
