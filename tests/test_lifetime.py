"""Whatever a process of ours has started ends with it: kill -9 of the parent while a child is busy or stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

POOL = """
from data_prep.pool import run_tasks

def work(task, report):
    print("started", flush=True)
    import threading
    threading.Event().wait()

if __name__ == "__main__":
    for result in run_tasks(work, [1, 2], 2, lambda count: None):
        pass
"""
PIPE = """
from clae_dist.data.byte_streams import open_stream
stream = open_stream("pipe:echo started; sleep 1000 | sleep 1001", 0, "", 600)
print(stream.read().decode(), end="", flush=True)
stream.read()
"""
COMMAND = """
import os, subprocess, sys
command = [sys.executable, "-c", "print('started', flush=True); import time; time.sleep(1000)"]
subprocess.run([sys.executable, "-m", "clae_dist.lifetime", str(os.getpid()), *command])
"""

INTERRUPTED = """
import runpy, sys
sys.argv = ["program", *{arguments}]
from {module} import {function}
def interrupt(*arguments): exec("raise KeyboardInterrupt")
sys.modules["{module}"].{function} = interrupt
runpy.run_module("{program}", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("program", "module", "function", "arguments"),
    [
        ("clae_dist", "clae_dist.commands.runs", "run", ["runs", "."]),
        ("data_prep", "data_prep.verify", "verify", ["verify", "."]),
    ],
)
def test_ctrl_c_in_an_exec_ends_with_its_own_code(program: str, module: str, function: str, arguments: list[str]) -> None:
    """Where a module was being imported that makes a dataclass, the process ended by SIGINT after it had handled it."""
    script = INTERRUPTED.format(program=program, module=module, function=function, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr


@pytest.mark.parametrize(
    ("script", "started"),
    [
        pytest.param(POOL, 2, id="data_prep's workers"),
        pytest.param(PIPE, 1, id="a pipe's command"),
        pytest.param(COMMAND, 1, id="a command"),
    ],
)
def test_what_a_process_has_started_ends_with_it(script: str, started: int, tmp_path: Path) -> None:
    (tmp_path / "starts.py").write_text(script)
    mark = processes.new_mark()
    with processes.started(sys.executable, tmp_path / "starts.py", mark=mark) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(started)] == ["started\n"] * started
        children = [other for other in processes.marked(mark) if other.pid != process.pid]
        assert children
        if script is not PIPE:  # a shell that is stopped cannot look; the kernel kills the others
            children[-1].send_signal(signal.SIGSTOP)
        process.kill()
        process.wait()
        processes.wait_until_gone(mark)
