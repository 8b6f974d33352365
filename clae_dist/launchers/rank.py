"""The work of a rank under every launcher: join the world, train, report the ending."""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, TextIO

from clae_dist.config import Config
from clae_dist.data.loader import share_imports
from clae_dist.data.urls import redact_text
from clae_dist.errors import OK, STOPPED, STORAGE, UNEXPECTED, ClaeError, ConfigError, restarts
from clae_dist.escape import shown_lines
from clae_dist.launchers.environment import check_interface
from clae_dist.launchers.output import Output
from clae_dist.launchers.terminal import Terminal
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.mirror import send_file
from clae_dist.storage import storage_error
from clae_dist.training.train import train
from clae_dist.world import World, connect


@dataclass(frozen=True)
class Ending:
    """How a rank's part of a run ended."""

    code: int
    message: str  # one readable line; "" when all is well
    again: bool = False  # a restart may succeed (errors.py)


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


def run_rank(recipe: Recipe, also: TextIO | None, *, debug: bool = False) -> Ending:
    """Train as the rank that the environment names. What all ranks raise together comes back as an Ending.

    Raises RankBroke for anything else, so that a launcher that restarts ranks sees it.
    """
    config = recipe.config
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if size > 1:
            check_interface()
        if config.launch.launcher != "ray":  # Ray's workers have threads of its own
            share_imports(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        with connect(config.guard.timeout_s, config.launch.device) as world:
            return _train(recipe, world, Console(config, also), debug=debug)
    except ConfigError as error:  # of all ranks, before they communicate
        return Ending(error.exit_code, str(error))
    except Exception as error:
        storage = storage_error(error)  # on the rank that writes, in the middle of anything
        reason = " ".join(redact_text(str(storage or f"{type(error).__name__}: {error}")).split())
        what = f"rank {rank} of {size}: {reason if storage else reason[:220]}"
        code = STORAGE if storage else UNEXPECTED
        log = RunFolder(config.folder).error_log(rank)
        try:
            log.write_text(shown_lines(redact_text(traceback.format_exc())))
            send_file(log, config.folder)
        except OSError:
            raise RankBroke(what, code) from error
        raise RankBroke(f"{what} (traceback: {log})", code) from error


def _train(recipe: Recipe, world: World, stream: Console, *, debug: bool) -> Ending:
    try:
        outcome = train(recipe, world, stream)  # type: ignore[arg-type]
    except ClaeError as error:
        if not error.on_all_ranks:
            raise
        if debug and world.is_main:
            print(shown_lines(traceback.format_exc()), end="", file=sys.stderr)
        return Ending(error.exit_code, str(error))
    finally:
        stream.end()
    return Ending(STOPPED if outcome.status == "stopped" else OK, "")
