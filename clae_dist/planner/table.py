"""Chips and networks by name (tables.yaml), and the assumptions that a measured file replaces."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from clae_dist.errors import ConfigError
from clae_dist.training.usage import peak_flops

# Shares of a data sheet's rate that real kernels reach, as planned where nothing was measured.
PRODUCTS_REACH = 0.6
MEMORY_REACHES = 0.75
LINKS_REACH = 0.8
LAUNCH_S = 5e-6  # of the host, for a kernel that torch launches
COMPILED_KERNELS = 1 / 3  # of the kernels, that train.compile leaves
LEAST_KERNEL_S = 2e-6  # on a GPU
USABLE_MEMORY = 0.92  # without CUDA's context, NCCL's buffers, and what the allocator cannot use


@dataclass(frozen=True)
class Fsdp2Costs:
    """Costs of FSDP2 besides messages: seconds of the host, and the rate at which it copies units to buffers and back."""

    unit_s: float = 5e-4  # a unit that is gathered or reduced
    parameter_s: float = 3e-5  # a parameter of such a unit
    update_s: float = 1e-4  # a parameter that the optimiser updates: torch's DTensor finds out what to do for each
    copied_bytes_per_s: float = 0.0  # read and written; 0: as other kernels move bytes


@dataclass(frozen=True)
class Chip:
    """A device of a rank. Bytes and seconds; `device` is the name that torch reports."""

    name: str
    device: str
    memory_bytes: float
    bytes_per_s: float
    link_bytes_per_s: float
    link: Literal["nvlink", "pci", "memory"]
    per_node: int
    watts: float
    source: str

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"

    def rate(self, dtype: str, *, tf32: bool) -> float:
        """Peak operations a second for products of this dtype; 0: the chip has no such products."""
        return peak_flops(self.device, dtype, tf32=tf32)

    def precision(self, requested: str) -> str:
        """The precision that train.precision=auto takes on this chip."""
        if requested != "auto":
            return requested
        return "bfloat16" if self.is_gpu and self.rate("bfloat16", tf32=False) else "float32"


@dataclass(frozen=True)
class Wires:
    """A network between nodes: bytes a second of one adapter, in one direction."""

    name: str
    bytes_per_s: float
    per: Literal["gpu", "node"]
    source: str

    def of_node(self, ranks: int) -> float:
        """Bytes a second out of a node with `ranks` ranks."""
        return self.bytes_per_s * (ranks if self.per == "gpu" else 1)


@cache
def _tables() -> Mapping[str, Mapping[str, Any]]:
    tables: Mapping[str, Mapping[str, Any]] = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text())
    return tables


def chip_of(name: str) -> Chip:
    """Raises ConfigError for a name that the table does not have."""
    row = _row("chips", "--gpu", name, ("cpu",))
    return Chip(
        name,
        row["device"],
        1e9 * row["memory_gb"],
        1e9 * row["bandwidth_gb_s"],
        1e9 * row["link_gb_s"],
        row["link"],
        row["per_node"],
        row["watts"],
        row["source"],
    )


def network_of(name: str) -> Wires:
    """Raises ConfigError for a name that the table does not have."""
    row = _row("networks", "--network", name, ())
    return Wires(name, 1e9 / 8 * row["gbit_s"], row["per"], row["source"])


def chip_names() -> list[str]:
    """The chips of the table, and the CPU, of which all must be measured."""
    return [*_tables()["chips"], "cpu"]


def _row(table: str, option: str, name: str, others: tuple[str, ...]) -> Any:
    rows = _tables()[table]
    if name in rows:
        return rows[name]
    close = difflib.get_close_matches(name, rows, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    benches = "clae bench step, gather, data and checkpoint --json" if table == "chips" else "clae bench gather --json"
    way = "--gpu cpu" if table == "chips" else "no --network"
    raise ConfigError(
        f"{option} is {name!r}, which the table does not have; {hint}It has {', '.join((*rows, *others))}. For another one, "
        f"measure it ({benches}) and give the files with {way} --measured FILE."
    )
