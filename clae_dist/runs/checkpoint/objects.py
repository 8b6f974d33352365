"""Checkpoints of a run on object storage: checkpoints/step-00000123.ATTEMPT/ with a file per rank and, last, checkpoint.json.

The index commits: without it, nobody takes what is there, and with it, every piece was there before. Names hold the attempt, so
that a rank of an abandoned start never writes to the pieces of a committed checkpoint. Deletion begins with the index.

A staging folder has checkpoints/step-00000123/ as a run folder does; `source` in it names the folder in the bucket, and pieces
are fetched when they are needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from clae_dist.errors import CheckpointError, DamagedError
from clae_dist.files import replacing, write_atomically
from clae_dist.object_store import NoObjectError, Store, StoreError, store_of
from clae_dist.runs.checkpoint.index import INDEX, Extent, File
from clae_dist.runs.folder import RunFolder
from clae_dist.world import World

SOURCE = "source"
_FOLDER = re.compile(r"step-(\d{8,})\.(\w+)")
_BLOCK = 16 << 20  # bytes of one request
_MOST_HEADER_BYTES = 64 << 20
_REQUESTS = 16  # at a time


class Objects:
    """The checkpoints in the bucket of a staged run folder."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @staticmethod
    def of(run_dir: Path) -> Objects | None:
        """None for an ordinary run folder."""
        store = store_of(RunFolder(run_dir).checkpoints)
        return None if store is None else Objects(store)

    # ---- writing ----

    def upload(self, folder: str, paths: Iterable[Path], check: Callable[[], None]) -> None:
        """Put files; `check` is called between blocks and may raise."""
        for path in paths:
            self.store.put(f"{folder}/{path.name}", path, check)

    def entries(self, folder: str, names: Iterable[str]) -> list[bytes]:
        """Small objects of one folder, in the order of their names."""
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return list(pool.map(lambda name: self.store.get(f"{folder}/{name}"), names))

    def commit(self, folder: str, files: Mapping[str, File], index: bytes) -> None:
        """Put the index once all files have their size. Raises StoreError."""
        found = self.store.entries(folder)
        for name, file in files.items():
            entry = found.get(f"{folder}/{name}")
            if entry is None or entry.num_bytes != file.num_bytes:
                size = "is missing" if entry is None else f"has {entry.num_bytes} bytes"
                raise StoreError(f"{self.store.url}/{folder}", f"{name} {size} after its upload", "check the store")
        self.store.put(f"{folder}/{INDEX}", index)
        with suppress(StoreError):  # they are in the index by now
            self._delete_all(name for name in found if name.endswith(".json"))

    def publish(self, path: Path, folder: str) -> None:
        """Put a committed checkpoint of this disk."""
        pieces = sorted(path.glob("rank-*.safetensors"))
        self.upload(folder, pieces, lambda: None)
        files = {piece.name: File(piece.stat().st_size, "") for piece in pieces}
        self.commit(folder, files, (path / INDEX).read_bytes())
        (path / SOURCE).write_text(folder)

    def delete(self, folder: str) -> None:
        """Delete a checkpoint, the index first: a partly deleted one must not look committed."""
        self.store.delete([f"{folder}/{INDEX}"])
        self._delete_all(self.store.entries(folder))

    def remove_leftovers(self) -> None:
        """Delete what killed starts have uploaded and not committed."""
        names = self.store.entries()
        committed = {name.partition("/")[0] for name in names if name.endswith(f"/{INDEX}")}
        self._delete_all(name for name in names if name.partition("/")[0] not in committed)

    def _delete_all(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(lambda name: self.store.delete([name]), names))

    # ---- reading ----

    def committed(self) -> dict[int, str]:
        """The folder of the committed checkpoint of each step; of two attempts, the later."""
        newest: dict[int, tuple[str, str]] = {}
        for name, entry in self.store.entries().items():
            folder, _, rest = name.partition("/")
            match = _FOLDER.fullmatch(folder)
            if match and rest == INDEX:
                step = int(match[1])
                newest[step] = max(newest.get(step, ("", "")), (entry.changed, folder))
        return {step: folder for step, (_, folder) in newest.items()}

    def stage(self, run_dir: Path, committed: Mapping[int, str]) -> None:
        """Make the staging folder's checkpoints those of the bucket: indices are fetched, pieces of earlier starts are kept."""
        checkpoints, wanted = RunFolder(run_dir), {}
        for step, name in committed.items():
            path = checkpoints.checkpoint(step)
            partial = partial_folder(path, name.partition(".")[2])
            if partial.is_dir() and source_of(path) != name:
                shutil.rmtree(path, ignore_errors=True)
                partial.rename(path)
            try:
                index = self.store.get(f"{name}/{INDEX}")
            except NoObjectError:  # deleted meanwhile
                continue
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / INDEX, index)
            write_atomically(path / SOURCE, name.encode())
            wanted[path.name] = name
        for path in checkpoints.checkpoints.glob("step-*"):
            if path.name not in wanted:
                shutil.rmtree(path, ignore_errors=True)


