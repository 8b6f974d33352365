"""Ranks of real processes that break on purpose: the cause in the run folder and the exit code, and when they start again."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clae_dist.config import Batch, Config, Launch
from clae_dist.errors import FAILED, MEMORY, NETWORK, OK, UNEXPECTED, DataError
from clae_dist.launchers import local, rank
from clae_dist.launchers.out_of_memory import num_killed
from clae_dist.launchers.rank import Ending
from clae_dist.recipe import Recipe
from clae_dist.runs.ends import End, read_ends
from clae_dist.runs.folder import RunFolder
from clae_dist.training.train import LoopResult
from clae_dist.world import World
from tests import processes
from tests.checkpoints import write_checkpoint
from tests.launchers.test_launchers import command
from tests.processes import finish, read_until, started

Plant = Callable[[Path], None]


def planted(plant: Plant, recipe: Recipe, debug: bool) -> Ending:
    """A rank whose training is: rank 1 does `plant` if there is one more start to break, all others meet in a collective."""

    def train(recipe: Recipe, world: World, stream: Any, attempt: Any) -> LoopResult:
        attempt.start = world.broadcast(attempt.start)
        attempt.holds_lease = attempt.opened = attempt.trained = True
        attempt.step = 7
        folder = recipe.config.folder
        left = int((folder / "breaks").read_text())
        world.gather_objects(left)
        if world.rank == 1 and left:
            (folder / "breaks").write_text(str(left - 1))
            plant(folder)
        world.gather_objects("the step")
        return LoopResult("finished", 8)

    rank.train = train
    return local._train(recipe, debug)


def cuda_error(folder: Path) -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def nccl_error(folder: Path) -> None:
    raise dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error, NCCL version 2.27")


def out_of_memory(folder: Path) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def fault(folder: Path) -> None:
    raise KeyError("a fault of the program")


def other_fault(folder: Path) -> None:
    raise KeyError("one") if (folder / "breaks").read_text() == "1" else ValueError("another")


def fault_after_progress(folder: Path) -> None:
    write_checkpoint(folder, 10 - int((folder / "breaks").read_text()), {"model/a": torch.ones(1)})
    raise KeyError("a fault of the program")


def killed(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cuda_error_work(*arguments: Any) -> Ending:
    return planted(cuda_error, *arguments)


def nccl_error_work(*arguments: Any) -> Ending:
    return planted(nccl_error, *arguments)


def out_of_memory_work(*arguments: Any) -> Ending:
    return planted(out_of_memory, *arguments)


def fault_work(*arguments: Any) -> Ending:
    return planted(fault, *arguments)


def other_fault_work(*arguments: Any) -> Ending:
    return planted(other_fault, *arguments)


def fault_after_progress_work(*arguments: Any) -> Ending:
    return planted(fault_after_progress, *arguments)


def killed_work(*arguments: Any) -> Ending:
    return planted(killed, *arguments)


def run(work: Any, folder: Path, breaks: int, max_failures: int = 3) -> tuple[Ending, list[End]]:
    """The ending of the run in which `breaks` starts break, and the ends of all starts."""
    folder.mkdir(exist_ok=True)
    (folder / "breaks").write_text(str(breaks))
    launch = Launch(workers=2, max_failures=max_failures, device="cpu")
    ending = local.launch(Recipe(Config(run_dir=str(folder), batch=Batch(global_size=16), launch=launch)), work=work)
    return ending, read_ends(folder)


@pytest.mark.parametrize(
    ("work", "cause", "code", "text"),
    [
        (cuda_error_work, "code", UNEXPECTED, "illegal memory access"),
        pytest.param(nccl_error_work, "network", NETWORK, "unhandled system error", marks=pytest.mark.slow),
        pytest.param(out_of_memory_work, "memory", MEMORY, "Tried to allocate", marks=pytest.mark.slow),
        (killed_work, "host", FAILED, "rank 1 of 2 was killed by SIGKILL."),
    ],
)
def test_a_rank_that_breaks_is_started_again_and_its_cause_recorded(
    work: Any, cause: str, code: int, text: str, tmp_path: Path
) -> None:
    """Also for errors of CUDA and NCCL, which the other ranks see as a lost connection only."""
    ending, ends = run(work, tmp_path / "run", breaks=1)
    assert ending == Ending(OK, "")
    assert [end.cause for end in ends] == [cause, "finished"]
    broken = ends[0]
    assert (broken.rank, broken.size, broken.code, broken.host) == (1, 2, code, os.uname().nodename)
    assert text in broken.text
    assert work is killed_work or broken.step == 7
    if work in (cuda_error_work, nccl_error_work):  # the recorders of both ranks
        traces = [RunFolder(tmp_path / "run").hang / f"gloo-trace-rank-{number}" for number in range(2)]
        for entries in (pickle.loads(path.read_bytes())["entries"] for path in traces):
            assert any("gloo" in entry["profiling_name"] for entry in entries)


@pytest.mark.slow
def test_the_ending_after_the_last_restart_ends_with_the_code_of_its_cause(tmp_path: Path) -> None:
    assert run(nccl_error_work, tmp_path / "network", breaks=2, max_failures=1)[0].code == NETWORK
    assert run(out_of_memory_work, tmp_path / "memory", breaks=1, max_failures=0)[0].code == MEMORY


def test_the_same_crash_twice_is_not_started_a_third_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """max_failures is 3: three more starts would end at the same line of code, an hour later each."""
    ending, ends = run(fault_work, tmp_path / "run", breaks=9)
    assert [end.cause for end in ends] == ["code", "code"]
    assert ending.code == UNEXPECTED
    assert "rank 1 has failed twice in the same way before any checkpoint, and is not started a third time" in ending.message
    for way_out in ("error-rank-1.log", "--debug", "clae replay", "KeyError: 'a fault of the program'"):
        assert way_out in ending.message
    assert capfd.readouterr().err.count("Starting again") == 1
    # By hand, it is started once.
    assert len(run(fault_work, tmp_path / "run", breaks=9)[1]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("work", [other_fault_work, fault_after_progress_work, nccl_error_work])
def test_another_crash_or_one_after_progress_is_started_again(work: Any, tmp_path: Path) -> None:
    ending, ends = run(work, tmp_path / "run", breaks=2)
    assert ending == Ending(OK, "")
    assert len(ends) == 3


def data_gone(*arguments: Any) -> Ending:
    def train(recipe: Recipe, world: World, stream: Any, attempt: Any) -> LoopResult:
        attempt.start = world.broadcast(attempt.start)
        attempt.holds_lease = True
        raise DataError("shard 3 is gone")

    rank.train = train
    return local._train(*arguments)


def test_an_error_of_all_ranks_is_one_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ending, ends = run(data_gone, tmp_path / "run", breaks=0)
    assert ending.message == "shard 3 is gone"
    (line,) = RunFolder(tmp_path / "run").ends_file.read_text().splitlines()
    assert json.loads(line)["cause"] == ends[0].cause == "data"


def memory_group() -> Path | None:
    """A new control group for memory, where this machine lets us make one."""
    for base, limit in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = base / f"clae-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(1536 << 20))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        return group
    return None


def remove_group(group: Path) -> None:
    """A process that has ended leaves its group a little after its environment is gone, by which the others know it."""
    deadline = time.monotonic() + processes.GONE_WITHIN_S
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def eats_memory(folder: Path) -> None:
    eaten = [b"x" * (64 << 20)]
    while True:
        eaten.append(eaten[0] + b"y")


def eats_memory_work(*arguments: Any) -> Ending:
    return planted(eats_memory, *arguments)


def _in_group(group: Path, folder: Path) -> None:
    """A process of its own: it joins the group for good."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    ending, ends = run(eats_memory_work, folder, breaks=9)
    (folder / "said.json").write_text(json.dumps([ending.code, ending.message, [end.cause for end in ends]]))


