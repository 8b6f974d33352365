"""Batches from loader processes when shared memory is small: through pipes, or an error at once, and never a batch lost."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clae_dist.data import transport
from clae_dist.data.loader import LoadedBatch
from clae_dist.data.synthetic import write_synthetic_set
from tests import processes

# Batches of 1.2 MB each; shared memory has 4 MB, as docker's 64 MB are to batches of 20 MB.
LOADS = """
import os, sys
import torch
from clae_dist.config import Batch, Config, Data
from clae_dist.data import transport
from clae_dist.data.loader import load, shared_memory_bytes
from clae_dist.errors import DataError
from clae_dist.data.shard_set import open_shards
from clae_dist.world import World

def batches(workers):
    data = Data(shards=sys.argv[1], image_size=160, workers=workers)
    config, world = Config(data=data, batch=Batch(global_size=8)), World.single("cpu")
    print(*transport.advice(shared_memory_bytes(config, world)))
    return load(open_shards(data), config, world, 0, 8)

if __name__ == "__main__":
    for ours, same in zip(batches(1), batches(0), strict=True):
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours[:4], same[:4]))
    transport.fits = lambda needed: True  # as if it had become full since
    try:
        list(batches(1))
    except DataError as error:
        print(error, flush=True)
    os._exit(0)  # a loader process that is told to end stays for half a minute
"""


def may_mount() -> bool:
    return (
        os.getuid() == 0 and shutil.which("unshare") is not None and subprocess.run(["unshare", "-m", "true"]).returncode == 0
    )


@pytest.mark.skipif(not may_mount(), reason="needs root, to mount another /dev/shm")
@pytest.mark.slow
def test_a_small_shared_memory_costs_time_and_no_batch(tmp_path: Path) -> None:
    """The batch was lost in a thread of the loader process, and the rank waited for it until guard.hang_s."""
    write_synthetic_set(tmp_path / "shards", 32, 200)
    (tmp_path / "loads.py").write_text(LOADS)
    small = f"mount -t tmpfs -o size=4m tmpfs {transport.SHARED_MEMORY} && exec $0 $@"
    command = ["unshare", "-m", "sh", "-c", small, sys.executable, str(tmp_path / "loads.py"), str(tmp_path / "shards")]
    done = processes.run(*command)
    assert done.returncode == 0, done.stderr
    slower, none, nothing, reason = done.stdout.splitlines()
    assert slower.startswith("data: batches need 5 MB of shared memory, and /dev/shm of")
    assert "docker run --shm-size=1g" in slower
    assert none == nothing == ""
    assert reason.startswith("a loader process cannot hand over its batch (unable to allocate shared memory")
    assert "No space left on device" in reason
    assert "docker run --shm-size" in reason


def test_what_comes_through_a_pipe_is_the_same_to_the_stride() -> None:
    views = torch.arange(2 * 3 * 4 * 4 * 3, dtype=torch.uint8).view(2, 3, 4, 4, 3).permute(0, 1, 4, 2, 3)
    batch = LoadedBatch(views, torch.rand(2, 3, 5), torch.arange(3), torch.tensor([1, -1, 0]), {"a": "b"}, 1.0, [{"txt": b"x"}])
    found = pickle.loads(pickle.dumps(transport._Piped(batch)))
    assert isinstance(found, LoadedBatch)
    for tensor, same in zip(found[:4], batch[:4], strict=True):
        assert torch.equal(tensor, same)
        assert tensor.stride() == same.stride()
    assert found[4:] == batch[4:]
    plain = pickle.loads(pickle.dumps(transport._Piped((torch.empty(0, 3), torch.tensor(7)))))
    assert isinstance(plain, tuple)
    assert [tensor.shape for tensor in plain] == [(0, 3), ()]


def test_no_loader_processes_need_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transport.needed_bytes(10**9, workers=0) == 0
    assert transport.needed_bytes(10**6, workers=4, local_size=2) > 2 * 4 * transport.PREFETCH * 10**6
    monkeypatch.setattr(transport, "free_bytes", lambda: 64 * 10**6)
    monkeypatch.setattr(transport, "fits", lambda needed: needed <= 64 * 10**6)
    assert list(transport.advice(64 * 10**6)) == []
    assert len(list(transport.advice(65 * 10**6))) == 1
