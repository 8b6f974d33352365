"""A pool of gloo processes that lives for the whole test session; each test hands it a function.

`run(4, function, *arguments)` calls function(world, *arguments) on four ranks and returns their results in the order of ranks.
Ranks are forked from one process that has imported torch: the pool is there in the time of one import, and again after a
failure. A function that leaves a value of a module of clae_dist changed fails: every later test would run with it.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from clae_dist.lifetime import end_with_parent
from clae_dist.world import World

MAX_RANKS = 4
_TIMEOUT_S = 300.0


class RankPool:
    """Processes with a process group for each world size from 1 to their number."""

    def __init__(self, num_ranks: int = MAX_RANKS, imports: tuple[str, ...] = ()) -> None:
        self._num_ranks = num_ranks
        self._imports = ("torchvision", "timm", *imports)  # once, before ranks are forked
        self._ranks: list[Any] = []  # a pipe each
        self._num_calls = 0

    def _start(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(self._num_ranks)]
        theirs = [pair[1] for pair in pairs]
        self._server = context.Process(
            target=_fork_ranks, args=(theirs, self._store.port, sys.path, self._imports), daemon=True
        )
        self._server.start()
        for pipe in theirs:
            pipe.close()
        self._ranks = [pair[0] for pair in pairs]

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of function(world, *arguments), one a rank. Raises AssertionError with the ranks' tracebacks."""
        if not self._ranks:
            self._start()
        chosen = self._ranks[:world_size]
        self._num_calls += 1
        for pipe in chosen:
            pipe.send_bytes(pickle.dumps((self._num_calls, world_size, function, arguments)))
        results, failures = [], []
        for rank, pipe in enumerate(chosen):
            if not pipe.poll(_TIMEOUT_S):
                failures.append(f"rank {rank} gave no answer in {_TIMEOUT_S:.0f} s")
                break
            ok, value = pickle.loads(pipe.recv_bytes())
            (results if ok else failures).append(value)
        if failures:
            self.close()  # what is left of the group cannot be trusted; the next test starts anew
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        if self._ranks:
            self._server.kill()  # the ranks end with it
            self._server.join()
        for pipe in self._ranks:
            pipe.close()
        self._ranks = []


def _fork_ranks(pipes: list[Any], port: int, path: list[str], imports: tuple[str, ...]) -> None:
    sys.path[:] = path
    for name in ("clae_dist.launchers.preload", *imports):
        importlib.import_module(name)
    server = os.getpid()
    end_with_parent(os.getppid())
    torch.set_num_threads(1)
    for rank in range(len(pipes)):
        if os.fork() == 0:
            end_with_parent(server)
            for other in pipes[:rank] + pipes[rank + 1 :]:
                other.close()
            _serve(rank, len(pipes), port, pipes[rank])
            os._exit(0)
    for pipe in pipes:
        pipe.close()
    for _ in pipes:
        os.wait()


def _serve(rank: int, num_ranks: int, port: int, pipe: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=240))
    groups = {size: dist.new_group(range(size)) for size in range(1, num_ranks + 1)}
    while True:
        try:
            call, size, function, arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        # The name of a new group holds the number of those before it, which calls on fewer ranks would leave different.
        distributed_c10d._world.group_count = 1000 * call
        faulthandler.dump_traceback_later(_TIMEOUT_S - 10)  # where it hangs
        world = World(rank, size, rank, size, torch.device("cpu"), groups[size] if size > 1 else None)
        try:
            before = _module_values()
            answer: tuple[bool, Any] = (True, function(world, *arguments))
            after = _module_values()
            changed = sorted(name for name, value in before.items() if after.get(name) is not value)
            assert not changed, f"the function leaves {', '.join(changed)} changed (clae_dist.bench.measure.replaced undoes it)"
        except BaseException:
            answer = (False, f"rank {rank}: {traceback.format_exc()}")
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(pickle.dumps(answer))


def _module_values() -> dict[str, Any]:
    """The constants, functions and classes of the package's modules, and the functions of these classes."""
    values: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("clae_dist"):
            for name, value in list(vars(module).items()):
                if name.isupper() or callable(value):
                    values[f"{module_name}.{name}"] = value
                if isinstance(value, type) and value.__module__ == module_name:
                    for key, member in list(vars(value).items()):
                        if callable(member):
                            values[f"{module_name}.{name}.{key}"] = member
    return values
