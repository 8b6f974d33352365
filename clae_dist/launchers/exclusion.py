"""Exclude a host that ended two starts in a row without progress, where the launcher can.

Under an elastic torchrun (launch/torchrun.sh --nodes MIN:MAX), all ranks decide together: the host's own torchrun ends, and the
others meet again without it. A later start on that host refuses to join (`python -m clae_dist.launchers.exclusion join …`).
launch/slurm.sbatch starts the job's step again on its other nodes (`… names …`). Ray: ray_elastic.py.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clae_dist.config import Config
from clae_dist.errors import FAILED, OK, ClaeError
from clae_dist.escape import say
from clae_dist.launchers.route import route_to
from clae_dist.recipe import resolve
from clae_dist.runs.ends import End
from clae_dist.runs.exclusion import excluded_hosts, why_excluded
from clae_dist.runs.mirror import fetch_ends
from clae_dist.staging import copy_folder, url_of
from clae_dist.world import World

_NODES = "CLAE_NODES"  # MIN:MAX hosts of an elastic torchrun
_SPARE = "CLAE_SPARE_NODES"  # nodes that launch/slurm.sbatch can do without
_HEAD = "CLAE_AT_HEAD"  # "yes" on the host of the rendezvous
_GRACE_S = 30.0  # until a torchrun that was asked to end kills its ranks


@dataclass(frozen=True)
class Exclusion:
    """Hosts of this start that failed twice; `hosts` of them are excluded, for the reasons in `text`."""

    hosts: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class _Place:
    """Where a rank runs."""

    host: str
    address: str  # "" if it is not known
    at_head: bool

    @staticmethod
    def here() -> _Place:
        address = ""
        with suppress(OSError):
            address = route_to(os.environ["MASTER_ADDR"]).address if "MASTER_ADDR" in os.environ else ""
        return _Place(platform.node(), address, os.environ.get(_HEAD) == "yes")


def meet_hosts(world: World) -> list[_Place]:
    """The places of all ranks. Collective."""
    places: list[_Place] = world.gather_objects(_Place.here())
    return places


def decide(config: Config, places: Sequence[_Place]) -> Exclusion | None:
    """On rank 0: the hosts among `places` that failed twice, and those of them that can be excluded; None if there are none."""
    hosts = {place.host: place.at_head for place in sorted(places, key=lambda place: place.at_head)}
    failed = {host: end for host, end in excluded_hosts(config.folder).items() if host in hosts}
    if not failed or len(hosts) == 1:
        return None
    why = " ".join(why_excluded(host, end, config.folder) for host, end in failed.items())
    num_spare = _num_spare(len(hosts))
    # An elastic torchrun cannot go without the host of the rendezvous; Slurm's step starts with another.
    can_leave = [host for host in failed if not (is_elastic() and hosts[host])]
    leaving = can_leave[-num_spare:] if num_spare > 0 else []
    if leaving:
        return Exclusion(tuple(leaving), f"excluding {', '.join(leaving)}: {why}")
    return Exclusion((), f"{why} It is still used: {_why_not(failed, hosts)}")


def _num_spare(num_hosts: int) -> int:
    low, _, high = os.environ.get(_NODES, "").partition(":")
    return num_hosts - int(low) if high else int(os.environ.get(_SPARE, "0"))


def _why_not(failed: Mapping[str, End], hosts: Mapping[str, bool]) -> str:
    names = ", ".join(failed)
    if _num_spare(len(hosts)) > 0:
        return f"{names} has the rendezvous; start the run on the other hosts, with another --head."
    low, _, high = os.environ.get(_NODES, "").partition(":")
    if high:
        return f"--nodes is {low}:{high}, and {len(hosts)} hosts are here; start another host instead of {names}."
    return f"all {len(hosts)} hosts are needed; start another instead of {names} (Slurm: sbatch --exclude={names})."


def end_this_host(text: str, local_rank: int) -> None:
    """On each rank of a host that is excluded: end its torchrun, which ends the ranks. Returns if it does not."""
    if local_rank == 0:
        say(f"clae: {text}", file=sys.stderr, flush=True)
        with suppress(OSError):
            if path := os.environ.get("CLAE_ENDING", ""):
                Path(f"{path}.failed").write_text(f"{FAILED}\n")
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(_GRACE_S)


def is_elastic() -> bool:
    """True if torchrun continues without a host that leaves."""
    return ":" in os.environ.get(_NODES, "")


def main(arguments: Sequence[str]) -> int:
    """join CONFIG [key=value …]: 4, with the reason, if this host must not join. names CONFIG …: print the excluded hosts.

    What is wrong with settings or storage is left to `clae train`, which reports it.
    """
    action, recipe, *overrides = arguments
    try:
        folder = resolve(recipe, overrides).config.folder
        if url := url_of(folder):
            folder = copy_folder(url)
            fetch_ends(folder)
        excluded = excluded_hosts(folder)
    except (ClaeError, OSError):
        return OK
    if action == "names":
        print(" ".join(excluded))
        return OK
    low, _, high = os.environ[_NODES].partition(":")
    here, newest = platform.node(), list(excluded)[-(int(high) - int(low)) :]
    if here not in newest:
        return OK
    say(f"this host does not join: {why_excluded(here, excluded[here], folder)}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
