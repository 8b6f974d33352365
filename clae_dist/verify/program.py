"""Other commands of `clae`, run in a process of their own with a time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clae_dist.errors import ClaeError

# Variables by which a launcher describes a rank: a command that is started by a rank must not take itself for one.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "CLAE_ENDING")
_PREFIXES = ("TORCHELASTIC_", "ROLE_", "GROUP_", "TORCH_NCCL_ASYNC")


class CommandError(ClaeError, RuntimeError):
    """A command failed or took too long."""


@dataclass(frozen=True)
class Completed:
    """The result of a command."""

    code: int
    stdout: str
    stderr: str

    def problem(self, command: str) -> str:
        """The exit code and the end of what the command printed, in one line."""
        lines = [line.strip() for line in (self.stderr or self.stdout).splitlines() if line.strip()]
        return f"{command} ended with exit code {self.code}: {' | '.join(lines[-3:])}"


def clae(words: Sequence[object], limit_s: float) -> Completed:
    """Run `clae WORDS` to its end. Raises CommandError after `limit_s`."""
    with started(words) as (process, stdout, stderr):
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise CommandError(f"clae {words[0]} had not ended after {limit_s:g} s") from None
        return Completed(code, stdout.read_text(errors="replace"), stderr.read_text(errors="replace"))


def bench(name: str, quick: bool, limit_s: float) -> dict[str, Any]:
    """The JSON of `clae bench NAME`. Raises CommandError."""
    done = clae(["bench", name, "--json", *(["--quick"] if quick else [])], limit_s)
    if done.code:
        raise CommandError(done.problem(f"clae bench {name}"))
    content: dict[str, Any] = json.loads(done.stdout)
    return content


@contextmanager
def started(words: Sequence[object]) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
    """A running `clae WORDS` with the files of its output; killed at the end, and if this process dies."""
    with tempfile.TemporaryDirectory(prefix="clae-verify-") as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        lifetime = [sys.executable, "-m", "clae_dist.lifetime", str(os.getpid())]
        with stdout.open("wb") as out, stderr.open("wb") as err:
            process = subprocess.Popen(
                [*lifetime, sys.executable, "-m", "clae_dist", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=_environment(),
                start_new_session=True,  # Ctrl-C on the terminal is for this process, which ends the command
            )
        try:
            yield process, stdout, stderr
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK and not name.startswith(_PREFIXES)}
    return {**kept, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path), "PYTHONUNBUFFERED": "1"}