class Pieces:
    """The files of one staged checkpoint, in the bucket."""

    def __init__(self, store: Store, path: Path) -> None:
        self._store, self._path = store, path
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}  # start of the data, entries

    @staticmethod
    def of(path: Path) -> Pieces | None:
        """The pieces of a checkpoint folder; None for one that is not staged."""
        folder, objects = source_of(path), Objects.of(path.parents[1])
        if objects is None or not folder:
            return None
        return Pieces(Store(f"{objects.store.url}/{folder}"), path)

    def fetch(self, name: str, expected: File) -> None:
        """Fetch a file into the staging folder. Raises DamagedError unless its size and digest are as expected."""
        for attempt in range(2):
            try:
                size = self._store.size(name)
                if size != expected.num_bytes:
                    raise DamagedError(f"{name} has {size:,} bytes in the bucket, expected {expected.num_bytes:,}")
                with replacing(self._path / name) as (stream,):
                    sha256 = hashlib.sha256()
                    for start in range(0, size, _BLOCK):
                        block = self._store.get(name, start, min(size, start + _BLOCK))
                        sha256.update(block)
                        stream.write(block)
                    if sha256.hexdigest() != expected.sha256:
                        raise DamagedError(
                            f"{name} has sha256 {sha256.hexdigest()[:12]}… in the bucket, expected {expected.sha256[:12]}…"
                        )
                return
            except NoObjectError:
                raise DamagedError(f"{name} is not in the bucket") from None
            except DamagedError:
                if attempt:
                    raise

    def read(self, name: str, extent: Extent, dtype: torch.dtype) -> torch.Tensor:
        """The elements of one extent, without the rest of its file. Raises DamagedError."""
        for attempt in range(2):
            try:
                data = self._read(name, extent)
            except NoObjectError:
                raise DamagedError(f"{extent.file} is not in the bucket") from None
            except (ValueError, KeyError, TypeError) as error:
                raise DamagedError(f"{extent.file}: {name} cannot be read ({type(error).__name__}: {error})") from None
            if zlib.crc32(data) == extent.crc32 and len(data) == extent.length * dtype.itemsize:
                return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if attempt:
                break
        raise DamagedError(f"{extent.file}: {name} has other bytes in the bucket than were written")

    def _read(self, name: str, extent: Extent) -> bytearray:
        data_start, entries = self._header(extent.file)
        start, end = entries[name]["data_offsets"]
        data = bytearray()
        for at in range(start, end, _BLOCK):
            data += self._store.get(extent.file, data_start + at, data_start + min(end, at + _BLOCK))
        return data

    def _header(self, file: str) -> tuple[int, dict[str, Any]]:
        if file not in self._headers:
            length = int.from_bytes(self._store.get(file, 0, 8), "little")
            if length > _MOST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            self._headers[file] = 8 + length, json.loads(self._store.get(file, 8, 8 + length))
        return self._headers[file]


def partial_folder(path: Path, attempt: str) -> Path:
    """Where the checkpoint of `path` is written before it is committed."""
    return path.with_name(f"{path.name}.partial-{attempt}")


def source_of(path: Path) -> str:
    """The folder in the bucket that a checkpoint folder stages, or ""."""
    try:
        text = (path / SOURCE).read_text()
    except (OSError, ValueError):
        return ""
    return text if _FOLDER.fullmatch(text) else ""


def publish_checkpoints(run_dir: Path) -> None:
    """Put checkpoints that were copied into a staging folder; nothing for an ordinary folder. Raises StoreError."""
    if objects := Objects.of(run_dir):
        for path in RunFolder(run_dir).find_checkpoints():
            if not source_of(path):
                objects.publish(path, f"{path.name}.parent")


def stage_checkpoints(run_dir: Path, world: World | None = None) -> None:
    """List the checkpoints of a run on object storage in its staging folders; nothing for other runs. Collective.

    Raises CheckpointError on every rank if the store cannot be used.
    """
    objects = Objects.of(run_dir)
    if objects is None:
        return
    world = world or World.single("cpu")
    problem, committed = "", {}
    try:
        committed = objects.committed() if world.is_main else {}
    except StoreError as error:
        problem = str(error)
    problem, committed = world.broadcast((problem, committed))
    if not problem and world.local_rank == 0:
        try:
            objects.stage(run_dir, committed)
        except OSError as error:
            problem = str(error)
    world.raise_together(CheckpointError, problem)
