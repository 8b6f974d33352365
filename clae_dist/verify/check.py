"""A check of `clae verify`, the subject that all checks share, and a check's verdict."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clae_dist.config import Config
from clae_dist.devices import Request
from clae_dist.parity.run import tiny
from clae_dist.recipe import Recipe

State = Literal["pass", "fail", "skipped"]
Precision = Literal["float64", "float32", "bfloat16"]
ROWS = 4  # images per rank in the checks that train


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Args:
        figure: the main figure, in the table.
        reason: the cause of a failure, or why the check was skipped.
        figures: all figures, in the JSON file.
        error: the traceback of an unexpected error.
    """

    state: State
    figure: str = ""
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @staticmethod
    def of(problems: Sequence[str], figure: str, **figures: Any) -> Verdict:
        """A pass without problems, otherwise a failure that names them."""
        return Verdict("fail" if problems else "pass", figure, "; ".join(problems), figures)


class SkippedError(Exception):
    """The check does not apply on this machine; the message is the reason. All ranks raise it together."""


@dataclass(frozen=True)
class Subject:
    """The machine and recipe to be verified.

    Args:
        words: CONFIG and key=value as on the command line, for checks that run other commands.
        folder: results; `work` below it holds temporary files that all hosts must see.
        workers: ranks on this machine.
        limit_s: time limit of a check.
    """

    recipe: Recipe
    words: tuple[str, ...]
    folder: Path
    workers: int
    device: Request
    quick: bool
    limit_s: float

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def tiny(self, world_size: int, precision: Precision, **sections: Any) -> Config:
        """The settings with few rows in `precision`; `sections` are whole sections of Config."""
        config = tiny(self.recipe, world_size=world_size, rows=ROWS)
        return replace(config, **{"train": replace(config.train, precision=precision), **sections})


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Args:
        what: a description in a few words.
        runs_on: "ranks": run(subject, world) on every rank, all of which return alike or name a problem; "host": run(subject)
            in one process, which starts commands of its own.
    """

    name: str
    what: str
    runs_on: Literal["ranks", "host"]
    run: Callable[..., Verdict]


def failure(error: Exception, rank: int | None = None) -> Verdict:
    """The verdict of an unexpected error."""
    where = "" if rank is None else f"rank {rank}: "
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    text = "".join(traceback.format_exception(error))
    return Verdict("fail", reason=f"{where}{type(error).__name__}: {lines[0]}", error=text)


def verdict_of(run: Callable[[], Verdict], rank: int | None = None) -> Verdict:
    """The verdict that `run` returns; an error of it is a failure."""
    try:
        return run()
    except SkippedError as skipped:
        return Verdict("skipped", reason=str(skipped))
    except Exception as error:
        return failure(error, rank)


def merged(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of all ranks: the first failure, otherwise that of rank 0."""
    for rank, verdict in enumerate(verdicts):
        if verdict.state == "fail":
            named = verdict.reason if rank == 0 or verdict.reason.startswith("rank ") else f"rank {rank}: {verdict.reason}"
            return replace(verdict, reason=named)
    return verdicts[0]
