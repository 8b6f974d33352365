"""Read files that benches of the user's machine wrote; their figures replace those of the table.

A file of another machine or version is refused, unless forced: its figures would be taken for those of the machine planned for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from clae_dist.errors import ConfigError
from clae_dist.planner.table import Chip, Fsdp2Costs
from clae_dist.planner.timing import Rates, Sample, fit_rates
from clae_dist.reading import ReadError, is_number, read_object
from clae_dist.wire import Network, fit
from clae_dist.wording import count_of

_ONE_OF = "the output of `clae bench step|gather|data|checkpoint --json`, or verify.json"
_VERSIONS = ("clae-dist", "torch")
_SHARES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


@dataclass(frozen=True)
class Here:
    """The versions and the machine of this process, as benches write them."""

    versions: Mapping[str, Any]
    machine: Mapping[str, Any]


@dataclass(frozen=True)
class RealStep:
    """A step of one real rank with the shapes of `ranks`, in which no message took time.

    Median seconds, their interquartile range over it, the peak memory of the rank and as it was planned.
    """

    ranks: int
    seconds: float
    spread: float
    peak_bytes: int
    planned_bytes: float


@dataclass
class Measured:
    """The figures of all files, and of a real step if one was measured. None or empty: not measured."""

    samples: list[Sample] = field(default_factory=list)
    networks: dict[tuple[str, int], Network] = field(default_factory=dict)
    augment_s: float = 0.0  # an image, all views, on the device
    fsdp2: Fsdp2Costs = field(default_factory=Fsdp2Costs)
    images_per_core_s: float = 0.0
    written_bytes_per_s: float = 0.0
    blocked_s_per_byte: float = 0.0
    files: list[str] = field(default_factory=list)
    real_step: RealStep | None = None

    def rates(self) -> Rates | None:
        """None if no step was measured."""
        if not self.samples:
            return None
        sources = [*self.files, *([f"--as-if-world {self.real_step.ranks}"] if self.real_step else [])]
        return fit_rates(self.samples, f"fitted to {count_of(len(self.samples), 'step')} of {', '.join(sources)}")


def read_measured(paths: Sequence[Path], chip: Chip, here: Here, *, force: bool) -> Measured:
    """Raises ConfigError for a file that is none of a bench, and for one of another machine or version."""
    measured = Measured()
    for path in paths:
        content = _read(path)
        if not force:
            _check(path, content, chip, here)
        rows = list(_rows(content))
        known = [_take(row, measured) for row in rows]
        if not any(known):
            raise ConfigError(f"--measured {path} has no row that a plan can use; give {_ONE_OF}.")
        measured.files.append(path.name)
    return measured


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_object(path)
    except (OSError, ReadError, json.JSONDecodeError) as error:
        raise ConfigError(f"--measured {path} cannot be read ({error}); give {_ONE_OF}.") from None
    if not isinstance(content.get("versions"), dict) or not isinstance(content.get("machine"), dict):
        raise ConfigError(f"--measured {path} has no versions and machine; give {_ONE_OF}.")
    return content


def _check(path: Path, content: Mapping[str, Any], chip: Chip, here: Here) -> None:
    there, machine = content["versions"], content["machine"]
    problems = [
        f"{name} {there.get(name, 'unknown')}, here it is {here.versions.get(name, 'unknown')}"
        for name in _VERSIONS
        if there.get(name) != here.versions.get(name)
    ]
    if chip.is_gpu:
        gpu = str(machine.get("gpu", "no GPU"))
        if gpu != chip.device and re.sub(r"[^a-z0-9]", "", chip.name.split("-")[0]) not in re.sub(
            r"[^a-z0-9]", "", gpu.lower()
        ):
            problems.append(f"{gpu}, but --gpu is {chip.name}")
    else:
        problems += [
            f"{name} {machine.get(name, 'unknown')!r}, here it is {here.machine.get(name)!r}"
            for name in ("cpu", "cores")
            if machine.get(name) != here.machine.get(name)
        ]
    if problems:
        raise ConfigError(
            f"--measured {path} is of another machine or version: {'; '.join(problems)}. Measure again, or add --force."
        )


def _rows(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rows of a bench, or of the checks of `clae verify`, with the number of ranks of its collectives."""
    for row in content.get("rows", ()):
        if isinstance(row, dict):
            yield row
    groups: dict[str, list[Any]] = {}
    for check in content.get("checks", ()):
        for row in check.get("figures", {}).get("rows", ()) if isinstance(check, dict) else ():
            if isinstance(row, dict) and "collective" in row:
                groups.setdefault(str(row["collective"]), []).append(row)
            elif isinstance(row, dict):
                yield row
    for name, rows in groups.items():
        yield {"collectives": name, "ranks": content.get("ranks", 0), "rows": rows}


def _take(row: Mapping[str, Any], measured: Measured) -> bool:
    """Add a row's figures. True if it has any."""
    more = row.get("more") if isinstance(row.get("more"), dict) else {}
    assert isinstance(more, dict)
    case, name = str(row.get("case", "")), str(row.get("what", "")).split(":")[0]
    kinds: list[tuple[bool, Callable[[], None]]] = [
        (is_number(more.get("kernel_bytes")), lambda: _take_step(row, more, measured)),
        (is_number(more.get("alpha_s")), lambda: _take_network(case, name, more, measured)),
        (is_number(more.get("unit_s")), lambda: _take_unit(more, measured)),
        ("collectives" in row, lambda: _take_collectives(row, measured)),
        ("host-ready batch" in case and name == "ours", lambda: _take_data(more, measured)),
        ("each stage" in case and name == "augment", lambda: _take_augmentation(row, measured)),
        (is_number(more.get("committed_s")), lambda: _take_checkpoint(row, more, measured)),
    ]
    for applies, take in kinds:
        if applies:
            take()
            return True
    return False


def _take_step(row: Mapping[str, Any], more: Mapping[str, Any], measured: Measured) -> None:
    measured.samples.append(Sample(more["flops"], more["kernel_bytes"], more["kernels"], row["median_s"]))


def _take_network(case: str, name: str, more: Mapping[str, Any], measured: Measured) -> None:
    found = re.search(r"(\d+) ranks", case)
    if found:
        measured.networks[name, int(found[1])] = Network(more["alpha_s"], more["beta_s_per_byte"], more.get("fit_error", 0.0))


def _take_unit(more: Mapping[str, Any], measured: Measured) -> None:
    # An older version's file, which --force accepts, has fewer.
    measured.fsdp2 = Fsdp2Costs(**{one.name: more[one.name] for one in fields(Fsdp2Costs) if is_number(more.get(one.name))})


def _take_collectives(row: Mapping[str, Any], measured: Measured) -> None:
    name, ranks = row["collectives"], int(row["ranks"])
    if name in _SHARES and ranks > 1:
        sent = [_SHARES[name] * one["bytes"] * (ranks - 1) / ranks for one in row["rows"]]
        measured.networks[name.replace("-", "_"), ranks] = fit(sent, [one["seconds"] for one in row["rows"]])


def _take_data(more: Mapping[str, Any], measured: Measured) -> None:
    measured.images_per_core_s = more["images_per_s"]


def _take_augmentation(row: Mapping[str, Any], measured: Measured) -> None:
    measured.augment_s = row["median_s"]


def _take_checkpoint(row: Mapping[str, Any], more: Mapping[str, Any], measured: Measured) -> None:
    measured.written_bytes_per_s = more["written_bytes"] / more["committed_s"]
    measured.blocked_s_per_byte = row["median_s"] / more["written_bytes"]
