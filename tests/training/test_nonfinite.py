"""Non-finite losses and gradients: the step is skipped without a trace under every backend, counted, and can be replayed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.cli import main
from clae_dist.config import Checkpointing, Config, Guard, Model, Optim, Parallel, Train
from clae_dist.contrast.step import NonFinite, StepMetrics
from clae_dist.data.manifest import Manifest
from clae_dist.errors import BAD_CONFIG, OK, UNEXPECTED, RankError
from clae_dist.launchers.replay import replay_step
from clae_dist.recipe import Recipe
from clae_dist.runs.checkpoint import load_checkpoint
from clae_dist.training import train as training
from clae_dist.world import World
from tests.ranks import RankPool
from tests.small_run import small_run

BROKEN = 2  # steps before the one that is not finite
BACKENDS = [
    Parallel(),
    pytest.param(Parallel(backend="fsdp2"), marks=pytest.mark.slow),
    *(pytest.param(Parallel(backend="deepspeed", zero_stage=stage), marks=pytest.mark.slow) for stage in (0, 1, 2, 3)),
]


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    """DeepSpeed shares among all processes of torch.distributed."""
    pool = RankPool(2)
    yield pool
    pool.close()


def recipe(shards: Manifest, run_dir: Path, parallel: Parallel | None = None, norm: str = "global", allowed: int = 1) -> Config:
    return small_run(
        shards.folder,
        run_dir,
        model=Model(encoder="small_resnet", projector_dim=16, norm=norm),  # type: ignore[arg-type]
        optim=Optim(name="adamw", learning_rate=1e-3, scaling="none", warmup_epochs=0, clip_norm=1.0),
        train=Train(epochs=1, precision="float32", log_every=1, diagnose_every=9, knn_every=0, threads=1),
        checkpoint=Checkpointing(every_steps=9),
        parallel=parallel or Parallel(),
        guard=Guard(max_skipped=allowed),
    )


class _Infinite:
    """A contrast whose value is right and whose gradient overflows."""

    def __init__(self, contrast: Any) -> None:
        self._contrast, self.rows = contrast, contrast.rows

    def __call__(self, anchor: Any, other: Any) -> Any:
        return self._contrast(anchor, other) + ((other.mine - other.mine.detach()) * 1e38 * 1e38).sum()


@contextmanager
def broken(world: World, how: str, steps: tuple[int, ...] = (BROKEN,)) -> Iterator[None]:
    """Inside, those steps of training are not finite."""
    real, count = training.pretrain_step, -1

    def step(run: Any, batch: Any, moment: Any) -> StepMetrics:
        nonlocal count
        count += 1
        if count not in steps:
            return real(run, batch, moment)
        if how == "skipped by hand":
            nothing = torch.tensor(torch.nan)
            raise NonFinite("by hand", StepMetrics(nothing, {"clean": nothing}, nothing))
        if how == "gradient":
            return real(replace(run, contrast=_Infinite(run.contrast)), batch, moment)
        if how == "weight":
            next(run.encoding.backend.model.encoder.parameters()).data[0] = torch.inf
            return real(run, batch, moment)
        poison = torch.nan if world.rank == world.size - 1 else 1.0
        x, y = run.augment(batch)
        x[0, 0, 0, 0] *= poison
        return real(replace(run, augment=lambda batch: (x, y)), batch, moment)

    training.pretrain_step = step
    try:
        yield
    finally:
        training.pretrain_step = real


def train(world: World, config: Config, how: str, steps: tuple[int, ...] = (BROKEN,)) -> str:
    """What the run said; or why it ended."""
    said = io.StringIO()
    with broken(world, how, steps):
        try:
            training.train(Recipe(config), world, said)
        except RankError as error:
            return f"RankError: {error}"
    return said.getvalue()


def trained(config: Config) -> dict[str, Any]:
    checkpoint = load_checkpoint(config.folder, pytest.fail)
    assert checkpoint is not None
    return {"step": checkpoint.step, **checkpoint.info, **checkpoint.state()}


@pytest.mark.parametrize("parallel", BACKENDS, ids=lambda p: f"{p.backend}{p.zero_stage}")
def test_a_skipped_step_leaves_no_trace(
    request: pytest.FixtureRequest, shards: Manifest, tmp_path: Path, parallel: Parallel
) -> None:
    """Neither in weights nor in optimiser or running statistics: the same bits as a run that never took the step."""
    ranks: RankPool = request.getfixturevalue("pair" if parallel.backend == "deepspeed" else "ranks")
    states = {}
    for how in ("skipped by hand", "pixel", "gradient"):
        config = recipe(shards, tmp_path / how.replace(" ", "-"), parallel)
        said = ranks.run(2, train, config, how)[0]
        assert "skipped (1 of at most 1, guard.max_skipped)" in said
        assert "finished: 4 steps" in said
        states[how] = trained(config)
        assert states[how]["skipped_steps"] == 1
        lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "learning_rate" in line]
        assert [line.get("skipped_steps") for line in lines] == [None, None, 1, 1]
        assert [("loss" in line) for line in lines] == [True, True, False, True]
    for how in ("pixel", "gradient"):
        for part in ("model", "optimizer"):
            found, wanted = (_flat(states[name][part]) for name in (how, "skipped by hand"))
            assert found.keys() == wanted.keys()
            assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def _flat(state: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for name, value in state.items():
        found.update(
            _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": torch.as_tensor(value)}
        )
    return found


@pytest.mark.slow
def test_more_than_allowed_end_the_run_also_after_a_restart(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run", allowed=1)
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=1))
    found = ranks.run(2, train, config, "pixel", (1, 3))
    assert len(set(found)) == 1
    assert found[0].startswith("RankError: the loss is not finite: embeddings of a view (")
    assert trained(config)["step"] == 3
    assert ranks.run(2, train, config, "pixel", (0,))[0].startswith("RankError: the loss is not finite")  # the count goes on
    more = replace(config, guard=Guard(max_skipped=2))
    assert "skipped (2 of at most 2" in ranks.run(2, train, more, "gradient", (0,))[0]


@pytest.mark.parametrize("norm", ["global", pytest.param("local", marks=pytest.mark.slow)])
def test_what_was_written_down_is_taken_again(ranks: RankPool, shards: Manifest, tmp_path: Path, norm: str) -> None:
    config = recipe(shards, tmp_path / "run", norm=norm, allowed=0)
    assert ranks.run(2, train, config, "weight")[0].startswith("RankError: the loss is not finite")
    folder = config.folder / "nonfinite" / "step-00000003"
    content = json.loads((folder / "step.json").read_text())
    assert content["step"] == BROKEN
    assert [len(rank["images"]) for rank in content["ranks"]] == [12, 12]
    assert content["ranks"][0]["images"][0].startswith("train-0000")
    assert "clean" in content["ranks"][1]["loss"]
    ending = replay_step(folder)
    assert ending.code == OK, ending.message
    assert "reproduced" in ending.message
    assert "first that is not finite: the output of encoder." in ending.message
    assert "its weight" in ending.message


def test_a_folder_without_a_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "run" / "nonfinite" / "step-00000001")]) == BAD_CONFIG
    assert "which cannot be read" in capsys.readouterr().err


def test_what_the_weights_and_images_do_not_explain_is_not_reproduced(
    ranks: RankPool, shards: Manifest, tmp_path: Path
) -> None:
    """A bit that flipped on one rank's device, say."""
    config = recipe(shards, tmp_path / "run", allowed=0)
    ranks.run(2, train, config, "pixel")
    ending = replay_step(config.folder / "nonfinite" / "step-00000003")
    assert ending.code == UNEXPECTED, ending.message
    assert "not reproduced: a non-finite number, the parts of the loss" in ending.message
