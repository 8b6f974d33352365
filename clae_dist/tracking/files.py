"""metrics.jsonl, the complete metrics of a run: one JSON object per line, written as it is logged."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from clae_dist.files import write_atomically
from clae_dist.reading import is_count, parse_line, raw_lines
from clae_dist.storage import writing
from clae_dist.tracking.tracker import MetricsRow, Say, Status, Tracker


class MetricsRows:
    """The complete lines that the file has now, as rows with the current time; read on iteration, not kept."""

    def __init__(self, path: Path) -> None:
        self._path, self._now_ms = path, int(time.time() * 1000)
        self._num_lines = sum(1 for _ in raw_lines(path))

    def __len__(self) -> int:
        """The number of lines, including damaged ones."""
        return self._num_lines

    def __iter__(self) -> Iterator[MetricsRow]:
        for line in islice(raw_lines(self._path), self._num_lines):
            content = parse_line(line)
            seen = _images_seen(line)
            if content is not None and seen is not None:
                metrics = {key: value for key, value in content.items() if type(value) in (int, float) and key != "images_seen"}
                yield MetricsRow(metrics, seen, self._now_ms)


class MetricsFile(Tracker):
    """Appends lines {"images_seen": n, …} to `path`.

    A run that resumes at `resume_images_seen` first removes what a kill left behind: lines that are cut off, and lines of
    steps after the checkpoint, which are trained and logged again. A run without a checkpoint (0) keeps no line.
    A full disk does not end the run: lines wait in memory until it has room again.
    """

    def __init__(self, path: Path, resume_images_seen: int, say: Say) -> None:
        self.path, self._say = path, say
        self._trim(resume_images_seen, say)
        with writing(path):
            self._file = path.open("ab", buffering=0)
        self._end = self._file.tell()  # of the last complete line
        self._waiting: list[bytes] = []

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Write the line, and earlier ones that are waiting for room on the disk."""
        self._waiting.append(json.dumps({"images_seen": images_seen, **metrics}).encode() + b"\n")
        data, late = b"".join(self._waiting), len(self._waiting) > 1
        try:
            if self._file.write(data) < len(data):  # a partial write
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self._end)
            if not late:
                self._say(
                    f"{self.path} cannot be written ({error.strerror}): training continues and the metrics wait in memory; "
                    "free some of that disk."
                )
            return
        self._end += len(data)
        self._waiting.clear()
        if late:
            self._say(f"{self.path} can be written again and has all metrics.")

    def close(self, status: Status) -> None:
        self._file.close()
        if self._waiting:
            self._say(f"{self.path} could not be written to the end: its last {len(self._waiting)} lines are missing.")

    def rows(self) -> MetricsRows:
        """The lines that the file has now."""
        return MetricsRows(self.path)

    def _trim(self, resume_images_seen: int, say: Say) -> None:
        last = resume_images_seen or -1
        num_removed = torn = 0
        for line in raw_lines(self.path):
            seen = _images_seen(line)
            torn += seen is None
            num_removed += seen is None or seen > last
        if not num_removed:
            return
        lines = f"{num_removed} line{'s' * (num_removed != 1)}"
        note = f" ({torn} of them cut off)" if torn else ""
        say(f"{self.path.name}: removed {lines}{note}; the run resumes at image {resume_images_seen}")
        seen_of = ((line, _images_seen(line)) for line in raw_lines(self.path))
        write_atomically(self.path, (line for line, seen in seen_of if seen is not None and seen <= last))


_WHOLE = re.compile(rb'\{"images_seen": (\d{1,15})[,}]')  # how `log` writes a line


def _images_seen(line: bytes) -> int | None:
    """The images_seen of a line, None if the line is incomplete."""
    if (written := _WHOLE.match(line)) and line.endswith(b"}\n"):
        return int(written[1])
    content = parse_line(line)
    seen = content.get("images_seen") if content else None
    return seen if is_count(seen) else None
