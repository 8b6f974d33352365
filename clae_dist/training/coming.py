"""The next batch of a rank, and what the ranks tell each other with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from clae_dist.data.loader import LoadedBatch
from clae_dist.errors import DataError
from clae_dist.world import Flags


@dataclass(frozen=True)
class Coming:
    """The next batch of this rank, or the reason why it has none."""

    batch: LoadedBatch | None
    problem: str
    flags: Flags  # that go with it
    saved: int  # the step of the newest checkpoint when they were raised


def next_batch(batches: Iterator[LoadedBatch], rows: int, rank: int) -> tuple[LoadedBatch | None, str]:
    """The next batch, or the reason why this rank has none."""
    try:
        batch = next(batches)
    except DataError as error:
        return None, str(error)
    except (RuntimeError, OSError) as error:  # a loader process that died, a disk that does: the other ranks must hear of it
        return None, f"rank {rank} cannot load its batch: {type(error).__name__}: {error}"
    if len(batch.ids) != rows:
        return None, (
            f"rank {rank}'s batch has {len(batch.ids)} rows where every rank needs {rows}: unequal rows would make collectives "
            "wait forever. The loader (data/loader.py) must give every rank batch.global_size / number of ranks."
        )
    return batch, ""
