"""One rank's share of writing a checkpoint: copy to host memory, then write from a thread while training continues.

A checkpoint is written to checkpoints/step-00000123.partial-ATTEMPT/, one file per rank, and committed by a rename when all
ranks are done. No collective here; training/saving.py coordinates the ranks. Where the run folder is on object storage, that is
the staging folder, and each rank puts its file into the bucket before it is done (objects.py).
"""

from __future__ import annotations

import ctypes
import json
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from clae_dist.errors import DamagedError
from clae_dist.files import sync_folder, write_atomically
from clae_dist.runs.checkpoint.index import INDEX, Extent, File, Index, Tensor, data_file, parse_index, read_index
from clae_dist.runs.checkpoint.objects import SOURCE, Objects, partial_folder, source_of
from clae_dist.runs.checkpoint.pieces import Piece, share_of
from clae_dist.runs.checkpoint.safetensors_file import Spec, write_safetensors
from clae_dist.runs.folder import RunFolder, step_of
from clae_dist.storage import StorageError, writing

_ALIGN = 64  # bytes
_MOVE = 4 << 20  # bytes that one thread copies at a time
_Move = tuple[int, int, int]  # to, from (addresses), bytes


class _CancelledError(Exception):
    """Writing was cancelled."""


class HostMemory:
    """Host memory reused by every save; pinned if tensors are on a GPU."""

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Allocate and touch the memory: the first copy into fresh pages takes three times as long."""
        needed = sum(_room(piece.tensor) for piece in pieces)
        if self._bytes.numel() < needed:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # free the old memory first
            self._bytes = torch.empty(needed, dtype=torch.uint8, pin_memory=self._pin).zero_()

    def copy(self, pieces: Sequence[Piece], side: torch.cuda.Stream | None = None) -> list[torch.Tensor]:
        """Copies of the tensors with their strides, so that any memory format is one contiguous copy.

        On a GPU the copies are only queued: on the stream `side`, but on the current one those of tensors that the next forward
        may write to.
        """
        self.reserve(pieces)
        copies, moves, offset = [], deque[_Move](), 0
        queued: tuple[list[tuple[torch.Tensor, torch.Tensor]], ...] = ([], [])  # on the current stream, on the other one
        for piece in pieces:
            tensor = piece.tensor
            row = self._bytes[offset : offset + tensor.nbytes].view(tensor.dtype)
            copy = row.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
            if tensor.device.type == "cpu" and tensor.stride() == copy.stride():  # no gaps: the copy has none
                for start in range(0, tensor.nbytes, _MOVE):
                    length = min(_MOVE, tensor.nbytes - start)
                    moves.append((copy.data_ptr() + start, tensor.data_ptr() + start, length))
            else:
                queued[side is not None and not piece.changes_in_forward].append((copy, tensor))
            copies.append(copy)
            offset += _room(tensor)
        _move(moves)
        for copy, tensor in queued[0]:
            copy.copy_(tensor, non_blocking=True)
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(side.device))  # for the step, and the copies before
            with torch.cuda.stream(side):
                for copy, tensor in queued[1]:
                    copy.copy_(tensor, non_blocking=True)
        return copies


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGN) * _ALIGN


def _move(moves: deque[_Move]) -> None:
    """Copy with as many threads as torch has, each taking the next block when it has finished one.

    Torch's own threads wait for each other at every tensor, which takes ten times as long on busy cores.
    """

    def work() -> None:
        with suppress(IndexError):
            while True:
                ctypes.memmove(*moves.popleft())

    helpers = [threading.Thread(target=work, daemon=True) for _ in range(min(torch.get_num_threads(), len(moves)) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()


class Writer:
    """Writes the share of `rank` of `size`. `attempt` distinguishes this start of a run from others that may still write.

    Call `begin` on every rank and, once no rank is `busy`, `commit` on rank 0. `failure` is the error of the last of them; a
    StorageError names its way out.
    """

    def __init__(self, run_dir: Path, rank: int, size: int, attempt: str, device: torch.device) -> None:
        self._folder, self._objects = RunFolder(run_dir), Objects.of(run_dir)
        self._rank, self._size, self._attempt, self._device = rank, size, attempt, device
        self._memory = HostMemory(pin=device.type == "cuda")
        self._copier = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self.failure: Exception | None = None
        self._last = -1  # the step of the last save

    @property
    def problem(self) -> str:
        """The failure as one line that names the rank, or ""."""
        if self.failure is None:
            return ""
        kind = "" if isinstance(self.failure, StorageError) else f"{type(self.failure).__name__}: "
        return f"rank {self._rank}: {kind}{self.failure}"

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        """Wait for the background thread."""
        if self._thread is not None:
            self._thread.join()

    def cancel(self) -> None:
        """Cancel the background thread and wait for it; what it has written is not committed."""
        self._cancelled.set()
        self.join()

    def reserve(self, pieces: Iterable[Piece]) -> None:
        """Allocate memory for the next save, in the background."""
        share = share_of(list(pieces), self._rank)
        self._start(lambda: self._memory.reserve(share))

    def begin(self, step: int, pieces: Iterable[Piece], *, unchanged: bool = False) -> torch.cuda.Event | None:
        """Copy this rank's share of the pieces, and write the copy in the background.

        Args:
            unchanged: the tensors will not change before the write has ended; those of a CPU are then not copied.

        Returns: on a GPU, the end of the copies, which run beside the next step; its update must wait for it.
        """
        self.join()
        share = share_of(list(pieces), self._rank)
        in_place = unchanged and self._device.type == "cpu"
        copies = [piece.tensor for piece in share] if in_place else self._memory.copy(share, self._copier)
        copied = None
        if self._copier is not None:
            copied = torch.cuda.Event()
            copied.record(self._copier)

        def write() -> None:
            if copied is not None:
                torch.cuda.set_device(self._device)  # a thread begins with the first one; the device has an index
                copied.synchronize()
            self._write(step, share, copies)

        self._start(write)
        return copied

    def commit(self, step: int, backend: str, info: dict[str, Any], keep: int, keep_every_s: float) -> None:
        """Commit the checkpoint when all ranks have written, and delete old ones; in the background."""

        def commit() -> None:
            index = Index(step, time.time(), self._size, backend, info)
            _commit(self._partial(step), self._folder.checkpoint(step), self._objects, index)
            delete_old(self._folder, step, keep, keep_every_s)

        self.join()
        self._start(commit)

    def discard(self, step: int) -> None:
        """Remove a checkpoint that could not be completed; no rank may be busy."""
        shutil.rmtree(self._partial(step), ignore_errors=True)
        if self._objects is not None:
            with suppress(OSError):  # the next start removes it
                self._objects.delete(_in_bucket(self._partial(step)))

    def _partial(self, step: int) -> Path:
        return partial_folder(self._folder.checkpoint(step), self._attempt)

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                with writing(self._folder.checkpoints):
                    work()
            except _CancelledError:
                pass  # whoever cancelled it knows
            except Exception as error:  # reported to all ranks by the caller, through `failure` or `problem`
                self.failure = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, step: int, share: Sequence[Piece], copies: Sequence[torch.Tensor]) -> None:
        partial, name = self._partial(step), data_file(self._rank)
        partial.mkdir(parents=True, exist_ok=True)
        specs = [Spec.of(piece.name, copy) for piece, copy in zip(share, copies, strict=True)]
        file, crcs = write_safetensors(partial / name, specs, copies, check=self._check)
        tensors = {
            piece.name: [list(piece.shape), spec.dtype, piece.start, piece.tensor.numel(), crc]
            for piece, spec, crc in zip(share, specs, crcs, strict=True)
        }
        written = {"file": name, "bytes": file.num_bytes, "sha256": file.sha256, "tensors": tensors}
        part = _part_of(partial, self._rank)
        write_atomically(part, json.dumps(written).encode())
        if self._objects is not None:
            self._objects.upload(_in_bucket(partial), [partial / name, part], self._check)
            self._make_room(step)

    def _make_room(self, step: int) -> None:
        """Remove this rank's staged files of saves before the last one, on nodes where rank 0 does not."""
        kept = {self._partial(step), self._partial(self._last)}
        self._last = step
        for folder in set(self._folder.checkpoints.glob(f"step-*.partial-{self._attempt}")) - kept:
            with suppress(OSError):  # other ranks of the node have files there
                (folder / data_file(self._rank)).unlink(missing_ok=True)
                _part_of(folder, self._rank).unlink(missing_ok=True)
                folder.rmdir()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise _CancelledError


