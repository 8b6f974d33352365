"""One process at a time writes to a run: the lease of its folder, which rank 0 holds while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from clae_dist.config import ConfigError
from clae_dist.lease import WAIT_S, hold, refuse_if_held
from clae_dist.runs.folder import make_folder
from clae_dist.storage import writing
from clae_dist.world import World

TRAINING, EVALUATION = "training.lease", "evaluation.lease"
_WAY_OUT = "wait until it has ended or end it, or give another run_dir."
_RESTART_WAIT_S = 60.0  # the rank 0 that a launcher has given up may be on another host, and end later than ours begins


def refuse_second_run(folder: Path) -> None:
    """Raise ConfigError if another `clae train` runs in this folder, before anything is started or written there."""
    with writing(folder):
        refuse_if_held(folder / TRAINING, ConfigError, _WAY_OUT)


@contextmanager
def only_run(folder: Path, world: World, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, this run alone writes to its folder. Collective. Raises ConfigError or StorageError on every rank."""
    with ExitStack() as stack:

        def take() -> None:
            make_folder(folder)
            wait_s = WAIT_S if world.size == world.local_size else _RESTART_WAIT_S
            with writing(folder):
                stack.enter_context(hold(folder / TRAINING, "clae train", ConfigError, _WAY_OUT, wait_s=wait_s, say=say))

        world.run_on_main(take)
        yield


@contextmanager
def only_evaluation(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, this process alone writes the run's evaluation. Raises ConfigError, StorageError when it cannot be written."""
    way_out = "wait until it has ended or end it."
    if not folder.is_dir():  # for the caller to say
        yield
        return
    with ExitStack() as stack:
        with writing(folder):
            stack.enter_context(hold(folder / EVALUATION, "clae evaluate", ConfigError, way_out, say=say))
        yield
