"""The work of a rank under every launcher: join the world, train, report the ending."""

from __future__ import annotations

import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

from clae_dist.causes import cause_of, digest_of, exit_code_of
from clae_dist.config import Config
from clae_dist.data.loader import share_imports
from clae_dist.data.urls import redact_text
from clae_dist.errors import FAILED, OK, STOPPED, UNEXPECTED, Cause, ClaeError, ConfigError, restarts
from clae_dist.escape import say, shown_lines
from clae_dist.launchers.environment import check_interface
from clae_dist.launchers.exclusion import Exclusion, decide, end_this_host, is_elastic, meet_hosts
from clae_dist.launchers.output import Output
from clae_dist.launchers.terminal import Terminal
from clae_dist.recipe import Recipe
from clae_dist.runs.ends import Attempt, read_ends, repeated_crash
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.mirror import fetch_ends, send_file
from clae_dist.staging import shown_path
from clae_dist.storage import storage_error
from clae_dist.training.flight_recorder import dump, switch_on
from clae_dist.training.guard import is_preemption
from clae_dist.training.train import train
from clae_dist.world import World, connect

START = "CLAE_START"  # when the local launcher started these ranks, in seconds since 1970


@dataclass(frozen=True)
class Ending:
    """How a rank's part of a run ended."""

    code: int
    message: str  # one readable line; "" when all is well
    again: bool = False  # a restart may succeed (errors.py)
    cause: Cause | Literal[""] = field(default="", compare=False)
    vanished: int | None = field(default=None, compare=False)  # the rank that left without a word


class Console:
    """A text stream that writes to the run folder's console.log, and to another stream where there is one."""

    def __init__(self, config: Config, also: TextIO | None) -> None:
        self._path = RunFolder(config.folder).console_file
        self._also = None if also is None else Output(also)
        self._bar: Any = also
        self._missed = False

    def write(self, text: str) -> int:
        shown = redact_text(text)
        if self._also is not None:
            self._also.write(shown)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(shown)
        except OSError as error:  # a full disk: training goes on
            if self._also is not None and not self._missed:
                self._also.write(f"{self._path} cannot be written ({error.strerror}): lines will be missing there.\n")
            self._missed = True
        return len(text)

    def flush(self) -> None:
        if self._also is not None:
            self._also.flush()

    def end(self) -> None:
        """A terminal's bar, if there is one, stays as it is; what is said later comes below."""
        if isinstance(self._bar, Terminal):
            self._bar.close()


class RankBroke(RuntimeError):
    """An error that this rank alone has seen; the message is a line, the traceback is in the run folder if it has room.

    `code` is what `clae` ends with where the ranks are not started again.
    """

    exit_code = UNEXPECTED  # of the rank, by which a launcher that sees nothing else tells it from an end for good

    def __init__(self, message: str, code: int = UNEXPECTED) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[RankBroke], tuple[str, int]]:
        return RankBroke, (str(self), self.code)

    def ending(self) -> Ending:
        """For launchers that hear from their ranks."""
        return Ending(self.code, str(self), again=restarts(self.exit_code))