def _part_of(partial: Path, rank: int) -> Path:
    """The entry of one rank's file, from which rank 0 builds the index."""
    return partial / f"rank-{rank:05d}.json"


def _in_bucket(partial: Path) -> str:
    return partial.name.replace(".partial-", ".")


def _parts(partial: Path, size: int, objects: Objects | None) -> list[bytes]:
    """The entries of all ranks; those of other nodes are in the bucket."""
    paths = [_part_of(partial, rank) for rank in range(size)]
    away = [path.name for path in paths if objects is not None and not path.exists()]
    fetched = dict(zip(away, objects.entries(_in_bucket(partial), away), strict=True)) if objects and away else {}
    return [fetched[path.name] if path.name in fetched else path.read_bytes() for path in paths]


def _commit(partial: Path, path: Path, objects: Objects | None, index: Index) -> None:
    """Write the index from the entries of all ranks, put it into the bucket if there is one, and rename the folder."""
    extents: dict[str, list[Extent]] = {}
    for part in _parts(partial, index.world_size, objects):
        written = json.loads(part)
        index.files[written["file"]] = File(written["bytes"], written["sha256"])
        for name, (shape, dtype, start, length, crc) in written["tensors"].items():
            index.tensors.setdefault(name, Tensor(tuple(shape), dtype))
            extents.setdefault(name, []).append(Extent(written["file"], start, length, crc))
    for name, tensor in index.tensors.items():
        index.tensors[name] = Tensor(tensor.shape, tensor.dtype, tuple(sorted(extents[name], key=lambda extent: extent.start)))
    text = index.as_json()
    parse_index(text)  # never commit an index that cannot be read
    write_atomically(partial / INDEX, text.encode())
    for rank in range(index.world_size):
        _part_of(partial, rank).unlink(missing_ok=objects is not None)
    if objects is not None:
        objects.commit(_in_bucket(partial), index.files, text.encode())
        write_atomically(partial / SOURCE, _in_bucket(partial).encode())
    sync_folder(partial)
    if source_of(path) != _in_bucket(partial):
        _delete(path, objects)  # a damaged checkpoint that this run has skipped
    else:
        delete_folder(path)
    partial.rename(path)
    sync_folder(path.parent)


