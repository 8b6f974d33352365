"""Whole tensors of what ZeRO keeps in slices, and back: what moves between stages, backends and numbers of ranks.

A flat tensor holds one slice of each parameter of a group, end to end. At stages 1 and 2 the whole group is cut into W equal
runs, and a rank's run may begin and end inside a parameter; at stage 3 every parameter is cut into W equal parts, the last
of them padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clae_dist.parallel.named_state import State
from clae_dist.world import World


@dataclass(frozen=True)
class _Slice:
    """`length` elements: from `start` in the parameter laid out in a row, from `offset` in the flat tensor."""

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

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole parameters on the CPU, on every rank (stage 3). A collective."""
        return {
            name: self._whole(p.ds_tensor.data, p, self._part(p, 0)).cpu()  # type: ignore[attr-defined]
            for name, p in self._model.named_parameters()
        }

    @torch.no_grad()
    def load_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Takes this rank's slices of a whole state_dict of the bare model."""
        if not self._by_parameter:
            self._model.load_state_dict(state)
        else:
            for name, buffer in self._model.named_buffers():
                if name in state:  # the others are constants
                    buffer.copy_(state[name])
            for name, p in self._model.named_parameters():
                _fill(p.ds_tensor.data, self._part(p, 0), state[name])  # type: ignore[attr-defined]
            self._engine.empty_partition_cache()  # what is whole on this rank at the moment is an old weight
        self._zero.refresh_fp32_params()

    def optimizer_state(self) -> State:
        """Parameter name -> whole tensors on the CPU, on every rank; empty before the first step. A collective."""
        named: State = {}
        for name, p in self._model.named_parameters():
            flat = self._flat(p)
            entries = self._optimizer.state.get(flat, {})
            if entries:
                named[name] = {
                    key: self._whole(value, p, self._slice(p)).cpu() if value.shape == flat.shape else value.cpu().clone()
                    for key, value in sorted(entries.items())
                }
        return named

    def load_optimizer_state(self, state: State) -> None:
        """The opposite, also before the first step."""
        self._optimizer.state.clear()
        for name, p in self._model.named_parameters():
            flat = self._flat(p)
            for key, value in state.get(name, {}).items():
                entries = self._optimizer.state[flat]
                if value.shape == _shape(p) and value.dim():
                    _fill(entries.setdefault(key, torch.zeros_like(flat, requires_grad=False)), self._slice(p), value)
                else:
                    known = entries.setdefault(key, value.clone())
                    assert torch.equal(known, value), f"{name}: {key} {value} is {known} in others of its group"

    def _flat(self, parameter: nn.Parameter) -> torch.Tensor:
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self._by_parameter else zero.single_partition_of_fp32_groups
        flat: torch.Tensor = flats[self._group[parameter]]
        return flat

    def _slice(self, parameter: Any) -> _Slice:
        """Where this rank's slice of a parameter lies in the flat tensor of its group."""
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

    def _whole(self, flat: torch.Tensor, parameter: nn.Parameter, at: _Slice) -> torch.Tensor:
        whole = torch.zeros(_shape(parameter).numel(), dtype=flat.dtype, device=flat.device)
        whole[at.start : at.start + at.length] = flat.detach()[at.offset : at.offset + at.length]
        dist.all_reduce(whole, group=self._world.group)  # every element is on one rank: a sum with zeros
        return whole.view(_shape(parameter))


def _fill(flat: torch.Tensor, at: _Slice, whole: torch.Tensor) -> None:
    flat[at.offset : at.offset + at.length] = whole.reshape(-1)[at.start : at.start + at.length].to(flat)


def _shape(parameter: Any) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
