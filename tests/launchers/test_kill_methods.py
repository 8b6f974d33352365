"""kill -9 of a rank under every method: the same command resumes with the same bits, on other ranks up to rounding."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.data.manifest import Manifest
from clae_dist.errors import FAILED, OK
from clae_dist.methods import METHODS
from clae_dist.runs.checkpoint import load_checkpoint
from tests.launchers.test_launchers import ranks_of
from tests.processes import CLAE, finish, read_until, started

SETTINGS = (
    *("model.encoder=small_resnet", "model.projector_dim=16", "model.projector_hidden=16", "data.image_size=16"),
    *("data.workers=0", "batch.global_size=24", "train.epochs=6", "train.log_every=1", "train.knn_every=0", "train.threads=1"),
    *(
        "train.precision=float64",
        "optim.name=adamw",
        "optim.learning_rate=1e-3",
        "optim.scaling=none",
        "optim.warmup_epochs=0.5",
    ),
    *("optim.schedule=cosine", "checkpoint.every_steps=4", "tracking.name=none", "launch.max_failures=0"),
)
OWN = {
    "anchored": ["model.init=INIT", "attack.steps=2"],
    "ascl": ["method.queue=48"],
    "clae_fused": ["method.name=clae_fused"],
    "clusterns": ["method.clusters=8"],
    "dscl": ["method.queue=48", "data.long_tail=2"],
    "dynacl": ["method.block_epochs=2", "augment.anneal_epochs=2", "attack.steps=2"],
    "moco": ["method.queue=48", "method.alpha=1.0"],
}
IN_CI = ("clusterns", "dynacl", "moco")  # centroids, schedules, a queue and a momentum encoder


def line(method: str, shards: Manifest, run_dir: Path, workers: int = 2) -> list[str]:
    recipe = "cifar10/clae" if method == "clae_fused" else f"cifar10/{method}"
    own = [setting.replace("INIT", str(run_dir.parent / "original")) for setting in OWN.get(method, [])]
    return [
        *CLAE,
        "train",
        recipe,
        f"data.shards={shards.folder}",
        f"run_dir={run_dir}",
        *SETTINGS,
        *own,
        f"launch.workers={workers}",
    ]


def run(arguments: list[str]) -> str:
    with started(*arguments, "--launcher", "local") as process:
        code, said = finish(process)
    assert code == OK, said
    return said


def tensors(state: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield f"{where}{name}", value
        elif isinstance(value, Mapping):
            yield from tensors(value, f"{where}{name}/")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.long) for name in sorted(METHODS)]
)
def test_a_killed_run_resumes(method: str, shards: Manifest, tmp_path: Path) -> None:
    if method == "anchored":
        run(line("simclr", shards, tmp_path / "original"))
    run(line(method, shards, tmp_path / "undisturbed"))
    with started(*line(method, shards, tmp_path / "run"), "--launcher", "local") as process:
        read_until(process, "step 10/")
        ranks_of(process)[1].kill()
        code, said = finish(process)
    assert code == FAILED, said
    shutil.copytree(tmp_path / "run", tmp_path / "on one rank")
    assert "resuming after step" in run(line(method, shards, tmp_path / "run"))
    assert "resuming after step" in run(line(method, shards, tmp_path / "on one rank", 1))
    states, steps = [], []
    for name in ("undisturbed", "run", "on one rank"):
        checkpoint = load_checkpoint(tmp_path / name, pytest.fail)
        assert checkpoint is not None
        steps.append(checkpoint.step)
        states.append(dict(tensors(checkpoint.state())))
    assert steps[0] > 10
    assert steps == steps[:1] * 3
    expected, same, near = states
    assert expected.keys() == same.keys()
    assert [name for name in expected if not torch.equal(same[name], expected[name])] == []
    for name, value in expected.items():
        if name.split("/")[0] in ("model", "keys", "method"):
            torch.testing.assert_close(near[name], value, atol=1e-8, rtol=0, msg=name)  # float64 over some steps of Adam
