"""Undecodable samples: named, counted, and the end of the run if they are too many. All ranks know the same ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from clae_dist.errors import DataError
from clae_dist.files import write_atomically
from clae_dist.runs.folder import RunFolder
from clae_dist.world import World

_SAID = 10  # on the console; the file names all


class BadSamples:
    """`allowed` is a share of the `num_samples` images a pass (below 1), or a number of them."""

    def __init__(self, allowed: float, num_samples: int, folder: Path, known: dict[str, str]) -> None:
        self._budget = int(allowed if allowed >= 1 else allowed * num_samples)
        self._num_samples = num_samples
        self._file = RunFolder(folder).bad_samples_file
        self.known = dict(known)  # sample: reason

    def new_in(self, found: dict[str, str]) -> bool:
        """True if one of them is new."""
        return not found.keys() <= self.known.keys()

    def add(self, found: dict[str, str], world: World, say: Callable[[str], None]) -> None:
        """Share the undecodable samples of all ranks. Collective. Raises DataError if they are more than allowed."""
        new = {sample: reason for part in world.gather_objects(found) for sample, reason in part.items()}
        for sample, reason in new.items():
            if sample not in self.known:
                self.known[sample] = reason
                if len(self.known) <= _SAID:
                    say(f"{sample} cannot be decoded ({reason}); replaced by the next of its shard")
                if len(self.known) == _SAID:
                    say(f"further ones are only in {self._file}")
        lines = [json.dumps({"sample": sample, "reason": reason}) + "\n" for sample, reason in sorted(self.known.items())]
        if world.is_main:
            try:
                write_atomically(self._file, "".join(lines).encode())
            except OSError as error:  # the list is in the checkpoint, too, and is written with the next one that is found
                say(f"{self._file} cannot be written ({error.strerror}): training continues; free some of that disk.")
        if len(self.known) > self._budget:
            sample, reason = min(self.known.items())
            raise DataError(
                f"{len(self.known)} of {self._num_samples} images cannot be decoded, more than the {self._budget} that "
                f"data.max_bad allows, such as {sample} ({reason}); {self._file} lists them. `python -m data_prep verify` "
                "tells if the shards have changed; a larger data.max_bad skips these images."
            )
