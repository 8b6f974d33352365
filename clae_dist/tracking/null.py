"""NullTracker: takes everything and keeps nothing, so that ranks other than 0 need no `if`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clae_dist.tracking.tracker import Status


class NullTracker:
    """A Tracker that does nothing."""

    page = ""
    run_id = ""

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        del metrics, images_seen

    def log_artifacts(self, path: Path, name: str) -> None:
        del path, name

    def log_model(self, export_folder: Path, digest: str) -> None:
        del export_folder, digest

    def close(self, status: Status) -> None:
        del status