def _delete(path: Path, objects: Objects | None) -> None:
    """Delete a checkpoint, first in the bucket if there is one."""
    source = source_of(path)
    if objects is not None and source:
        objects.delete(source)
    delete_folder(path)


def delete_old(folder: RunFolder, step: int, keep: int, keep_every_s: float) -> None:
    """Delete all but the newest `keep` checkpoints up to `step` and, unless keep_every_s is 0, one per that many seconds.

    Checkpoints after `step` are damaged; the run has skipped them and will write them again.
    """
    objects = Objects.of(folder.path)
    paths = [path for path in folder.find_checkpoints() if step_of(path) <= step]
    for path in outdated([(path, _saved(path) if keep_every_s else None) for path in paths], keep, keep_every_s):
        with suppress(OSError):  # the new one is committed; the next save tries to delete again
            _delete(path, objects)


def outdated(newest_first: Sequence[tuple[Path, float | None]], keep: int, keep_every_s: float) -> list[Path]:
    """The checkpoints to delete, given those that exist with their save time (None if it cannot be read)."""
    old, last = [], float("-inf")
    for path, saved in reversed(newest_first):
        if keep_every_s and saved is not None and saved >= last + keep_every_s:
            last = saved
        else:
            old.append(path)
    newest = {path for path, _ in newest_first[:keep]}
    return [path for path in old if path not in newest]


def _saved(path: Path) -> float | None:
    try:
        return read_index(path).saved
    except DamagedError:
        return None


def delete_folder(path: Path) -> None:
    """Delete a checkpoint, renaming it first: a partly deleted one must not look committed."""
    if path.exists():
        nameless = path.with_name(f"{path.name}.partial-deleted")
        shutil.rmtree(nameless, ignore_errors=True)
        path.rename(nameless)
        shutil.rmtree(nameless, ignore_errors=True)


def remove_leftovers(run_dir: Path) -> None:
    """Remove uncommitted checkpoints of killed runs; on object storage, those in the bucket. Raises StoreError."""
    objects = Objects.of(run_dir)
    if objects is not None:  # stage_checkpoints looks after the files on the disk
        objects.remove_leftovers()
        return
    for path in RunFolder(run_dir).checkpoints.glob("step-*.partial-*"):
        shutil.rmtree(path, ignore_errors=True)
