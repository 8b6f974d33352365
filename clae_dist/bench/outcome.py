"""The result of a bench with versions and machine, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clae_dist import __version__
from clae_dist.bench.measure import Row
from clae_dist.cores import usable_cores
from clae_dist.versions import package_version

_PACKAGES = ("torchvision", "timm", "lightly", "open_clip_torch", "scikit-learn")


@dataclass(frozen=True)
class Outcome:
    """The rows of a bench, the device on which they were measured, and notes such as skipped cases."""

    rows: list[Row]
    device: torch.device
    notes: Sequence[str] = ()

    def as_json(self) -> str:
        content = {
            "versions": versions(),
            "machine": machine(self.device),
            "notes": list(self.notes),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        return json.dumps(content, indent=1)

    def as_table(self) -> str:
        return "\n".join(_table(self))


def versions() -> dict[str, str]:
    """Versions of Python, torch, this package and the installed peers."""
    ours = {"python": platform.python_version(), "torch": torch.__version__, "clae-dist": __version__}
    return ours | {name: version for name in _PACKAGES if (version := package_version(name))}


def machine(device: torch.device) -> dict[str, Any]:
    """The machine on which the figures were measured."""
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if hasattr(os, "getloadavg"):
        facts["load_1min"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _table(outcome: Outcome) -> Iterator[str]:
    yield ", ".join(f"{name} {version}" for name, version in versions().items())
    yield ", ".join(f"{name} {value}" for name, value in machine(outcome.device).items())
    yield from outcome.notes
    case = ""
    for row in outcome.rows:
        if row.case != case:
            case = row.case
            yield ""
            yield case
            yield f"  {'':<18}{'median':>10}{'spread':>8}{'floor':>10}{'bytes':>11}  "
        size = row.wire_bytes if row.wire_bytes is not None else row.added_bytes
        kind = "" if size is None else " on the wire" if row.wire_bytes is not None else " added"
        floor = "" if row.floor_s is None else seconds(row.floor_s)
        yield (
            f"  {row.name:<18}{seconds(row.median_s):>10}{row.spread:>8.0%}{floor:>10}"
            f"{'' if size is None else amount(size):>11}{kind}{_ratios(row)}"
        )
        more = "".join(f"; {name} {value:.3g}" for name, value in row.more.items())
        yield f"    {row.what.split(': ', 1)[1]}{more}"


def _ratios(row: Row) -> str:
    texts = []
    for name, ratio in row.ratio_to.items():
        size = f" ({row.bytes_ratio_to[name]:.3g} bytes)" if name in row.bytes_ratio_to else ""
        texts.append(f"{ratio:.2f}{size} of {name}")
    return "  " + ", ".join(texts) if texts else ""


def seconds(value: float) -> str:
    """1.23 s, 45.6 ms or 78.9 µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def amount(num_bytes: float) -> str:
    """Bytes, KiB, MiB or GiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.4g} {unit}"
    return f"{num_bytes:.0f} B"
