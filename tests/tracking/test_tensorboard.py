"""Events of TensorBoard, read back by TensorBoard's own reader."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Config, Tracking
from clae_dist.config.conversion import convert
from clae_dist.errors import ConfigError
from clae_dist.recipe import resolve
from clae_dist.tracking import Trackers, build_trackers, continue_tracking

pytest.importorskip("tensorboard")
CONFIG = Config(tracking=Tracking(name="tensorboard"))
TAGS = {"git_revision": "abc"}


def build(run_dir: Path, seen: int) -> Trackers:
    return build_trackers(CONFIG, run_dir, "k", tags=TAGS, total_steps=9, resume_images_seen=seen, stream=io.StringIO())


def points(run_dir: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return [(one.step, one.value) for one in events.Scalars(name)]


def test_a_killed_run_that_resumes_has_every_point_once(tmp_path: Path) -> None:
    killed = build(tmp_path, 0)
    for step in range(1, 6):
        killed.log({"loss": float(step)}, step * 10)
    assert points(tmp_path, "train/loss") == [(step * 10, float(step)) for step in range(1, 6)]
    resumed = build(tmp_path, 30)
    for step in range(4, 8):
        resumed.log({"loss": step + 0.5}, step * 10)
    resumed.close("finished")
    assert points(tmp_path, "train/loss") == [(10, 1), (20, 2), (30, 3), (40, 4.5), (50, 5.5), (60, 6.5), (70, 7.5)]
    killed.close("failed")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    killed = build(tmp_path, 0)
    killed.log({"loss": 1.0}, 10)
    again = build(tmp_path, 0)
    again.log({"loss": 2.0}, 10)
    again.close("stopped")
    assert points(tmp_path, "train/loss") == [(10, 2)]
    killed.close("failed")


def test_results_of_a_second_evaluation_replace_the_first(tmp_path: Path) -> None:
    trained = build(tmp_path, 0)
    trained.log({"loss": 1.0}, 90)
    trained.close("finished")
    for accuracy in (70.0, 80.0):
        later = continue_tracking(CONFIG, tmp_path, "k", tags=TAGS, images_seen=90, say=print)
        later.log({"knn_accuracy_after": accuracy}, 90)
        later.close("finished")
    assert points(tmp_path, "eval/knn_accuracy_after") == [(90, 80)]
    assert points(tmp_path, "train/loss") == [(90, 1)]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("[mlflow,tensorboard]", "mlflow+tensorboard"),
        ("[tensorboard,mlflow]", "mlflow+tensorboard"),
        ("[tensorboard]", "tensorboard"),
        ("none", "none"),
        ("mlflow", "mlflow"),
    ],
)
def test_a_name_or_a_list_of_names(given: str, name: Any) -> None:
    tracking = resolve("quickstart", [f"tracking.name={given}"]).config.tracking
    assert tracking == Tracking(name=name)
    assert tracking.uses("mlflow") == ("mlflow" in name)


def test_an_unknown_name_in_a_list_is_refused() -> None:
    from typing import Literal

    with pytest.raises(ConfigError, match=r"expected one of a, a\+b, none"):
        convert("tracking.name", ["a", "c"], Literal["a", "a+b", "none"], "here")


def test_one_file_imports_it() -> None:
    root = Path(__file__).parents[2]
    files = [*(root / "clae_dist").rglob("*.py"), *(root / "data_prep").rglob("*.py")]
    importing = [path.name for path in files if "import SummaryWriter" in path.read_text()]
    assert importing == ["tensorboard.py"]
