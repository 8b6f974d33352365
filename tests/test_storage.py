"""Disks that are full or read-only: exit code 5, the path, the way out, and nothing half written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from clae_dist.errors import STORAGE, exit_code
from clae_dist.files import write_together
from clae_dist.storage import StorageError, storage_error, writing
from tests import processes
from tests.failing_disks import prepare_folder

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.parametrize("state", ["full", pytest.param("read-only", marks=pytest.mark.slow)])
def test_every_command_on_a_full_or_a_read_only_disk(tmp_path: Path, state: str) -> None:
    if processes.run(*NAMESPACE, "true").returncode:
        pytest.skip("this machine gives no mount namespace to a user")
    prepare_folder(tmp_path)
    done = processes.run(*NAMESPACE, sys.executable, "-m", "tests.failing_disks", tmp_path, state)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 11
    for name, code, error, changed, _ in found:
        line = error.splitlines()[-1]
        about = f"{state} disk, {name}: {code}, {error}, {changed}"
        assert code == STORAGE, about
        assert str(tmp_path / f"disk-{state}") in line, about
        assert line.startswith(("clae: ", "data_prep: ")), about
        assert "cannot be written: " in line, about
        assert "name another folder" in line or "free some space there" in line, about
        assert "Traceback" not in error, about
        assert "(0.0 MB are free)" in line or state != "full", about
        kept = [path for path in changed if not path.endswith((".lock", "console.log"))]
        assert not [path for path in kept if not path.startswith(("prepared/", "new/"))], about
        assert not [path for path in kept if "tmp-" in path or "partial" in path], about


def test_several_files_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    write_together({tmp_path / "one": b"1", tmp_path / "two": b"1"})
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="away/three cannot be written: No such file or directory; make it writable"):
        write_together({tmp_path / "one": b"2", tmp_path / "two": b"2", tmp_path / "away" / "three": b"2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "one", "two"]
    assert (tmp_path / "one").read_bytes() + (tmp_path / "two").read_bytes() == b"11"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_one_rule_decides_what_is_storage(number: int) -> None:
    error = OSError(number, os.strerror(number))
    assert exit_code(storage_error(error) or error) == STORAGE
    assert str(storage_error(error)).startswith("a temporary file or the output cannot be written: ")
    with pytest.raises(StorageError) as caught, writing("/some/file"):
        raise error
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it may come from a worker process
    assert "/some/file cannot be written: " in str(caught.value)


def test_what_is_not_storage() -> None:
    for error in (ConnectionResetError(errno.ECONNRESET, "reset"), FileNotFoundError(errno.ENOENT, "no"), ValueError()):
        assert storage_error(error) is None
