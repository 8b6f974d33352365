"""The heartbeat of a run: RUN/heartbeat.json, which rank 0 replaces every few seconds while it trains.

A scheduler or a person can read it. `clae status` judges it (status.py): the time in it is that of rank 0's host, and the time
of the file that of the storage, so that a clock that is off is noticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clae_dist.reading import (
    Check,
    ReadError,
    expect,
    is_count,
    is_list_of,
    is_number,
    is_text,
    open_regular,
    or_none,
    parse_object,
)
from clae_dist.runs.folder import RunFolder

EVERY_S = 5.0
_MAX_BYTES = 256 << 10
_MAX_HOSTS = 64  # that are named


@dataclass(frozen=True)
class Heartbeat:
    """Times are in seconds since 1970, by the clock of `host`, where rank 0 runs as process `pid`."""

    time: float
    start: float  # when this start began
    step: int
    total: int  # steps of the run; 0 while it is not known
    phase: str
    quiet_s: float  # since the last progress
    limit_s: float  # after which the watchdog ends this start; 0: never
    ranks: int
    host: str
    pid: int
    hosts: list[str] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)  # the last of images_per_s, loss, epoch, goodput
    checkpoint: int | None = None
    slow: str = ""  # the slow rank, if any
    written: float = field(default=0.0, compare=False)  # time of the file, by the storage's clock


_FIELDS: dict[str, Check] = {
    **dict.fromkeys(("time", "start", "quiet_s", "limit_s"), is_number),
    **dict.fromkeys(("step", "total", "ranks", "pid"), is_count),
    **dict.fromkeys(("phase", "host", "slow"), is_text),
    "hosts": is_list_of(is_text),
    "metrics": lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
    "checkpoint": or_none(is_count),
}


def write_heartbeat(run_dir: Path, beat: Heartbeat) -> None:
    """Replace the heartbeat as a whole. Not forced to the disk: after a power cut it is of no use. Raises OSError."""
    content = asdict(beat)
    del content["written"]
    content["hosts"] = beat.hosts[:_MAX_HOSTS]
    path = RunFolder(run_dir).heartbeat_file
    temporary = path.with_name(f".tmp-{beat.pid}-{path.name}")
    try:
        temporary.write_text(json.dumps(content) + "\n")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_heartbeat(run_dir: Path) -> Heartbeat | None:
    """The newest heartbeat; None without one, and for one that cannot be read."""
    try:
        with open_regular(RunFolder(run_dir).heartbeat_file) as file:
            content = parse_object(file.read(_MAX_BYTES))
            written = os.fstat(file.fileno()).st_mtime
        expect(content, _FIELDS)
    except (OSError, ReadError):
        return None
    return Heartbeat(**{key: content[key] for key in _FIELDS}, written=written)
