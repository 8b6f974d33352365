"""Costs of FSDP2 besides messages: the time of the host for units and their parameters, and the rate of copies."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from clae_dist.bench.measure import Times
from clae_dist.planner.table import Fsdp2Costs
from clae_dist.world import World

_UNITS, _LAYERS, _WIDTH = 8, 8, 16
_VISITS = 3 * _UNITS  # gathered in the forward and again in the backward, then reduced
_OF_A_LAYER = 2  # parameters
_COPIED_BYTES = 64 << 20
UNITS = "units of a layer"


def unit_calls(world: World) -> dict[str, Callable[[], Any]]:
    """Calls by name, whose times `costs_of` reads. Collective; `world` has several ranks.

    They visit every unit of small networks, whose parameters take no room to speak of, take a step of AdamW, and copy.
    """
    source = torch.zeros(_COPIED_BYTES // 4, device=world.device)
    target = torch.empty_like(source)
    large, plain = _network(world, _LAYERS), _network(world, _LAYERS, sharded=False)
    calls = {UNITS: _visit(_network(world, 1), world), "units of eight": _visit(large, world)}
    for network in (large, plain):
        _visit(network, world)()  # gradients
    calls |= {"update": torch.optim.AdamW(large.parameters()).step, "plain update": torch.optim.AdamW(plain.parameters()).step}
    return {**calls, "copy": lambda: target.copy_(source)}


def _network(world: World, layers: int, *, sharded: bool = True) -> nn.Sequential:
    units = (nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(layers))) for _ in range(_UNITS))
    network = nn.Sequential(*units).to(world.device)
    if sharded:
        assert world.group is not None
        mesh = DeviceMesh.from_group(world.group, world.device.type)
        for unit in (*network, network):
            fully_shard(unit, mesh=mesh)
    return network


def _visit(network: nn.Module, world: World) -> Callable[[], Any]:
    row = torch.zeros(1, _WIDTH, device=world.device)
    return lambda: network(row).sum().backward()


def costs_of(times: Mapping[str, Times]) -> Fsdp2Costs:
    """From CPU seconds, so that waits for messages are not in them, which a plan counts by themselves."""
    cpu = {name: statistics.median(one.cpu) for name, one in times.items()}
    few, many = _VISITS * _OF_A_LAYER, _VISITS * _OF_A_LAYER * _LAYERS
    parameter_s = max(0.0, cpu["units of eight"] - cpu[UNITS]) / (many - few)
    updated = _UNITS * _LAYERS * _OF_A_LAYER
    return Fsdp2Costs(
        unit_s=max(0.0, cpu[UNITS] - few * parameter_s) / _VISITS,
        parameter_s=parameter_s,
        update_s=max(0.0, cpu["update"] - cpu["plain update"]) / updated,
        copied_bytes_per_s=2 * _COPIED_BYTES / times["copy"].median_s,
    )
