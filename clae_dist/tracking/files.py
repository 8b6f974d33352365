"""metrics.jsonl: the truth about a run. One JSON object a line, written and flushed as it is logged."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from clae_dist.files import write_atomically
from clae_dist.storage import writing
from clae_dist.tracking.tracker import Row, Say, Status

METRICS_FILE = "metrics.jsonl"


def read_rows(path: Path) -> list[Row]:
    """The whole lines of such a file, with now as their time; none where there is no file."""
    if not path.exists():
        return []
    now_ms = int(time.time() * 1000)
    read = [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if _images_seen(line) is not None]
    return [Row(metrics, metrics.pop("images_seen"), now_ms) for metrics in read]


class MetricsFile:
    """Appends lines {"images_seen": n, …} to `path`.

    Opening it for a run that goes on at `resume_images_seen` first takes away what a kill left behind: lines that are
    cut off, and lines of steps after the checkpoint, which are trained and logged again. A run that starts at 0 has no
    checkpoint: it keeps no line, not even those logged before its first step.
    A disk that is full does not end the run: lines wait until it has room again.
    """

    def __init__(self, path: Path, resume_images_seen: int, say: Say) -> None:
        self.path, self._say = path, say
        self._trim(resume_images_seen, say)
        with writing(path):
            self._file = path.open("ab", buffering=0)
        self._end = self._file.tell()  # of the last whole line
        self._waiting: list[bytes] = []

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Writes the line, and those before it that a full disk did not take."""
        self._waiting.append(json.dumps({"images_seen": images_seen, **metrics}).encode() + b"\n")
        data, late = b"".join(self._waiting), len(self._waiting) > 1
        try:
            if self._file.write(data) < len(data):  # what fitted of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self._end)
            if not late:
                self._say(
                    f"{self.path} cannot be written ({error.strerror}): training goes on, and the metrics wait in memory; free "
                    "some of that disk."
                )
            return
        self._end += len(data)
        self._waiting.clear()
        if late:
            self._say(f"{self.path} is written again; it has all metrics.")

    def log_artifacts(self, path: Path, name: str) -> None:
        pass  # they lie in the run folder already

    def log_model(self, export_folder: Path, digest: str) -> None:
        pass

    def close(self, status: Status) -> None:
        self._file.close()
        if self._waiting:
            self._say(f"{self.path} could not be written to the end: its last {len(self._waiting)} lines are missing.")

    def rows(self) -> list[Row]:
        """What the file holds."""
        return read_rows(self.path)

    def _trim(self, resume_images_seen: int, say: Say) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        seen = [_images_seen(line) for line in lines]
        last = resume_images_seen or -1
        kept = [line for line, images in zip(lines, seen, strict=True) if images is not None and images <= last]
        if len(kept) == len(lines):
            return
        torn = f" ({seen.count(None)} of them cut off)" if None in seen else ""
        say(f"{self.path.name}: took away {len(lines) - len(kept)} lines{torn}; the run goes on at image {resume_images_seen}")
        write_atomically(self.path, b"".join(kept))


def _images_seen(line: bytes) -> int | None:
    """The images_seen of a line, None where the line is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["images_seen"])
    except (ValueError, KeyError, TypeError):
        return None
