"""How often the local launcher starts ranks again, and what a start must not take over from the one before."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Batch, Config, Launch
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import BAD_DATA, FAILED, OK
from clae_dist.launchers import local, start
from clae_dist.launchers.rank import Ending
from clae_dist.launchers.ray import _StopFile
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import STOP_FILE
from tests.small_run import small_run

LOST = Ending(FAILED, "rank 1 of 2 was killed by SIGKILL. The same command resumes from the newest checkpoint.", again=True)


@pytest.mark.parametrize(
    ("endings", "max_failures", "starts"),
    [
        ([LOST, LOST, LOST, LOST], 2, 3),
        ([LOST, LOST, LOST, LOST], 0, 1),
        ([LOST, LOST, Ending(OK, "")], 2, 3),
        ([LOST, Ending(BAD_DATA, "a shard is gone")], 2, 2),  # another start would end the same
    ],
)
def test_ranks_are_started_again_as_often_as_requested(
    endings: list[Ending], max_failures: int, starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(endings)
    given: list[Ending] = []

    def spawn(*arguments: Any, **settings: Any) -> Ending:
        given.append(next(told))
        return given[-1]

    monkeypatch.setattr(local, "spawn", spawn)
    config = Config(run_dir=str(tmp_path), batch=Batch(global_size=16), launch=Launch(workers=2, max_failures=max_failures))
    assert local.launch(Recipe(config)) == endings[starts - 1]
    assert len(given) == starts
    console = (tmp_path / "console.log").read_text() if (tmp_path / "console.log").exists() else ""
    assert console.count("Starting again (failure ") == starts - 1


@pytest.mark.parametrize("name", ["local", "torchrun", "ray"])
def test_a_request_to_stop_that_was_left_behind_is_none_of_a_new_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that was killed leaves its STOP file; the run would end after one step, again and again."""
    seen: list[bool] = []
    launcher = importlib.import_module(f"clae_dist.launchers.{name}")

    def launch(recipe: Recipe, *, debug: bool) -> Ending:
        seen.append((recipe.config.folder / STOP_FILE).exists())
        return Ending(OK, "")

    monkeypatch.setattr(launcher, "launch", launch)
    shards = str(write_synthetic_set(tmp_path / "shards", 32, 16).folder)
    config = small_run(shards, tmp_path / "run", launch=Launch(launcher=name, workers=1))  # type: ignore[arg-type]
    config.folder.mkdir()
    (config.folder / STOP_FILE).write_text("SIGTERM")
    start(Recipe(config))
    assert seen == [False]


def test_a_scheduler_may_ask_ray_to_stop_as_often_as_it_likes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first signal makes the STOP file; SIGUSR1 again changes nothing, Ctrl-C again ends at once."""
    with _StopFile(tmp_path / STOP_FILE) as stop:
        try:
            for _ in range(3):
                signal.raise_signal(signal.SIGUSR1)
        except KeyboardInterrupt:
            pytest.fail("SIGUSR1 once more ended the launcher")
        assert stop.asked
        assert (tmp_path / STOP_FILE).exists()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert not (tmp_path / STOP_FILE).exists()
    assert capsys.readouterr().out.count("SIGUSR1: saving after this step") == 1
