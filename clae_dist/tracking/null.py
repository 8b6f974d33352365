"""NullTracker: takes everything and keeps nothing, so that ranks other than 0 need no `if`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clae_dist.tracking.tracker import Status


class NullTracker:
    """A Tracker that does nothing."""

    page = ""

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        pass

    def log_artifacts(self, path: Path, name: str) -> None:
        pass

    def log_model(self, export_folder: Path, digest: str) -> None:
        pass

    def close(self, status: Status) -> None:
        pass
