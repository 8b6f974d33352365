"""Files that are there as a whole or not at all, and what they hold."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from clae_dist.storage import writing


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replaces `path` as a whole, by bytes or by parts of them: after a crash it holds the old bytes or the new ones.

    Raises StorageError.
    """
    write_together({path: data})


def write_together(files: Mapping[Path, bytes | Iterable[bytes]]) -> None:
    """Replaces several files, each by its bytes or by parts of them, as `replacing` does. Raises StorageError."""
    with replacing(*files) as streams:
        for (path, data), stream in zip(files.items(), streams, strict=True):
            with writing(path):
                stream.writelines([data] if isinstance(data, bytes) else data)


@contextmanager
def replacing(*paths: Path) -> Iterator[list[IO[bytes]]]:
    """New streams, one per path. At the end, each replaces the file at its path: none before the bytes of all are on the disk.

    After an error inside, every file is as before. Nobody can guess the names of the temporary files, and an existing file or
    link of such a name is not opened.
    Raises StorageError; code inside names its path with `writing`.
    """
    guess = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporaries = [path.with_name(f".tmp-{guess}-{path.name}") for path in paths]
    streams: list[IO[bytes]] = []
    try:
        for path, temporary in zip(paths, temporaries, strict=True):
            with writing(path):
                streams.append(temporary.open("xb"))
        yield streams
        for path, stream in zip(paths, streams, strict=True):
            with writing(path):
                stream.flush()
                os.fsync(stream.fileno())
                stream.close()
        for path, temporary in zip(paths, temporaries, strict=True):
            with writing(path):
                temporary.replace(path)
    finally:
        for stream in streams:
            with suppress(OSError):  # of a full disk, which was raised already
                stream.close()
        for temporary in temporaries:
            with suppress(OSError):  # on a read-only disk even the absent cannot be removed
                temporary.unlink(missing_ok=True)


def make_folders(folder: Path) -> None:
    """Makes a folder and those above it, where they are not there. Raises StorageError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_writable(folder: Path) -> None:
    """Makes the folder and writes a block in it and removes it again, before hours of work. Raises StorageError."""
    make_folders(folder)
    with writing(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-", buffering=0) as file:
        file.write(bytes(4096))


def remove(paths: Iterable[Path]) -> None:
    """Removes files. Raises StorageError."""
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes what was named or renamed in `folder` survive a power cut. Raises StorageError."""
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
