"""The slow rank is named with its part and price; noise, bursts and ranks that are all slow are not."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.bench.measure import replaced
from clae_dist.collectives import observed, waiting
from clae_dist.config import Config, Model, Parallel
from clae_dist.data import shards as shards_module
from clae_dist.data.manifest import Manifest
from clae_dist.methods.simclr import SimClr
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import STOP_FILE
from clae_dist.training import clock as clock_module
from clae_dist.training import pace
from clae_dist.training import train as training
from clae_dist.training.clock import Clock
from clae_dist.training.pace import PARTS, Slow, find_slow
from clae_dist.world import World
from tests.ranks import RankPool
from tests.training.disturbed import BARE, logged, recipe

K = 8


def windows(num_ranks: int, noise: float = 0.0) -> torch.Tensor:
    """Steps of a second, of which 0.4 s are the forward; nothing is slow."""
    torch.manual_seed(num_ranks)
    rows = torch.zeros(K, num_ranks, len(PARTS) + 3, dtype=torch.float64)
    for part, seconds in {"data": 0.05, "forward": 0.4, "backward": 0.4, "update": 0.1}.items():
        rows[..., PARTS.index(part)] = seconds
    rows[..., len(PARTS)] = 1.0
    return rows + noise * torch.randn_like(rows)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("part", ["forward", "update", "other"])
def test_one_slow_rank(num_ranks: int, part: str) -> None:
    rows = windows(num_ranks, noise=0.01)
    rows[:, 1, PARTS.index(part)] += 0.2
    slow = find_slow(rows)
    assert slow is not None
    assert (slow.rank, slow.part) == (1, part)
    assert slow.seconds - slow.others_s == pytest.approx(0.2, abs=0.03)
    assert slow.price == pytest.approx(0.2, abs=0.05)
    assert "rank 1 on here is slow" in slow.describe("here")


def test_the_price_is_what_the_slowest_other_would_save() -> None:
    rows = windows(3)
    rows[:, 0, PARTS.index("forward")], rows[:, 1, PARTS.index("forward")] = 0.7, 0.6
    assert find_slow(rows) == Slow(0, "forward", 0.7, 0.5, pytest.approx(0.1))  # of the two others, the median is 0.5


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_nothing_slow(num_ranks: int) -> None:
    assert find_slow(windows(num_ranks, noise=0.03)) is None
    burst = windows(num_ranks)
    burst[3, 0, PARTS.index("forward")] += 3.0  # one window
    assert find_slow(burst) is None
    in_turns = windows(num_ranks)
    for window in range(K):
        in_turns[window, window % num_ranks, PARTS.index("forward")] += 0.3
    assert find_slow(in_turns) is None
    small = windows(num_ranks)
    small[:, 0, PARTS.index("forward")] += 0.03
    assert find_slow(small) is None


@pytest.mark.parametrize(("extra", "name"), [(1, "reading"), (2, "decoding")])
def test_slow_data_is_read_or_decoded(extra: int, name: str) -> None:
    rows = windows(3)
    rows[:, 2, PARTS.index("data")] += 0.3
    rows[:, 2, len(PARTS) + extra] += 0.2
    rows[:, 2, len(PARTS) + 3 - extra] += 0.1
    slow = find_slow(rows)
    assert slow is not None
    assert (slow.rank, slow.part) == (2, name)


def test_waits_are_not_the_own_time_of_a_part() -> None:
    """`read` and `lap` count the same seconds, each from its own last call, and neither those in which it was stopped."""
    now = 0.0
    clock_of_test = type("Time", (), {"perf_counter": staticmethod(lambda: now)})
    with replaced(clock_module, time=clock_of_test):
        clock = Clock(torch.device("cpu"))
        with observed(clock.waiting), clock.timed("forward"):
            now += 1
            with clock.timed("attack"):
                now += 2
                with waiting():
                    now += 4
            with waiting():
                now += 8
        spent = {"forward": 1.0, "attack": 2.0, "waiting": 12.0}
        assert clock.lap() == (15.0, spent)
        with clock.stopped(), observed(clock.waiting), waiting():
            now += 100
        now += 1
        assert clock.lap() == (1.0, dict.fromkeys(spent, 0.0))
        assert clock.read() == (16.0, spent)
    with waiting():  # nobody observes
        pass


def planted(
    world: World, config: Config, rank: int, part: str, delay_s: float, window_s: float = 0.1, within_s: float = 0.0
) -> tuple[Slow | None, str]:
    """Train; `part` takes longer on `rank`. The slow rank when training ended, and the console.

    With `within_s`, training ends when a rank is named, or after that many seconds.
    """
    begin = time.monotonic()
    real_timed, real_decode = Clock.timed, shards_module.decode_rgb
    slow: list[Slow | None] = [None]

    @contextmanager
    def timed(self: Clock, name: str) -> Iterator[None]:
        with real_timed(self, name):
            if world.rank == rank and name == part:
                time.sleep(delay_s)
            yield

    def decode(data: Any) -> torch.Tensor:
        if world.rank == rank and part == "decoding":
            time.sleep(delay_s / 8)
        return real_decode(data)

    real_tell, real_hear = pace.Pace._tell, pace.Pace._hear

    def tell(self: pace.Pace, now: Slow | None) -> None:
        real_tell(self, now)
        slow[0] = now

    def hear(self: pace.Pace, rows_WN: torch.Tensor) -> None:
        real_hear(self, rows_WN)
        if within_s and world.is_main and (slow[0] or time.monotonic() - begin > within_s):
            (config.folder / STOP_FILE).touch()

    said = io.StringIO()
    windows = replaced(pace, _WINDOW_S=window_s, _NUM_WINDOWS=8 if within_s else 4)
    watched = replaced(pace.Pace, _tell=tell, _hear=hear)
    with windows, replaced(Clock, timed=timed), watched, replaced(shards_module, decode_rgb=decode):
        training.train(Recipe(config), world, said)
    return slow[0], said.getvalue()


@pytest.mark.parametrize(
    ("rank", "part"),
    [
        (1, "backward"),
        *(pytest.param(0, part, marks=pytest.mark.slow) for part in ("decoding", "forward", "attack", "update")),
    ],
)
def test_a_planted_delay_is_named_on_all_ranks(ranks: RankPool, shards: Manifest, tmp_path: Path, rank: int, part: str) -> None:
    # With local statistics, the others wait in the reduction of gradients alone.
    backward = {"model": Model(encoder="small_resnet", norm="local"), "method": SimClr.Settings()}
    sections = backward if part == "backward" else {}
    config = recipe(shards, tmp_path / "run", epochs=4, every_steps=0, sections=sections, **BARE)
    results = ranks.run(2, planted, config, rank, part, 0.25)
    for slow, _ in results:
        assert slow is not None
        assert (slow.rank, slow.part) == (rank, part)
        assert slow.price > 0.2
    assert f"rank {rank} on " in results[0][1]
    assert f"is slow: {part} takes " in results[0][1]
    last = [line for line in logged(config) if "loss" in line][-1]
    assert last["slow_rank"] == rank
    assert last["slow_share"] > 20


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_ranks", "parallel"), [(2, Parallel(backend="fsdp2")), (4, Parallel(backend="deepspeed", zero_stage=3))]
)
def test_nobody_is_named_without_a_delay(
    ranks: RankPool, shards: Manifest, tmp_path: Path, num_ranks: int, parallel: Parallel
) -> None:
    """Two minutes where others wait in every unit."""
    if parallel.backend == "deepspeed":
        pytest.importorskip("deepspeed")
    sections = {"parallel": parallel}
    config = recipe(shards, tmp_path / "run", epochs=10**5, every_steps=0, knn_every=0, log_every=20, sections=sections)
    slow, said = ranks.run(num_ranks, planted, config, -1, "", 0.0, 5.0, 120.0)[0]
    assert slow is None
    assert "is slow" not in said


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "part"), [("fsdp2", "attack"), ("fsdp2", "backward"), ("zero3", "backward")])
def test_a_planted_delay_is_named_where_others_wait_in_every_unit(
    ranks: RankPool, shards: Manifest, tmp_path: Path, backend: str, part: str
) -> None:
    """Their collectives are within forward and backward, which take equally long on all ranks."""
    num_ranks, parallel = 2, Parallel(backend="fsdp2")
    if backend == "zero3":
        pytest.importorskip("deepspeed")
        num_ranks, parallel = 4, Parallel(backend="deepspeed", zero_stage=3)  # all ranks of the pool
    sections: dict[str, Any] = {"parallel": parallel, "model": Model(encoder="small_resnet", norm="local")}
    config = recipe(shards, tmp_path / "run", epochs=4, every_steps=0, sections=sections, **BARE)
    for slow, _ in ranks.run(num_ranks, planted, config, 1, part, 0.2 * num_ranks):
        assert slow is not None
        assert (slow.rank, slow.part) == (1, part)
        assert slow.price > 0.07


@pytest.mark.long
def test_nineteen_of_twenty_delays_are_named_within_a_minute(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    """20 to 50 % of a step of about half a second, in any part on any rank; and nothing in five minutes without a delay."""
    draw, parts = random.Random(1), ("decoding", "augmentation", "forward", "attack", "backward", "update")

    def run(name: str, num_ranks: int, within_s: float, rank: int = -1, part: str = "", delay_s: float = 0.0) -> Slow | None:
        config = recipe(shards, tmp_path / name, epochs=10**5, every_steps=0, knn_every=0, log_every=20)
        slow: Slow | None = ranks.run(num_ranks, planted, config, rank, part, delay_s, 5.0, within_s)[0][0]
        return slow

    assert run("undisturbed", 3, 280) is None
    named = 0
    for trial in range(20):
        num_ranks, part, share = draw.choice((2, 3, 4)), draw.choice(parts), draw.uniform(0.2, 0.5)
        rank = draw.randrange(num_ranks)
        slow = run(str(trial), num_ranks, 60, rank, part, 0.5 * share)
        named += slow is not None and (slow.rank, slow.part) == (rank, part)
        print(f"{part} of rank {rank} of {num_ranks}, {100 * share:.0f} %: {slow}")
    assert named >= 19
