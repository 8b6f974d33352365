"""Start again or not: one table for every launcher."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import DistBackendError

from clae_dist.config import Batch, Config, Launch
from clae_dist.errors import (
    BAD_CONFIG,
    BAD_DATA,
    FAILED,
    HUNG,
    NETWORK,
    OK,
    STOPPED,
    STORAGE,
    UNEXPECTED,
    CheckpointError,
    ConfigError,
    DataError,
    RankError,
)
from clae_dist.keys import flatten
from clae_dist.launchers import local, rank, ray, torchrun
from clae_dist.launchers.rank import Ending, RankBroke
from clae_dist.recipe import Recipe
from clae_dist.world import told

# An error of training, the exit code of a run that is not started again, and whether its ranks are started again.
TABLE: list[tuple[Exception, int, bool]] = [
    (ConfigError("a setting"), BAD_CONFIG, False),
    (DataError("a shard"), BAD_DATA, False),
    (RankError("the loss is not finite"), FAILED, False),
    (CheckpointError("the disk of all ranks is full"), STORAGE, False),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), UNEXPECTED, True),
    (DistBackendError("NCCL error: unhandled system error"), NETWORK, True),
    (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), STORAGE, True),
    (KeyError("a fault of the program"), UNEXPECTED, True),
]


def under_local(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bool]:
    starts = []

    def spawn(workers: int, work: Callable[..., Ending], *arguments: Any, **settings: Any) -> Ending:
        starts.append(workers)
        return local._ending(work, *arguments)

    monkeypatch.setattr(local, "spawn", spawn)
    code = local.launch(Recipe(config)).code
    assert len(starts) in (1, 2)
    return code, len(starts) == 2


def under_ray(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bool]:
    """Ray starts ranks again that raise."""
    written: list[str] = []
    monkeypatch.setattr(ray, "RayStore", lambda: SimpleNamespace(put=lambda name, text: written.append(text)))
    monkeypatch.setenv("RANK", "0")
    try:
        ray._rank_main({"config": flatten(config), "origins": {}, "debug": False, "name": "run"})
    except RankBroke as error:
        return error.code, True
    assert len(written) == 1
    return int(ray.json.loads(written[0])["code"]), False


def under_torchrun(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bool]:
    """torchrun starts ranks again that end with another code than 0; the code for good is in a file."""
    ending = config.folder / "ending"
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "CLAE_ENDING": str(ending)}.items():
        monkeypatch.setenv(name, value)
    code = told(torchrun.launch(Recipe(config)).code)
    return (int(ending.read_text()), False) if code == OK else (code, True)


@pytest.mark.parametrize("launcher", [under_local, under_ray, under_torchrun])
@pytest.mark.parametrize(("error", "code", "again"), TABLE, ids=lambda value: type(value).__name__)
def test_every_launcher_starts_again_by_the_same_rule(
    launcher: Any, error: Exception, code: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(rank, "train", train)
    launch = Launch(workers=2, max_failures=1, device="cpu")
    found = launcher(Config(run_dir=str(tmp_path), batch=Batch(global_size=16), launch=launch), monkeypatch)
    # torchrun's agent sees only that the rank ended alone: whatever the reason, with one code.
    assert found == (UNEXPECTED if launcher is under_torchrun and again else code, again)


def test_a_ray_worker_refuses_the_third_start_of_the_same_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would start ranks again as often as launch.max_failures says; after a new command, they start once more."""
    starts: list[int] = []

    def train(*arguments: Any) -> None:
        starts.append(1)
        raise KeyError("a fault of the program")

    monkeypatch.setattr(rank, "train", train)
    written: list[str] = []
    monkeypatch.setattr(ray, "RayStore", lambda: SimpleNamespace(put=lambda name, text: written.append(text)))
    monkeypatch.setenv("RANK", "0")
    config = Config(run_dir=str(tmp_path), batch=Batch(global_size=16), launch=Launch(workers=1, max_failures=9, device="cpu"))
    settings = {"config": flatten(config), "origins": {}, "debug": False, "name": "run", "num_ends": 0}
    for _ in range(2):
        with pytest.raises(RankBroke, match="a fault of the program"):
            ray._rank_main(settings)
    ray._rank_main(settings)
    (ending,) = map(ray.json.loads, written)
    assert len(starts) == 2
    assert ending["code"] == UNEXPECTED
    assert "rank 0 has failed twice in the same way before any checkpoint, and is not started a third time" in ending["message"]
    with pytest.raises(RankBroke):
        ray._rank_main({**settings, "num_ends": 2})
    assert len(starts) == 3


@pytest.mark.parametrize(("code", "again"), [(-9, True), (HUNG, True), (STOPPED, False)])
def test_a_rank_that_leaves_without_a_word_is_started_again_unless_it_was_asked_to(code: int, again: bool) -> None:
    assert local._how_it_died(1, 2, code, "", "").again is again