CHILD = """
import sys
import time
from pathlib import Path
from tests.launchers.test_ends import _in_group
if __name__ == "__main__":
    _in_group(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_the_kernel_kills_a_rank_without_memory_and_two_of_that_are_enough(tmp_path: Path) -> None:
    """Real memory, in a control group of 1.5 GiB; a third start would be killed, too."""
    group, mark = memory_group(), processes.new_mark()
    if group is None:
        pytest.skip("no control group for memory can be made here (root and a writable /sys/fs/cgroup are needed)")
    try:
        words = [str(group), str(tmp_path / "run")]
        done = processes.run(sys.executable, "-c", CHILD, *words, env=processes.environment(**mark))
        assert done.returncode == 0, done.stderr
        code, message, causes = json.loads((tmp_path / "run" / "said.json").read_text())
        assert (code, causes) == (MEMORY, ["memory", "memory"])
        assert "the kernel ended it because memory was used up" in message
        assert "is not started a third time" in message
    finally:
        processes.wait_until_gone(mark)
        remove_group(group)


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/memory.events": "low 0\noom 4\noom_kill 3\n"}, 3),
        ({"proc/self/cgroup": "0::/a\n", "cgroup/memory.events": "oom_kill 5\n", "proc/vmstat": "oom_kill 9\n"}, 5),
        ({"proc/self/cgroup": "4:memory:/a\n0::/\n", "cgroup/memory/a/memory.oom_control": "under_oom 0\noom_kill 2\n"}, 2),
        ({"proc/self/cgroup": "1:cpu:/\n", "proc/vmstat": "nr_free 1\noom_kill 7\n"}, 7),
        ({"proc/vmstat": "nr_free 1\n"}, 0),
        ({}, 0),
    ],
)
def test_the_kernel_counts_what_it_kills(files: dict[str, str], count: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert num_killed(tmp_path / "proc", tmp_path / "cgroup") == count


@pytest.mark.slow
def test_torchrun_sh_ends_for_good_after_the_same_crash_twice(recipe: Path, tmp_path: Path) -> None:
    """torchrun itself would start the ranks five more times. (A start may fail in between by itself, on a busy machine.)"""
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    env = processes.environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{processes.ROOT}", CLAE_ENV=sys.prefix)
    line = [processes.ROOT / "launch" / "torchrun.sh", "--nodes", "1", "--ranks-per-node", "2", "--max-restarts", "6"]
    done = processes.run(*line, recipe, f"run_dir={tmp_path}/run", env=env, timeout=560)
    said = done.stdout + done.stderr
    assert done.returncode == FAILED, said
    assert said.count("rank 1 has failed twice in the same way before any checkpoint, and is not started a third time") == 1
    assert [(end.cause, end.rank) for end in read_ends(tmp_path / "run")][-2:] == [("code", 1), ("code", 1)]


CRASH = """
import os, sys
if os.environ.get("RANK") == "1":
    import importlib.abc
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "clae_dist.launchers.torchrun":
                import clae_dist.training.train as training
                def pretrain_step(*arguments): raise KeyError("a fault of the program")
                training.pretrain_step = pretrain_step
            return None
    sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_every_way_to_end_a_run_leaves_one_end(recipe: Path, tmp_path: Path) -> None:
    """Asked to stop by a scheduler, killed with its launcher, resumed to the finish."""
    arguments, causes = command(recipe, tmp_path / "run", "local"), []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        with started(*arguments) as process:
            read_until(process, "step ")
            read_until(process, "step ")
            process.send_signal(number)
            finish(process)
        causes.append([end.cause for end in read_ends(tmp_path / "run")])
    with started(*arguments) as process:
        assert finish(process)[0] == OK
    assert causes == [["preemption"], ["preemption", "stopped"], ["preemption", "stopped"]]  # a killed launcher says nothing
    assert [end.cause for end in read_ends(tmp_path / "run")] == ["preemption", "stopped", "host", "finished"]
