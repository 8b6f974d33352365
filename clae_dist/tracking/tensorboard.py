"""TensorBoard events in the run folder. The only file that imports torch.utils.tensorboard."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from clae_dist.errors import ConfigError
from clae_dist.tracking.metric_groups import grouped
from clae_dist.tracking.tracker import Status, Tracker

RESULTS = ".results"  # end of the name of the file with what was logged after training


def require_tensorboard() -> None:
    """Raise ConfigError unless tensorboard is installed. Does not import it."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.name has tensorboard, which is not installed; pip install 'tensorboard>=2.15', or use tracking.name=none."
        )


class TensorBoardTracker(Tracker):
    """Writes scalars to an event file in `folder`, by images seen, under the names of the MLflow page.

    Every line is flushed, so that a kill loses none that was logged. Events after `resume_images_seen` that a killed start
    wrote are purged: their steps are trained and logged again. Results that are added to a run (`resume_images_seen` is None)
    are in a file of their own, which the next ones replace.
    """

    def __init__(self, folder: Path, resume_images_seen: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._images_seen = resume_images_seen or 0
        if resume_images_seen is None:
            for old in folder.glob(f"*{RESULTS}"):
                old.unlink()
            self._writer = SummaryWriter(str(folder), filename_suffix=RESULTS)
        else:
            first = resume_images_seen + 1 if resume_images_seen else 0
            self._writer = SummaryWriter(str(folder), purge_step=first)

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        self._images_seen = images_seen
        for name, value in metrics.items():
            self._writer.add_scalar(grouped(name), value, images_seen)
        self._writer.flush()

    def tag(self, name: str, text: str) -> None:
        self._writer.add_text(name, text, self._images_seen)
        self._writer.flush()

    def close(self, status: Status) -> None:
        self._writer.close()


class ResultsTracker(Tracker):
    """A TensorBoardTracker of results that opens its file with the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tracker = Tracker()

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        if type(self._tracker) is Tracker:
            self._tracker = TensorBoardTracker(self._folder, None)
        self._tracker.log(metrics, images_seen)

    def close(self, status: Status) -> None:
        self._tracker.close(status)
