"""Traces of a window of steps (train.profile_steps), one file a rank, for chrome://tracing and Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import profile, supported_activities

from clae_dist.training.session import Session
from clae_dist.wording import count_of

MOST_RANKS = 8  # that write traces: ranks do the same work, and a trace has some megabytes a step


class Profiling:
    """Records steps first … last - 1, with the names of training/clock.py's phases; nothing where no steps are asked for."""

    def __init__(self, session: Session, num_steps: int) -> None:
        window = session.config.train.profiled
        self._session, self._steps = session, window[: max(0, num_steps - window.start)]
        if window and not self._steps:
            session.say(
                f"train.profile_steps is {session.config.train.profile_steps}, but the run has {num_steps} steps: no trace"
            )
        self._began = 0
        self._profile: profile | None = None

    def at(self, step: int) -> None:
        """Start or end the recording before step `step`, counted from 0. Collective.

        A start of the run inside the window records the rest of it.
        """
        if step in self._steps and self._profile is None:
            self._session.say(f"profiling steps {step + 1} to {self._steps.stop}")
            self._began, self._profile = step, profile(activities=supported_activities(), record_shapes=True)
            self._profile.start()
        elif step == self._steps.stop and self._profile is not None:
            self._end()

    def close(self) -> None:
        """Abandon a recording that has not ended."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _end(self) -> None:
        """Write the traces. A failure to write one is printed: the run itself needs none."""
        world, recorded = self._session.world, self._profile
        assert recorded is not None
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        self.close()
        folder = self._session.folder.profile
        path = folder / f"steps-{self._began + 1}-{self._steps.stop}.rank-{world.rank}.json.gz"
        problem = _write(recorded, path) if world.rank < MOST_RANKS else ""
        problems = [text for text in world.gather_objects(problem) if text]
        if problems:
            self._session.say(f"traces could not be written to {folder} ({problems[0]}); training continues")
            return
        self._session.say(
            f"traces of {count_of(min(world.size, MOST_RANKS), 'rank')}: {folder}/{path.name.split('.')[0]}.rank-….json.gz; "
            "open one at https://ui.perfetto.dev or chrome://tracing"
        )


def _write(recorded: profile, path: Path) -> str:
    """Write a trace; the reason why it could not be written, or ""."""
    partial = path.with_name(f".{path.name}")  # the ending decides about compression
    try:
        path.parent.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(partial))
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
