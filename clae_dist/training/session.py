"""The context that the parts of a training run share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from clae_dist.config import Config
from clae_dist.errors import Cause
from clae_dist.runs.ends import Attempt
from clae_dist.runs.folder import RunFolder
from clae_dist.world import World


@dataclass(frozen=True)
class Session:
    """A rank's part of a training run: settings, ranks and console. `say` prints a line on rank 0 and nothing elsewhere."""

    config: Config
    world: World
    say: Callable[[str], None]
    attempt: Attempt = field(default_factory=Attempt)

    @property
    def host(self) -> str:
        """This rank's host and process, for messages."""
        return f"{os.uname().nodename} (process {os.getpid()})"

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.config.folder)

    def end(self, cause: Cause, code: int, text: str) -> None:
        """Record how this start ends, from a thread that will end the process."""
        self.attempt.end(self.config.folder, self.world.rank, self.world.size, cause, code, text)
