"""Which device each rank computes on: a GPU for every rank or a line that all raise, the CPU where it is asked for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clae_dist import world
from clae_dist.config import Config, Launch, Train
from clae_dist.data.manifest import Manifest
from clae_dist.devices import Sight, choose, local_device, tf32
from clae_dist.errors import BAD_CONFIG, ConfigError
from clae_dist.launchers.local import default_workers, spawn
from clae_dist.launchers.rank import Ending
from clae_dist.launchers.ray import _use_gpu
from clae_dist.training import train as train_module
from clae_dist.world import World
from tests.ranks import RankPool
from tests.small_run import assert_same_weights, small_run, train_quietly


def sights(*gpus: int, host: str = "a", request: str = "auto", uuids: str = "") -> list[Sight]:
    """The ranks of one host, the first of which sees gpus[0] GPUs, and so on."""
    return [
        Sight(host, rank, len(gpus), request, seen, uuid=uuids[rank : rank + 1])  # type: ignore[arg-type]
        for rank, seen in enumerate(gpus)
    ]


@pytest.mark.parametrize(
    ("seen", "devices"),
    [
        (sights(2, 2), ["cuda:0", "cuda:1"]),
        (sights(8, 8), ["cuda:0", "cuda:1"]),
        (sights(1, 1, uuids="AB"), ["cuda:0", "cuda:0"]),  # one visible GPU a rank, another one each
        ([*sights(1), *sights(1, host="b")], ["cuda:0", "cuda:0"]),
        ([*sights(2, 2), *sights(1, 1, host="b", uuids="CD")], ["cuda:0", "cuda:1", "cuda:0", "cuda:0"]),
        (sights(0, 0), ["cpu", "cpu"]),
        (sights(2, 2, request="cpu"), ["cpu", "cpu"]),
        (sights(2, 2, request="cuda"), ["cuda:0", "cuda:1"]),
    ],
)
def test_every_rank_has_its_device(seen: list[Sight], devices: list[str]) -> None:
    assert [str(choose(seen, rank)) for rank in range(len(seen))] == devices


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (sights(3, 3, 3, 3), ["host a has 3 visible GPUs for ranks 0 to 3"]),
        (
            [*sights(2, 2), *sights(0, 0, host="b")],
            ["host b has 0 visible GPUs for ranks 2, 3"],
        ),  # a driver that is gone
        ([*sights(2, 2), *sights(1, 1, host="b", uuids="CC")], ["host b has 1 visible GPU for ranks 2, 3"]),
        ([*sights(2, 2, uuids="AB"), *sights(2, 2, uuids="AB")], ["for ranks 0, 2", "for ranks 1, 3"]),
        (sights(0, 0, request="cuda"), ["host a has 0 visible GPUs for ranks 0, 1"]),
        (
            [sights(2, 2)[0], replace(sights(2, 2)[1], problem="no driver")],
            ["does not start on host a (rank 1): no driver"],
        ),
        ([sights(2, 2)[0], sights(2, 2, request="cpu")[1]], ["auto on rank 0, cpu on rank 1"]),
    ],
)
def test_too_few_gpus_are_an_error_that_names_host_and_ranks(seen: list[Sight], words: list[str]) -> None:
    told = set()
    for rank in range(len(seen)):
        with pytest.raises(ConfigError) as error:
            choose(seen, rank)
        told.add(str(error.value))
    (line,) = told  # all ranks say the same
    for word in words:
        assert word in line
    assert "launch.device=cpu" in line or "give all of them the same" in line


def _rank(seen: list[Sight]) -> Ending:
    """A rank that sees what it is told to see."""
    world.look = lambda *_: seen[int(os.environ["RANK"])]  # type: ignore[attr-defined]
    try:
        with world.connect() as joined:
            return Ending(0, f"{joined.device} {joined.collectives} {joined.largest(joined.rank):g}")
    except ConfigError as error:
        return Ending(BAD_CONFIG, f"{error} initialised: {dist.is_initialized()}")


def test_ranks_agree_before_they_need_a_gpu() -> None:
    refused = spawn(2, _rank, [*sights(1), *sights(0, host="b")])
    assert refused.code == BAD_CONFIG
    assert "host b has 0 visible GPUs for rank 1" in refused.message
    assert "initialised: False" in refused.message
    assert spawn(2, _rank, sights(0, 0)).message == "cpu gloo 1"


def test_a_device_always_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="needs a device with an index"):
        World.single("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert local_device() == World.single().device == torch.device("cuda:0")
    assert local_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert default_workers("auto") == 4
    assert default_workers("cpu") == 1


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device() == torch.device("cpu")
    with pytest.raises(ConfigError, match="launch.device is 'cuda', but torch sees no GPU"):
        local_device("cuda")


@pytest.mark.parametrize(
    ("device", "gpus", "cluster", "expected"),
    [
        ("auto", 0, False, False),
        ("auto", 2, False, True),
        ("auto", 1, False, "this machine has 1 GPU for 2 ranks"),
        ("auto", 1, True, True),  # the others may be away for the moment
        ("cpu", 2, False, False),
        ("cuda", 0, True, "the Ray cluster has 0 GPUs for 2 ranks"),
    ],
)
def test_rays_workers_take_gpus_by_the_same_rule(device: str, gpus: int, cluster: bool, expected: bool | str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = small_run("", tmp_path, launch=Launch(device=device))  # type: ignore[arg-type]
    if isinstance(expected, bool):
        assert _use_gpu(config, gpus, 2, cluster) is expected
    else:
        with pytest.raises(ConfigError) as error:
            _use_gpu(config, gpus, 2, cluster)
        assert expected in str(error.value)


def _flags_in_steps(world: World, config: Config) -> list[tuple[bool, bool, bool, bool]]:
    """Train, and look at each step which kernels are chosen; then once more."""
    found, step = [], train_module.pretrain_step

    def look(*arguments: Any, **more: Any) -> Any:
        found.append(_flags())
        return step(*arguments, **more)

    train_module.pretrain_step = look
    try:
        assert train_quietly(world, config) == "finished"
    finally:
        train_module.pretrain_step = step
    return [*found, _flags()]


def _flags() -> tuple[bool, bool, bool, bool]:
    cudnn = torch.backends.cudnn
    workspace = "CUBLAS_WORKSPACE_CONFIG" in os.environ
    return torch.are_deterministic_algorithms_enabled(), workspace, cudnn.deterministic, cudnn.benchmark


def test_deterministic_kernels_are_a_matter_of_the_run(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    """Chosen while a run trains, with what cuBLAS needs; on a CPU the weights are the same."""
    folders = []
    for deterministic, expected in ((False, (False, False, False, True)), (True, (True, True, True, False))):
        config = small_run(shards.folder, tmp_path / str(deterministic), train=Train(epochs=0.5, deterministic=deterministic))
        *in_steps, afterwards = ranks.run(1, _flags_in_steps, config)[0]
        assert in_steps == [expected] * 2
        assert afterwards == (False, False, False, False)
        folders.append(config.folder)
    assert_same_weights(*folders, steps=2)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_as_before_outside(allowed: bool) -> None:
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    with tf32(allowed=allowed):
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
    assert [backend.allow_tf32 for backend in backends] == before
