"""The costs of FSDP2 from the times of the calls that measure them."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from clae_dist.bench.measure import Times
from clae_dist.bench.unit import UNITS, costs_of
from clae_dist.planner.table import Fsdp2Costs


def test_costs_are_found_again() -> None:
    """Eight units of 2 and of 16 parameters are visited three times, 128 parameters updated, 64 MiB read and written."""
    wanted = Fsdp2Costs(unit_s=1e-3, parameter_s=5e-5, update_s=2e-4, copied_bytes_per_s=4e9)
    cpu = {UNITS: 24 * (1e-3 + 2 * 5e-5), "units of eight": 24 * (1e-3 + 16 * 5e-5), "plain update": 0.01}
    cpu |= {"update": 0.01 + 128 * 2e-4, "copy": 9.0}
    wall = {**dict.fromkeys(cpu, 9.0), "copy": 2 * 2**26 / 4e9}
    found = costs_of({name: Times([wall[name]] * 3, [cpu[name]] * 3) for name in cpu})
    assert asdict(found) == pytest.approx(asdict(wanted))


def test_costs_below_the_noise_are_none() -> None:
    none = Times([1.0], [1.0])
    found = costs_of(dict.fromkeys([UNITS, "units of eight", "update", "plain update", "copy"], none))
    assert (found.parameter_s, found.update_s) == (0, 0)