def run_rank(recipe: Recipe, also: TextIO | None, *, debug: bool = False, num_ends: int | None = None) -> Ending:
    """Train as the rank that the environment names. What all ranks raise together comes back as an Ending.

    Args:
        num_ends: the number of ends in the run folder when the launcher began, where ranks that are started again by somebody
            else (torchrun, Ray) find out by themselves that another start would crash, too.

    Raises RankBroke for anything else, so that a launcher that restarts ranks sees it.
    """
    config = recipe.config
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    attempt = Attempt(float(os.environ.get(START, 0)) or time.time())
    try:
        if size > 1:
            check_interface()
        if config.launch.launcher != "ray":  # Ray's workers have threads of its own
            share_imports(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        switch_on(config.folder)
        with connect(config.guard.timeout_s, config.launch.device) as world:
            if num_ends is not None:
                useless: Ending | None = world.run_on_main(lambda: _useless(config, num_ends))
                if useless:
                    return useless
                if excluded := _exclude_hosts(config, world, Console(config, also), attempt):
                    return excluded
            return _train(recipe, world, Console(config, also), attempt, debug=debug)
    except RankBroke:
        raise
    except ConfigError as error:  # of all ranks, before they communicate
        return Ending(error.exit_code, str(error))
    except Exception as error:
        raise _broke(error, config, rank, size, attempt) from error


def _exclude_hosts(config: Config, world: World, console: Console, attempt: Attempt) -> Ending | None:
    """End this start if a host of it is excluded: for good, or, where torchrun is elastic, for the ranks of that host alone.

    Collective. Raises RankBroke on the other ranks of an elastic torchrun, which start again without the host.
    """
    places = meet_hosts(world)
    attempt.addresses = {place.address: place.host for place in places if place.address}
    if config.launch.launcher != "torchrun":
        return None
    exclusion: Exclusion | None = world.run_on_main(lambda: decide(config, places))
    if exclusion is None:
        return None
    if world.is_main:
        say(exclusion.text, file=console, flush=True)
    if not exclusion.hosts:
        return None
    if not is_elastic():
        return Ending(FAILED, f"{exclusion.text} The same command resumes from the newest checkpoint.", cause="host")
    if places[world.rank].host in exclusion.hosts:
        end_this_host(exclusion.text, world.local_rank)
    raise RankBroke("")


def _broke(error: Exception, config: Config, rank: int, size: int, attempt: Attempt) -> RankBroke:
    """Write down an error that this rank alone has seen: its traceback, its cause, and what NCCL has recorded."""
    storage = storage_error(error)  # on the rank that writes, in the middle of anything
    cause = cause_of(error)
    reason = " ".join(redact_text(str(storage or f"{type(error).__name__}: {error}")).split())
    what = f"rank {rank} of {size}: {reason if storage else reason[:220]}"
    code = exit_code_of(cause)
    attempt.end(config.folder, rank, size, cause, code, reason, digest_of(error))
    if size > 1 and cause in ("network", "host", "code"):
        dump(config.folder, rank)
    log = RunFolder(config.folder).error_log(rank)
    try:
        log.write_text(shown_lines(redact_text(traceback.format_exc())))
        send_file(log, config.folder)
    except OSError:
        return RankBroke(what, code)
    return RankBroke(f"{what} (traceback: {shown_path(log)})", code)


def _useless(config: Config, num_ends: int) -> Ending | None:
    """On rank 0, whose node may be another than that of earlier starts."""
    fetch_ends(config.folder)
    return useless_restart(config, num_ends)


def useless_restart(config: Config, num_ends: int) -> Ending | None:
    """The ending of a run whose next start would crash like the last two, of which one came after the first `num_ends`."""
    ends = read_ends(config.folder)
    crash = repeated_crash(ends) if len(ends) > num_ends else None
    if crash is None:
        return None
    log = RunFolder(config.folder).error_log(crash.rank)
    place = f"after the checkpoint of step {crash.checkpoint}" if crash.checkpoint is not None else "before any checkpoint"
    text = (
        f"rank {crash.rank} has failed twice in the same way {place}, and is not started a third time: {crash.text[:220]}. "
        f"Read {shown_path(log)}, run the same command with --debug and launch.workers=1, or repeat a recorded step with "
        "`clae replay`; the same command resumes from the newest checkpoint."
    )
    return Ending(crash.code, text, cause=crash.cause)


def _train(recipe: Recipe, world: World, stream: Console, attempt: Attempt, *, debug: bool) -> Ending:
    try:
        outcome = train(recipe, world, stream, attempt)  # type: ignore[arg-type]
    except ClaeError as error:
        if not error.on_all_ranks:
            raise
        if debug and world.is_main:
            print(shown_lines(traceback.format_exc()), end="", file=sys.stderr)
        # The folder of a refused start may belong to another run, or to another process.
        if world.is_main and attempt.holds_lease and (attempt.opened or error.cause != "configuration"):
            attempt.end(recipe.config.folder, 0, world.size, error.cause, error.exit_code, str(error), digest_of(error))
        return Ending(error.exit_code, str(error), cause=error.cause)
    finally:
        stream.end()
    cause: Cause = "finished"
    if outcome.status == "stopped":
        cause = "preemption" if is_preemption(outcome.reason) else "stopped"
    code = OK if cause == "finished" else STOPPED
    if world.is_main and attempt.trained:
        attempt.end(recipe.config.folder, 0, world.size, cause, code, outcome.reason)
    return Ending(code, "", cause=cause)
