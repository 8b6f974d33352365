"""metrics.jsonl: the truth about a run. One JSON object a line, written and flushed as it is logged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from clae_dist.tracking.tracker import Say, Status


class MetricsFile:
    """Appends lines {"images_seen": n, …} to `path`.

    Opening it for a run that goes on at `resume_images_seen` first takes away what a kill left behind: lines that are
    cut off, and lines of steps after the checkpoint, which are trained and logged again. A run that starts at 0 has no
    checkpoint: it keeps no line, not even those logged before its first step.
    """

    def __init__(self, path: Path, resume_images_seen: int, say: Say) -> None:
        self.path = path
        self._trim(resume_images_seen, say)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        self._file.write(json.dumps({"images_seen": images_seen, **metrics}) + "\n")
        self._file.flush()

    def log_artifacts(self, path: Path, name: str) -> None:
        pass  # they lie in the run folder already

    def log_model(self, export_folder: Path, digest: str) -> None:
        pass

    def close(self, status: Status) -> None:
        self._file.close()

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
        whole = self.path.with_name(self.path.name + ".new")
        with whole.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self.path)


def _images_seen(line: bytes) -> int | None:
    """The images_seen of a line, None where the line is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["images_seen"])
    except (ValueError, KeyError, TypeError):
        return None
