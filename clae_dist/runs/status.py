"""State of a run for `clae status`: alive, slow, hung, dead, or ended, with since when and why.

Clocks of two machines may differ. A run of another machine is alive if its heartbeat is recent, or, where clocks disagree, if
the heartbeat changes while it is watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clae_dist.errors import FAILED, HUNG, OK, STOPPED
from clae_dist.escape import shown
from clae_dist.lease import Holder, holder_of
from clae_dist.runs.ends import End, newest_step, read_ends
from clae_dist.runs.exclusion import excluded_hosts, why_excluded
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.goodput import account, read_lines
from clae_dist.runs.heartbeat import EVERY_S, Heartbeat, read_heartbeat
from clae_dist.wording import count_of

State = Literal["new", "alive", "slow", "hung", "dead", "failed", "stopped", "finished"]
STALE_S = 30.0  # six heartbeats, of which some may be late: a busy disk, a paused machine
_CLOCK_OFF_S = 30.0  # a difference of clocks that is worth a line
_HUNG_SHARE = 0.5  # of the watchdog's limit
_NO_LIMIT_S = 300.0  # where there is no watchdog
_WATCH_S = 2.5 * EVERY_S


@dataclass(frozen=True)
class RunStatus:
    """The state of a run. `since` is in seconds since 1970, None if it is not known; `exit_code` is that of `clae status`."""

    folder: str
    state: State
    exit_code: int
    since: float | None
    notes: tuple[str, ...]  # about clocks and hosts
    heartbeat: Heartbeat | None
    end: End | None  # of the newest start that has ended
    checkpoint: int | None
    goodput: float | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def status_of(run_dir: Path, sleep: Callable[[float], None] = time.sleep) -> RunStatus:
    """Read the state of a run; takes some seconds where only watching the files tells if it is alive.

    Raises ConfigError if this is not a run folder.
    """
    folder = RunFolder(run_dir)
    folder.require()
    beat, ends, holder = read_heartbeat(run_dir), read_ends(run_dir), holder_of(folder.training_lease)
    end = ends[-1] if ends else None
    notes = _clock_notes(beat) if beat is not None else []
    off = bool(notes)
    for host, one in excluded_hosts(run_dir).items():
        if beat is None or beat.hosts != [host]:  # of a run on several hosts
            notes.append(f"exclude this host: {why_excluded(host, one, run_dir)}")
    ended = end is not None and (beat is None or end.start >= beat.start)
    beats = False
    if beat is not None and not ended:
        beats = _runs(beat, holder, run_dir, off=off, sleep=sleep)
        beat = read_heartbeat(run_dir) or beat
    state, since = _judge(beat, end if ended else None, holder, beats=beats, off=off)
    code = {"hung": HUNG, "dead": FAILED, "stopped": STOPPED, "failed": end.code if end else FAILED}.get(state, OK)
    lines = read_lines(run_dir)
    return RunStatus(
        str(run_dir),
        state,
        code,
        since,
        tuple(notes),
        beat,
        end,
        newest_step(run_dir),
        account(lines).shares["training"] if lines else None,
    )


def _clock_notes(beat: Heartbeat) -> list[str]:
    """A line for each pair of clocks that disagree: those of rank 0's host, of the storage and of this machine."""
    notes, writer_s, reader_s = [], beat.time - beat.written, beat.written - time.time()
    if abs(writer_s) > _CLOCK_OFF_S:
        when = "ahead of" if writer_s > 0 else "behind"
        notes.append(
            f"the clock of {beat.host} is {_duration(abs(writer_s))} {when} that of the storage: its times are not used"
        )
    if reader_s > _CLOCK_OFF_S:
        notes.append(
            f"the heartbeat is from the future: the storage's clock is {_duration(reader_s)} ahead of this machine's; "
            "the files were watched instead"
        )
    return notes


def _runs(beat: Heartbeat, holder: Holder | None, run_dir: Path, *, off: bool, sleep: Callable[[float], None]) -> bool:
    """True if rank 0 is alive: by its process on this machine, else by its heartbeat."""
    known = holder.runs() if holder else None
    if known is not None:
        return known
    age = time.time() - beat.written
    if not off:
        return age + _CLOCK_OFF_S >= 0 and age < STALE_S
    sleep(_WATCH_S)
    return read_heartbeat(run_dir) != beat


def _judge(
    beat: Heartbeat | None, end: End | None, holder: Holder | None, *, beats: bool, off: bool
) -> tuple[State, float | None]:
    """The state, and since when."""
    if end is not None:
        if end.cause == "finished":
            return "finished", end.time
        return ("failed" if end.is_failure else "stopped"), end.time
    if beat is None:
        starting = holder is not None and holder.runs() is not False
        return ("alive" if starting else "new"), (holder.since if starting and holder else None)
    if not beats:
        return "dead", beat.written
    limit_s = beat.limit_s or _NO_LIMIT_S
    silent_s = max(0.0, time.time() - beat.written)
    if silent_s > STALE_S and not off:  # the process exists and is stopped, or its storage hangs
        return "hung", beat.written
    if beat.quiet_s > _HUNG_SHARE * limit_s:
        return "hung", beat.written - beat.quiet_s
    return ("slow" if beat.slow else "alive"), beat.start


def describe(status: RunStatus) -> Iterator[str]:
    """The lines that `clae status` prints."""
    since = f" since {_clock(status.since)} ({_duration(max(0.0, time.time() - status.since))})" if status.since else ""
    yield f"{status.state}{since}"
    beat, end = status.heartbeat, status.end
    if beat is not None:
        of = f"/{beat.total}" if beat.total else ""
        hosts = f" on {', '.join(map(shown, beat.hosts[:4]))}{' …' if len(beat.hosts) > 4 else ''}" if beat.hosts else ""
        yield f"step {beat.step}{of}, {shown(beat.phase)}; {count_of(beat.ranks, 'rank')}{hosts}"
        values = [f"{beat.metrics[key]:{form}} {name}" for key, form, name in _METRICS if key in beat.metrics]
        if values:
            yield ", ".join(values)
        if beat.slow:
            yield f"slow: {shown(beat.slow)}"
        if status.state == "hung" and beat.quiet_s:
            yield f"no progress for {_duration(beat.quiet_s)} at the last heartbeat; the watchdog's limit is {beat.limit_s:g} s"
    if status.goodput is not None:
        yield f"goodput {status.goodput:.1f} %"
    yield "no checkpoint yet" if status.checkpoint is None else f"newest checkpoint: step {status.checkpoint}"
    if end is not None:
        yield f"last end, {_clock(end.time)}: {shown(end.describe())}"
    yield from map(shown, status.notes)


_METRICS = (("images_per_s", ",.0f", "images/s"), ("loss", ".4f", "loss"), ("epoch", ".2f", "epochs"))


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _duration(seconds: float) -> str:
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{seconds:.0f} s"
