"""Receivers of metrics, artifacts and the encoder: the interface, and one that forwards to several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clae_dist.data.urls import redact_text

Status = Literal["finished", "stopped", "failed"]  # stopped: by a signal, can be resumed
Say = Callable[[str], None]


@dataclass(frozen=True)
class MetricsRow:
    """Metrics as they were logged."""

    metrics: Mapping[str, float]
    images_seen: int
    time_ms: int  # since 1970


class Tracker:
    """A receiver of what a run reports, used on rank 0. This base class ignores everything, as other ranks do."""

    page = ""  # the command that opens the tracking page, or ""

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Record metrics (plain numbers, no tensors) at the number of images that training has seen."""

    def tag(self, name: str, text: str) -> None:
        """Set a tag of the run, such as the cause of an alarm."""

    def log_artifacts(self, path: Path, name: str) -> None:
        """Keep a file, or the content of a folder, under `name`. The path must exist until `close`."""

    def log_model(self, export_folder: Path, digest: str) -> None:
        """Keep the exported encoder with the digest of the manifest it was trained on."""

    def close(self, status: Status) -> None:
        """Send what is left; nothing may be logged afterwards."""


class Refused(Exception):
    """The store rejected the request; a retry cannot succeed."""


class Trackers(Tracker):
    """The metrics file, whose failure ends the run, and other trackers, which are dropped with a message when they fail."""

    def __init__(self, file: Tracker, others: Sequence[Tracker], say: Say, page: str = "") -> None:
        self._file = file
        self._others = list(others)
        self._say = say
        self.page = page

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        self._file.log(metrics, images_seen)
        self._each("log", metrics, images_seen)

    def tag(self, name: str, text: str) -> None:
        self._each("tag", name, text)

    def log_artifacts(self, path: Path, name: str) -> None:
        self._file.log_artifacts(path, name)
        self._each("log_artifacts", path, name)

    def log_model(self, export_folder: Path, digest: str) -> None:
        self._file.log_model(export_folder, digest)
        self._each("log_model", export_folder, digest)

    def close(self, status: Status) -> None:
        try:
            self._file.close(status)
        finally:
            self._each("close", status)

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in list(self._others):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # a failing display must not end a run of days
                self._others.remove(tracker)
                self._say(
                    f"{type(tracker).__name__} failed in {method} ({type(error).__name__}: {error}) and is off for the rest "
                    f"of this run; metrics.jsonl is still written."
                )


def brief(error: BaseException) -> str:
    """The first line of an error, shortened for the console, without credentials."""
    text = (redact_text(str(error)).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 160 else text[:157] + "..."
