"""Storage errors: the errors of the operating system that storage causes, and the way out of each."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clae_dist.errors import STORAGE, ClaeError

_FREE_SOME = "free some space there, or name a folder on another disk"
_ANOTHER = "make it writable, or name another folder"
# Errors that are about storage wherever they are raised, and the way out of each.
_WAYS_OUT = {
    errno.ENOSPC: _FREE_SOME,
    errno.EDQUOT: _FREE_SOME,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or name a folder on another file system",
    errno.EIO: "the disk or the network storage has failed: check it, or name a folder elsewhere",
    errno.ESTALE: "the network storage was mounted again or has lost the file: check it, or name a folder elsewhere",
    errno.EROFS: _ANOTHER,
}


class StorageError(ClaeError, OSError):
    """A file cannot be written. The text names the file, the reason and the way out."""

    exit_code = STORAGE
    cause = "storage"
    on_all_ranks = False

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}; {_WAYS_OUT.get(self.errno or 0, _ANOTHER)}."


def _reason(number: int, reason: str, name: str) -> str:
    """The reason with the free space of now: partly written files are removed before the error is shown."""
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return reason
    path = Path(name).absolute()
    try:
        disk = os.statvfs(next(folder for folder in (path, *path.parents) if folder.is_dir()))
    except (OSError, StopIteration):
        return reason
    if disk.f_files and not disk.f_favail:
        return f"{reason} (no inode is free: too many files)"
    return f"{reason} ({disk.f_bavail * disk.f_frsize / 1e6:,.1f} MB are free)"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn any OSError inside into a StorageError that names `path`, the file or folder that is being written."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        number = error.errno or errno.EIO
        raise StorageError(number, _reason(number, error.strerror or str(error), str(path)), str(path)) from error


def storage_error(error: BaseException) -> StorageError | None:
    """`error` as a StorageError if storage caused it, else None."""
    if isinstance(error, StorageError):
        return error
    if isinstance(error, OSError) and error.errno in _WAYS_OUT:
        if error.filename is None:
            return StorageError(error.errno, error.strerror, "a temporary file or the output")
        name = os.fsdecode(error.filename)
        return StorageError(error.errno, _reason(error.errno, error.strerror or str(error), name), name)
    return None
