"""The host's time of a unit that FSDP2 gathers or reduces: hooks, buffers and copies of parameters that take almost no room."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from clae_dist.bench.measure import Times
from clae_dist.world import World

_UNITS, _WIDTH = 8, 16
_VISITS = 3 * _UNITS  # gathered in the forward and again in the backward, then reduced


def unit_call(world: World) -> Callable[[], Any]:
    """A call that visits every unit of a small network under FSDP2. Collective; `world` has several ranks."""
    assert world.group is not None
    mesh = DeviceMesh.from_group(world.group, world.device.type)
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(_UNITS))).to(world.device)
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh)
    row = torch.zeros(1, _WIDTH, device=world.device)
    return lambda: model(row).sum().backward()


def seconds_of_unit(times: Times) -> float:
    """CPU seconds of a visit: waits for messages are not in it, which a plan counts by themselves."""
    return statistics.median(times.cpu) / _VISITS
