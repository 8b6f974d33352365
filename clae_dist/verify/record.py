"""The record of `clae verify`: a table for people and verify.json for programs, written after every check."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from clae_dist.bench.outcome import machine, versions
from clae_dist.escape import shown
from clae_dist.files import make_folders, write_together
from clae_dist.keys import flatten
from clae_dist.redact import redact_text
from clae_dist.verify.check import Check, Subject, Verdict
from clae_dist.wording import count_of

FORMAT = "clae-dist verify 1"
JSON_FILE, TEXT_FILE = "verify.json", "verify.txt"
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Entry:
    check: Check
    verdict: Verdict
    seconds: float


class Record:
    """The verdicts so far. `say` prints a line of progress."""

    def __init__(self, subject: Subject, launcher: str, num_ranks: int, checks: list[Check], say: Say) -> None:
        self._subject, self._checks, self._say = subject, checks, say
        self._entries: list[_Entry] = []
        self._begin = time.time()
        self._ended = ""
        config = subject.recipe.config
        self._header = {
            "format": FORMAT,
            "versions": versions(),
            "machine": machine(torch.device("cpu")),
            "launcher": launcher,
            "ranks": num_ranks,
            "device": subject.device,
            "quick": subject.quick,
            "command": list(subject.words),
            "configuration": flatten(config),
            "started": self._begin,
        }
        make_folders(subject.folder)
        self.write()

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [entry.check.name for entry in self._entries if entry.verdict.state == "fail"]

    def begin(self, check: Check) -> None:
        self._say(f"[{len(self._entries) + 1}/{len(self._checks)}] {check.name}: {check.what}")

    def add(self, check: Check, verdict: Verdict, seconds: float) -> None:
        """Add a verdict, print its line and write both files."""
        self._entries.append(_Entry(check, verdict, seconds))
        self._say(f"    {verdict.state}, {seconds:.1f} s: {_told(verdict)}")
        self.write()

    def end(self, how: str) -> None:
        """Write both files for the last time. `how`: "finished", "interrupted" or "hung"."""
        self._ended = how
        self.write()

    def write(self) -> None:
        entries = [
            {
                "check": entry.check.name,
                "what": entry.check.what,
                "verdict": entry.verdict.state,
                "figure": entry.verdict.figure,
                "reason": entry.verdict.reason,
                "seconds": round(entry.seconds, 3),
                "figures": entry.verdict.figures,
                "error": entry.verdict.error,
            }
            for entry in self._entries
        ]
        content = {
            **self._header,
            "seconds": round(time.time() - self._begin, 3),
            "ended": self._ended or "running",
            "passed": self._ended == "finished" and not self.failed,
            "not_run": [check.name for check in self._checks[len(self._entries) :]],
            "checks": entries,
        }
        folder = self._subject.folder
        text = json.dumps(_without_secrets(content), indent=1, default=str)
        table = "".join(f"{line}\n" for line in self.table())
        write_together({folder / JSON_FILE: text.encode(), folder / TEXT_FILE: redact_text(table).encode()})

    def table(self) -> Iterator[str]:
        """The lines of the table: check, verdict, seconds, figure or reason."""
        width = max([len(check.name) for check in self._checks], default=0)
        for entry in self._entries:
            verdict = entry.verdict
            yield f"{entry.check.name:<{width}}  {verdict.state:<7}  {entry.seconds:>6.1f} s  {_told(verdict)}"
        for check in self._checks[len(self._entries) :]:
            yield f"{check.name:<{width}}  not run"
        states = [entry.verdict.state for entry in self._entries]
        counts = [f"{states.count('pass')} passed", f"{states.count('fail')} failed", f"{states.count('skipped')} skipped"]
        total = sum(entry.seconds for entry in self._entries)
        details = self._subject.folder / JSON_FILE
        yield f"{count_of(len(states), 'check')}: {', '.join(counts)}, in {total:.0f} s; details: {details}"


def _told(verdict: Verdict) -> str:
    return shown("; ".join(part for part in (verdict.reason, verdict.figure) if part))


def _without_secrets(value: Any) -> Any:
    """The value for JSON, without secrets and non-finite numbers."""
    if isinstance(value, dict):
        return {key: _without_secrets(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_secrets(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return redact_text(value) if isinstance(value, str) else value
