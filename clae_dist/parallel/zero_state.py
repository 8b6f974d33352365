"""Conversion between ZeRO's slices and unsharded tensors, which are independent of stage, backend and number of ranks.

A flat tensor holds one slice of each parameter of a group, end to end. At stages 1 and 2 the whole group is cut into W equal
runs, and a rank's run may begin and end inside a parameter; at stage 3 every parameter is cut into W equal parts, the last
of them padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clae_dist.parallel.named_state import State, everywhere
from clae_dist.runs.checkpoint import Piece, Place
from clae_dist.world import World


@dataclass(frozen=True)
class _Slice:
    """`length` elements that begin at `start` in the flattened parameter and at `offset` in the flat tensor."""

    start: int
    offset: int
    length: int


class ZeroState:
    """Weights and optimiser state of a DeepSpeed engine at ZeRO stage 1, 2 or 3, by parameter name."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, model: nn.Module, world: World) -> None:
        self._engine, self._zero, self._optimizer, self._model, self._world = engine, engine.optimizer, optimizer, model, world
        self._by_parameter = engine.zero_optimization_stage() == 3
        groups = self._zero.fp16_groups if self._by_parameter else self._zero.bit16_groups
        self._group = {parameter: i for i, group in enumerate(groups) for parameter in group}

    def place(self, parameter: Any) -> Place:
        """Position of this rank's shard within the unsharded parameter."""
        if not self._by_parameter:
            return everywhere(parameter, self._world)
        return self._placed(parameter, self._part(parameter, 0))

    def weights_written(self) -> None:
        """Called after new weights have been written into the shards."""
        if self._by_parameter:
            self._engine.empty_partition_cache()  # what is whole on this rank at the moment is an old weight
        self._zero.refresh_fp32_params()

    def optimizer_pieces(self) -> Iterator[Piece]:
        """This rank's slices, including empty ones; none before the first step."""
        for name, p in self._model.named_parameters():
            flat, at = self._flat(p), self._slice(p)
            for key, value in sorted(self._optimizer.state.get(flat, {}).items()):
                if value.shape == flat.shape:
                    place, part = self._placed(p, at), value[at.offset : at.offset + at.length]
                else:
                    place, part = everywhere(value, self._world), value
                yield place.piece(f"optimizer/{name}/{key}", part)

    def load_optimizer_state(self, state: State) -> None:
        """Load the optimiser state, also before the first step."""
        self._optimizer.state.clear()
        for name, p in self._model.named_parameters():
            flat = self._flat(p)
            for key, value in state.get(name, {}).items():
                entries = self._optimizer.state[flat]
                if value.shape == _shape(p) and value.dim():
                    at, row = self._slice(p), entries.setdefault(key, torch.zeros_like(flat, requires_grad=False))
                    self._placed(p, at).fill(row[at.offset : at.offset + at.length], value)
                else:
                    known = entries.setdefault(key, value.clone())
                    assert torch.equal(known, value), f"{name}: {key} {value} is {known} in others of its group"

    def _flat(self, parameter: nn.Parameter) -> torch.Tensor:
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self._by_parameter else zero.single_partition_of_fp32_groups
        flat: torch.Tensor = flats[self._group[parameter]]
        return flat

    def _slice(self, parameter: Any) -> _Slice:
        """Position of this rank's slice of a parameter in the flat tensor of its group."""
        if self._by_parameter:
            _, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            return self._part(parameter, offset)
        found = parameter._hp_mapping
        if found is None:
            return _Slice(0, 0, 0)
        inside, here = found.lp_fragment_address, found.hp_fragment_address
        return _Slice(inside.start, here.start, here.numel)

    def _part(self, parameter: Any, offset: int) -> _Slice:
        """Stage 3's equal parts of each parameter."""
        size = parameter.ds_tensor.numel()
        start = min(self._world.rank * size, parameter.ds_numel)
        return _Slice(start, offset, min(size, parameter.ds_numel - start))

    def _placed(self, parameter: Any, at: _Slice) -> Place:
        return Place(tuple(_shape(parameter)), at.start, at.length, (self._world.rank,))


def _shape(parameter: Any) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
