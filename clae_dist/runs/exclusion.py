"""Hosts that a run excludes: they ended two starts in a row without a new checkpoint between, and were not readmitted.

All of it follows from RUN/ends.jsonl and RUN/readmitted.json, so that every host comes to the same result.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from clae_dist.errors import ConfigError
from clae_dist.files import write_atomically
from clae_dist.reading import MissingError, ReadError, is_number, is_text, read_object
from clae_dist.runs.ends import End, host_at_fault, read_ends
from clae_dist.runs.folder import RunFolder
from clae_dist.staging import shown_path

_MAX_BYTES = 1 << 20


def excluded_hosts(run_dir: Path) -> dict[str, End]:
    """The hosts, each with its newest such end; the host that failed last is the last one."""
    ends, readmitted = read_ends(run_dir), _readmitted(run_dir)
    starts = [end.start for end in ends]
    since = {host: starts.index(start) if start in starts else -1 for host, start in readmitted.items()}
    excluded: dict[str, End] = {}
    for number, pair in enumerate(pairwise(ends)):
        host = host_at_fault(pair)
        if host and number > since.get(host, -1):
            excluded.pop(host, None)
            excluded[host] = pair[1]
    return excluded


def readmit(run_dir: Path, host: str) -> None:
    """Use a host again: its ends so far do not count. Raises ConfigError for one that is not excluded."""
    excluded = excluded_hosts(run_dir)
    if host not in excluded:
        names = ", ".join(excluded) or "none"
        raise ConfigError(f"--readmit is {host!r}, which {shown_path(run_dir)} does not exclude; excluded hosts: {names}.")
    starts = {**_readmitted(run_dir), host: read_ends(run_dir)[-1].start}
    write_atomically(RunFolder(run_dir).readmitted_file, f"{json.dumps(starts)}\n".encode())


def _readmitted(run_dir: Path) -> dict[str, float]:
    """The newest start that had ended when each host was readmitted."""
    try:
        content = read_object(RunFolder(run_dir).readmitted_file, _MAX_BYTES)
    except (MissingError, ReadError, OSError):
        return {}
    return {host: start for host, start in content.items() if is_text(host) and is_number(start)}


def why_excluded(host: str, end: End, run_dir: Path) -> str:
    """The reason, and the way back."""
    return (
        f"{host} ended two starts in a row without a new checkpoint between, the second by {end.cause} ({end.text[:160]}). "
        f"Once it is repaired, `clae status {shown_path(run_dir)} --readmit {host}` uses it again."
    )
