"""launch/quickstart.sh: which commands, in which order, with which settings. `clae`, torch and data_prep are stand-ins here;
tests/test_main_job.py runs the real ones."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from clae_dist.recipe import resolve
from tests import processes
from tests.processes import ROOT, Process

TRAINING = ["train.epochs", "train.knn_every", "optim.warmup_epochs", "batch.global_size"]

CLAE = """#!/usr/bin/env bash
printf ' %q' clae "$@" >>"$LOG"; echo >>"$LOG"
if [ "$1" = "$WAITS" ]; then trap 'exit 75' INT; touch "$LOG.waiting"; while :; do sleep 0.1; done; fi
if [ "$1" = "$FAILS" ]; then exit 3; fi
for word in "$@"; do
  case $word in
    run_dir=*/speed-probe) # the first steps are slow; then RATE images/s as a rule
      mkdir -p "${word#run_dir=}"
      printf '{"step": %s, "images_per_s": %s}\n' 4 0.5 8 "$RATE" 8 1e9 12 "$RATE" 12 1 12 "$RATE" \
        >"${word#run_dir=}/metrics.jsonl" ;;
  esac
done
"""
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *torch.cuda*) echo "$GPUS" ;;
  *"data_prep info"*) printf '{"splits": {"train": %s, "test": 1}}' "$IMAGES" ;;
  *"data_prep demo"*) printf ' %q' python "$@" >>"$LOG"; echo >>"$LOG" ;;
  *) exec "$PYTHON" "$@" ;;
esac
"""


