"""The console of a run as it grows: in an ordinary run folder, or on object storage, where ranks of any node send it."""

from __future__ import annotations

import codecs
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from clae_dist.object_store import Store, store_of
from clae_dist.runs.folder import CONSOLE_FILE, RunFolder
from clae_dist.runs.mirror import EVERY_S
from clae_dist.runs.record import CONSOLE_OBJECTS, PART, is_line

_RETRY_S = 10.0
_RECENT = 20_000  # characters


def follow(folder: Path, *, here: bool) -> FollowedFile | FollowedObjects:
    """Follow the console of a run from its present end. `here`: rank 0 is on this machine, and so is the file, in any case."""
    store = None if here else store_of(folder, _RETRY_S)
    return FollowedFile(RunFolder(folder).console_file) if store is None else FollowedObjects(store)


class FollowedFile:
    """The file in a folder of this machine, or one that all hosts share. It may be removed and begin anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_bytes = path.stat().st_size if path.exists() else 0
        self._decoder = _decoder()

    def read(self) -> str:
        """The text that was appended since the last call."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._num_bytes:
                    self._num_bytes = 0
                file.seek(self._num_bytes)
                data = file.read()
        except FileNotFoundError:
            data, self._num_bytes = b"", 0
        self._num_bytes += len(data)
        return self._decoder.decode(data)

    def close(self) -> str:
        """The rest."""
        return self.read()


class FollowedObjects:
    """The objects in a bucket. A thread looks for new ones, so that nobody waits for a store that does not answer."""

    def __init__(self, store: Store) -> None:
        self._console = ConsoleObjects(store)
        self._texts: deque[str] = deque()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        with suppress(OSError):
            self._console.read()  # of earlier starts
        self._thread.start()

    def read(self) -> str:
        """The text that was sent since the last call."""
        return "".join(self._texts.popleft() for _ in range(len(self._texts)))

    def close(self) -> str:
        """The rest."""
        self._over.set()
        self._thread.join()
        self._look()
        return self.read()

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            self._look()

    def _look(self) -> None:
        with suppress(OSError):  # the next look tries again
            self._texts.append(self._console.read())


class ConsoleObjects:
    """The console in a bucket: parts that rank 0 sends, and lines of other processes, which a later start's parts repeat."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._num_bytes, self._number = 0, 0  # of the console so far, and of its newest part
        self._seen: set[str] = set()  # objects with lines
        self._early: Counter[str] = Counter()  # lines that no part has repeated yet
        self._recent = ""
        self._decoder = _decoder()

    def read(self) -> str:
        """The text that was sent since the last call. Raises StoreError."""
        names = list(self._store.entries(beginning=CONSOLE_OBJECTS))
        text = "".join(line for part in self._new_parts(names) for line in part.splitlines(True) if not self._was_early(line))
        self._recent = (self._recent + text)[-_RECENT:]
        return text + "".join(self._new_lines(names))

    def _new_parts(self, names: Iterable[str]) -> Iterator[str]:
        parts = [match for name in names if (match := PART.fullmatch(name)) and match[1] == CONSOLE_FILE]
        for match in sorted(parts, key=lambda match: int(match[2])):
            if int(match[2]) <= self._number:
                continue
            data, start = self._store.get_or(match[0]), int(match[3])
            if not data:  # joined with others meanwhile, in a part that comes with the next look
                return
            yield self._decoder.decode(data[max(0, self._num_bytes - start) :])
            self._num_bytes, self._number = start + len(data), int(match[2])

    def _new_lines(self, names: Iterable[str]) -> Iterator[str]:
        for name in sorted(name for name in names if is_line(name) and name not in self._seen):
            text = self._store.get_or(name).decode(errors="replace")
            self._seen.add(name)
            if text not in self._recent:  # rank 0's node has sent it already
                self._early.update(text.splitlines(True))
                yield text

    def _was_early(self, line: str) -> bool:
        early = self._early[line] > 0
        self._early[line] -= early
        return early


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")
