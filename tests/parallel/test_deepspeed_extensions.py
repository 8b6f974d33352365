"""Locks that killed compiles of DeepSpeed's extensions leave behind."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clae_dist.parallel import deepspeed_extensions
from clae_dist.world import World
from tests.parallel.step_kinds import take_step
from tests.parallel.zero import backend_of, setup_of
from tests.ranks import RankPool


def lock_in(folder: Path) -> Path:
    lock = folder / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def start_beside(world: World, folder: str) -> tuple[str, str]:
    """What a backend writes while it starts and trains, with `folder` as torch's for extensions."""
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        take_step(backend_of(world, setup_of(2)), "exact", 0)
    return out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_the_lock_of_a_killed_compile_is_explained_and_stops_nobody(tmp_path: Path) -> None:
    """DeepSpeed itself waits for such a lock for ever. A pool of its own: extensions are loaded once in a process."""
    lock = lock_in(tmp_path)
    pool = RankPool(2)
    try:
        (out, err), (other_out, other_err) = pool.run(2, start_beside, str(tmp_path))
    finally:
        pool.close()
    assert f"{lock} is the lock of a compile that was killed" in err
    assert "remove the file" in err
    assert (out, other_out, other_err) == ("", "", "")  # one rank of a machine says it, and DeepSpeed says nothing
    assert lock.exists()  # it is not ours
    assert os.listdir(lock.parent) == ["lock"]  # and nothing was compiled


def test_a_lock_that_a_compile_holds_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_in(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    compiling = [sys.executable, "-c", f"f = open({str(lock)!r}); print(flush=True); input()"]
    with subprocess.Popen(compiling, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert deepspeed_extensions.stale_locks() == []
        process.kill()
    assert deepspeed_extensions.stale_locks() == [lock]