class Quickstart:
    """A checkout whose environment is stand-ins; call it from the folder `home`."""

    def __init__(self, home: Path) -> None:
        self.home, self.checkout, self.log = home, home / "the checkout", home / "log"
        for folder in ("launch", "configs", "env/bin", "clae_dist"):
            (self.checkout / folder).mkdir(parents=True)
        for name in ("launch/quickstart.sh", "launch/show.sh", "configs/quickstart.yaml", "clae_dist/redact.py"):
            shutil.copy(ROOT / name, self.checkout / name)
        env = shlex.quote(str(self.checkout / "env"))
        self._script("launch/env.sh", f"#!/usr/bin/env bash\necho env: fine >&2\necho {env}\n")
        self._script("env/bin/clae", CLAE)
        self._script("env/bin/python", PYTHON)

    def _script(self, path: str, text: str) -> None:
        (self.checkout / path).write_text(text)
        (self.checkout / path).chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> Process:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("CLAE_")}
        ours = {
            "LOG": str(self.log),
            "PYTHON": sys.executable,
            "GPUS": "0",
            "IMAGES": "50000",
            "FAILS": "",
            "WAITS": "",
            "RATE": "100",
        }
        deaf = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None}  # whatever the caller ignores
        script = self.checkout / "launch" / "quickstart.sh"
        return processes.popen(script, *arguments, cwd=self.home, env={**clean, **ours, **environment}, **deaf)

    def __call__(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        said = process.communicate(timeout=60)[0]
        return process.returncode, said

    def ran(self) -> list[list[str]]:
        """The commands that were run, as words."""
        return [shlex.split(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def quickstart(tmp_path: Path) -> Quickstart:
    return Quickstart(tmp_path)


def shown(said: str) -> list[list[str]]:
    """The commands that were printed, without the one of the environment."""
    return [shlex.split(line[2:]) for line in said.splitlines() if line.startswith("$ ")][1:]


def settings(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words if "=" in word)


def test_it_runs_what_it_shows_and_a_dry_run_runs_nothing(quickstart: Quickstart) -> None:
    words = ["--compare", "simclr", "--workers", "3", "train.epochs=6", "seed=4"]
    code, said = quickstart("--dry-run", *words)
    assert code == 0, said
    assert quickstart.ran() == []
    dry = shown(said)
    code, said = quickstart(*words)
    assert code == 0, said
    assert quickstart.ran() == shown(said)
    verbs = ["-m", "train", "evaluate", "train", "evaluate", "report", "export", "report"]
    assert [line[1] for line in dry] == [line[1] for line in shown(said)] == verbs
    clae, simclr = (settings(line) for line in quickstart.ran() if line[1] == "train")
    assert clae["launch.workers"] == "3"
    assert clae["seed"] == simclr["seed"] == "4"
    assert clae["train.epochs"] == "6"
    assert float(simclr["train.epochs"]) == pytest.approx(11)
    assert simclr["method.name"] == "simclr"
    folder = str(quickstart.home / "runs" / "quickstart")
    assert quickstart.ran()[-1] == ["clae", "report", folder, "--compare", f"{folder}/simclr"]


def test_paths_are_relative_to_where_you_stand_and_may_hold_spaces(quickstart: Quickstart) -> None:
    home = quickstart.home
    (home / "link-train.tar.gz").symlink_to(home / "elsewhere.tar.gz")  # its name finds link-test.tar.gz beside it
    code, said = quickstart("--dry-run", "--data", "my photos", "--run-dir", "../a run", "--max-bad", "5%", CLAE_DATA="other")
    assert code == 0, said
    run_dir = home.parent / "a run"
    prepare, probe, train, *_ = shown(said)
    assert settings(probe)["run_dir"] == f"{run_dir}/speed-probe"
    assert prepare[3:] == ["demo", f"{run_dir}/shards", "--data", f"{home}/my photos", "--max-bad", "5%"]
    assert settings(train)["run_dir"] == str(run_dir)
    assert settings(train)["data.shards"] == f"{run_dir}/shards"
    assert settings(train)["tracking.uri"] == f"sqlite:///{run_dir}/mlflow.db"
    for environment, expected in (({}, []), ({"CLAE_DATA": "link-train.tar.gz"}, ["--data", f"{home}/link-train.tar.gz"])):
        assert shown(quickstart("--dry-run", **environment)[1])[0][5:] == expected


@pytest.mark.parametrize(
    ("gpus", "workers"), [(0, 2), (1, 1), (3, 2), (13, 8), *(pytest.param(n, n, marks=pytest.mark.slow) for n in (2, 8))]
)
def test_one_rank_a_gpu_that_torch_can_use(quickstart: Quickstart, gpus: int, workers: int) -> None:
    code, said = quickstart(GPUS=str(gpus))
    assert code == 0, said
    assert [settings(line)["launch.workers"] for line in quickstart.ran() if line[1] == "train"] == [str(workers)] * 2
    assert f"ranks: {workers} (" in said


RECIPE, _ = resolve(ROOT / "configs" / "quickstart.yaml")
EPOCHS, KNN_EVERY, WARMUP = RECIPE.train.epochs, RECIPE.train.knn_every, RECIPE.optim.warmup_epochs
USED = 50_000 // 128 * 128  # of CIFAR-10's images, in an epoch of whole batches


@pytest.mark.parametrize(
    ("images", "given", "rate", "epochs", "batch"),
    [
        (50_000, [], 51_234.5, 51_234.5 * 240 / USED, 128),  # a fast machine learns more
        (50_000, ["--minutes", "0.5"], 100, 3_000 / USED, 128),
        (1_281_167, [], 100, 24_000 / (1_281_167 // 128 * 128), 128),
        pytest.param(300, [], 100, 24_000 / 256, 128, marks=pytest.mark.slow),
        (54, [], 100, 24_000 / 48, 16),
        pytest.param(3, [], 100, 24_000 / 2, 2, marks=pytest.mark.slow),
        pytest.param(50_000, ["batch.global_size=512"], 100, 24_000 / (50_000 // 512 * 512), 512, marks=pytest.mark.slow),
        (100, ["batch.global_size=512"], 100, 24_000 / 512, 512),  # `clae train` says that this cannot be
        (300, ["train.epochs=1"], 100, 1, 128),
    ],
)
def test_minutes_become_epochs_by_the_speed_of_a_few_steps(
    quickstart: Quickstart, images: int, given: list[str], rate: float, epochs: float, batch: int
) -> None:
    assert RECIPE.batch.global_size == 128
    code, said = quickstart(*given, IMAGES=str(images), RATE=str(rate))
    assert code == 0, said
    runs = [settings(line) for line in quickstart.ran() if line[1] == "train"]
    found = {"batch.global_size": "128", **runs[-1]}
    assert "e" not in "".join(found[key] for key in TRAINING)  # YAML 1.1 reads 2e-05 as a text
    if "train.epochs=1" in given:
        assert len(runs) == 1  # nothing is timed
    else:
        assert runs[0]["launch.launcher"] == "local"
        assert runs[0]["tracking.name"] == "none"
        assert float(runs[0]["train.epochs"]) == pytest.approx(12 / max(1, images // batch), rel=1e-2)
        assert f"minutes at {rate:g} images/s" in said.replace(".0 images/s", " images/s")
        assert not (quickstart.home / "runs" / "quickstart" / "speed-probe").exists()
    factor = epochs / EPOCHS
    expected = [epochs, KNN_EVERY * factor, WARMUP * factor, batch]
    # six decimals of each number are written
    assert [float(found[key]) for key in TRAINING] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_what_is_given_stays(quickstart: Quickstart) -> None:
    code, said = quickstart(
        "train.epochs=4", "train.knn_every=0", "tracking.uri=http://h:1", "--compare", "simclr", IMAGES="300"
    )
    assert code == 0, said
    for line in (line for line in quickstart.ran() if line[1] == "train"):
        keys = [word.partition("=")[0] for word in line[3:]]
        assert sorted(set(keys)) == sorted(keys)  # `clae` refuses a key that comes twice
        assert settings(line)["tracking.uri"] == "http://h:1"
    found = settings(quickstart.ran()[1])
    assert [found["train.epochs"], found["train.knn_every"]] == ["4", "0"]


def test_a_run_that_was_interrupted_keeps_its_length(quickstart: Quickstart) -> None:
    """Other epochs would be another configuration, which its folder refuses."""
    run_dir = quickstart.home / "runs" / "quickstart"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("train:\n  epochs: 0.4321  # command line\n")
    code, said = quickstart("--compare", "simclr", RATE="7")
    assert code == 0, said
    assert "epochs: 0.4321, as this run began" in said
    clae, simclr = (settings(line) for line in quickstart.ran() if line[1] == "train")
    assert clae["train.epochs"] == "0.4321"
    assert float(simclr["train.epochs"]) == pytest.approx(0.4321 * 11 / 6, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "page"), [([], True), (["tracking.name=none"], False), (["tracking.uri=http://127.0.0.1:5000"], False)]
)
def test_mlflows_page_is_named_where_there_is_one_here(quickstart: Quickstart, words: list[str], page: bool) -> None:
    code, said = quickstart("--run-dir", "a run", "train.epochs=1", *words)
    assert code == 0, said
    lines = [line for line in said.splitlines() if "mlflow ui" in line and not line.startswith("$")]
    assert len(lines) == page
    if page:
        command = shlex.split(lines[0].removeprefix("MLflow's page: "))
        store = f"sqlite:///{quickstart.home}/a run/mlflow.db"
        env = quickstart.checkout / "env"
        assert command == [f"{env}/bin/python", "-m", "mlflow", "ui", "--backend-store-uri", store]


def test_a_step_that_fails_is_named_and_ends_it(quickstart: Quickstart) -> None:
    code, said = quickstart(FAILS="evaluate")
    assert code == 3
    assert said.splitlines()[-1] == 'quickstart: "Evaluation" failed (exit code 3); see the reason above.'
    assert quickstart.ran()[-1][1] == "evaluate"


def test_ctrl_c_lets_the_run_save_and_ends_with_its_exit_code(quickstart: Quickstart) -> None:
    process = quickstart.start("train.epochs=1", WAITS="train")
    deadline = time.monotonic() + 30
    while not Path(f"{quickstart.log}.waiting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 75
    assert said.splitlines()[-1].startswith('quickstart: stopped during "Pretraining: CLAE on 2 ranks"; the same command')
    assert quickstart.ran()[-1][1] == "train"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--wrong", "--wrong is not an option; see --help."),
        ("--data", "--data needs a value"),
        ("--minutes 0", "--minutes is 0; use a number above 0"),
        ("--minutes four", "--minutes is four; use"),
        ("--minutes 2 train.epochs=1", "--minutes and train.epochs= both say how long; keep one."),
        ("--workers two", "--workers is two; use an integer from 1."),
        ("--workers 0", "--workers is 0; use"),
        ("--compare moco", "--compare moco is not known; use --compare simclr."),
        ("train.epochs=8 train.epochs=4", "train.epochs is given twice; keep one."),
        ("--workers 2 launch.workers=2", "launch.workers is --workers here, and given twice"),
        ("--data a --data b", "--data is given twice; keep one."),
        ("run_dir=x", "run_dir=x is --run-dir here."),
        ("data.shards=x", "for others, use clae train"),
    ],
)
def test_wrong_usage_is_one_line(quickstart: Quickstart, words: str, says: str) -> None:
    code, said = quickstart(*words.split())
    assert code == 2
    assert said.startswith("quickstart: ")
    assert says in said
    assert said.count("\n") == 1
