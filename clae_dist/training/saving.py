"""Schedule of checkpoints, and the coordination of ranks that save them.

A save copies to host memory, on a GPU beside the next step; a thread of each rank writes. Collectives stay in the loop: the
state of the write (in progress, failed) is part of the flags that ranks exchange in every step. Once all ranks have written,
rank 0 renames the checkpoint.
"""

from __future__ import annotations

import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from clae_dist.data.urls import redact_text
from clae_dist.errors import CheckpointError
from clae_dist.parallel import Backend
from clae_dist.runs.checkpoint import Writer
from clae_dist.storage import StorageError
from clae_dist.training.clock import Clock
from clae_dist.training.session import Session


@dataclass
class _Pending:
    """A checkpoint that is not committed yet."""

    step: int
    info: dict[str, Any]
    committing: bool = False


class Saving:
    """The checkpoints of a run. Collective, except for `flags` and `close`."""

    def __init__(self, session: Session, backend: Backend, clock: Clock) -> None:
        self._session, self._world, self._backend, self._clock = session, session.world, backend, clock
        world = session.world
        self._writer = Writer(
            session.config.folder, world.rank, world.size, world.broadcast(uuid.uuid4().hex[:8]), world.device
        )
        self._pending: _Pending | None = None
        self._last = time.monotonic()
        self._waited = False

    def reserve(self, step: int, last_step: int) -> None:
        """Reserve host memory in the background, once the optimiser has a state, if a save will come during training."""
        settings = self._session.config.checkpoint
        next_step = settings.every_steps and (step // settings.every_steps + 1) * settings.every_steps
        if settings.every_minutes or 0 < next_step < last_step:
            self._writer.reserve(self._backend.pieces())

    def flags(self) -> tuple[bool, bool, bool]:
        """This rank's flags: time to save (by rank 0's clock), write in progress, write failed."""
        minutes = self._session.config.checkpoint.every_minutes
        due = self._world.is_main and 0 < minutes <= (time.monotonic() - self._last) / 60
        busy = self._writer.busy  # asked first: a thread says what failed before it ends
        return due, busy, bool(self._writer.problem)

    def hear(self, busy: bool, failed: bool) -> None:
        """Handle the flags of all ranks; commit a checkpoint that all have written. Raises CheckpointError."""
        if self._pending is None:
            return
        if failed:
            self._give_up(self._pending)
        if busy:
            return
        if self._pending.committing:
            self._pending = None
            return
        self._pending.committing = True
        if self._world.is_main:
            settings = self._session.config.checkpoint
            self._writer.commit(
                self._pending.step,
                self._backend.describe(),
                self._pending.info,
                settings.keep,
                settings.keep_every_hours * 3600,
            )

    def save(self, step: int, info: dict[str, Any], *, last: bool = False) -> float:
        """Begin to save the state after `step` steps; after the last one, the caller calls `settle` next.

        Returns the seconds that the host waited. Raises CheckpointError.
        """
        start = time.perf_counter()
        if self._pending is not None:
            if not self._waited:
                self._waited = True
                self._session.say(
                    f"the checkpoint of step {step} waits for that of step {self._pending.step} to be written: "
                    "storage is slower than checkpoint.every_steps and checkpoint.every_minutes ask for."
                )
            self.settle()
        self._backend.average_local_statistics()
        self._pending = _Pending(step, info)
        copied = self._writer.begin(step, self._backend.pieces(), unchanged=last)
        if copied is not None:
            self._backend.wait_for_copy = lambda: self._wait_for(copied)
        self._last = time.monotonic()
        return time.perf_counter() - start

    def _wait_for(self, copied: torch.cuda.Event) -> None:
        """Let the device wait for the end of a copy; its time, if any is left to wait for, counts as "checkpoint"."""
        with self._clock.timed("checkpoint"):
            torch.cuda.current_stream(self._world.device).wait_event(copied)

    def settle(self) -> None:
        """Wait until the checkpoint in progress, if any, is committed. Raises CheckpointError."""
        while self._pending is not None:
            self._writer.join()
            _, *raised = self.flags()
            self.hear(*self._world.flags_anywhere(*raised))

    def close(self) -> None:
        """End this rank's thread. A checkpoint in progress is abandoned; the next start removes its files."""
        self._writer.cancel()

    def _give_up(self, pending: _Pending) -> None:
        self._writer.cancel()
        failed = self._writer.failure
        broke = failed is not None and not isinstance(failed, StorageError)
        if broke:
            self._keep_traceback(failed)
        problems = [pair for pair in self._world.gather_objects((self._writer.problem, broke)) if pair[0]]
        folder = self._session.folder
        if self._world.is_main:
            self._writer.discard(pending.step)
        older = self._world.broadcast([path.name for path in folder.find_checkpoints()])
        rest = f"{older[0]} is untouched" if older else "there is no older one"
        what = f"the checkpoint of step {pending.step} could not be written"
        if unexpected := [text for text, broke in problems if broke]:
            raise RuntimeError(f"{what} ({unexpected[0]}), and not because of storage; {rest}")
        raise CheckpointError(
            f"{what} to {folder.checkpoints} ({problems[0][0].removesuffix('.')}); {rest}. "
            "Then start the same command again: it resumes from there."
        )

    def _keep_traceback(self, failure: Exception | None) -> None:
        """Write the failed thread's traceback to the rank's error log in the run folder."""
        log = self._session.folder.error_log(self._world.rank, "checkpoint")
        with suppress(OSError):
            log.write_text(redact_text("".join(traceback.format_exception(failure))))
