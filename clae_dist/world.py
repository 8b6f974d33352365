"""World: who takes part in a run. The only place that starts, uses for control, or ends torch.distributed."""

from __future__ import annotations

import atexit
import datetime
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist

from clae_dist.collectives import all_gather_begun, waiting
from clae_dist.devices import Request, agree, local_device, look
from clae_dist.errors import ConfigError, RankError, restarts


@dataclass(frozen=True)
class Flags:
    """Flags of all ranks that are on their way."""

    raised: torch.Tensor
    work: dist.Work | None

    def heard(self) -> list[bool]:
        """Wait for the other ranks. Each flag, raised if it is raised on any rank."""
        if self.work is not None:
            with waiting():
                self.work.wait()
        return [value > 0 for value in self.raised.tolist()]


@dataclass(frozen=True)
class Shared:
    """A row of numbers of each rank, on their way to all."""

    rows: torch.Tensor
    work: dist.Work | None

    def heard(self) -> torch.Tensor:
        """Wait for the other ranks. (W, N), on the CPU."""
        if self.work is not None:
            with waiting():
                self.work.wait()
        return self.rows


@dataclass(frozen=True)
class World:
    """`size` ranks, of which this is `rank`; `group` is None in a single process, where nothing is communicated."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        assert self.device.type != "cuda" or self.device.index is not None, "torch.cuda.set_device needs a device with an index"

    @staticmethod
    def single(device: str | torch.device | None = None) -> World:
        """A world of this process alone, on `device` or on local_device()."""
        return World(0, 1, 0, 1, local_device() if device is None else torch.device(device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def collectives(self) -> str:
        """The library of the collectives on tensors: "nccl", "gloo", or "none" in a single process."""
        return "none" if self.group is None else "nccl" if self.device.type == "cuda" else "gloo"

    def subgroup(self, global_ranks: list[int]) -> dist.ProcessGroup:
        """A new group of some ranks (as the default group numbers them), this one among them.

        Every rank calls it at the same time with the ranks of its own group: NCCL splits the default group for all of them.
        """
        group = dist.new_group(global_ranks, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup), f"rank {self.rank} is not one of {global_ranks}"
        return group

    def norm_group(self, which: str) -> dist.ProcessGroup | None:
        """The ranks that share batch statistics with this one, by model.norm_group; None in a single process. Collective.

        Raises ConfigError on every rank if they cannot be divided so.
        """
        if self.group is None or which == "all":
            return self.group
        if which == "node":
            hosts = self.gather_objects(platform.node())
            return self.subgroup([rank for rank, host in enumerate(hosts) if host == hosts[self.rank]])
        size = int(which)
        if self.size % size:
            raise ConfigError(f"model.norm_group is {which}, which does not divide the {self.size} ranks; use node or all.")
        first = self.rank // size * size
        return self.subgroup(list(range(first, first + size)))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (anything that pickles), on every rank."""
        if self.group is None:
            return value
        box = [value]
        with waiting():
            dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The `value` of every rank, on every rank, in the order of ranks."""
        if self.group is None:
            return [value]
        box: list[Any] = [None] * self.size
        with waiting():
            dist.all_gather_object(box, value, group=self.group)
        return box

    def gather_on_main(self, value: Any) -> list[Any]:
        """The `value` of every rank in the order of ranks on rank 0, [] elsewhere."""
        if self.group is None:
            return [value]
        box: list[Any] = [None] * self.size if self.is_main else []
        dist.gather_object(value, box if self.is_main else None, group_dst=0, group=self.group)
        return box

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over the ranks (no gradient)."""
        if self.group is None:
            return values
        total = values.detach().clone()
        with waiting():
            dist.all_reduce(total, group=self.group)
        return total / self.size

    def add_up(self, values: torch.Tensor) -> None:
        """Makes a tensor, in place, the sum of every rank's."""
        if self.group is not None:
            with waiting():
                dist.all_reduce(values, group=self.group)

    def send_from(self, rank: int, values: torch.Tensor) -> None:
        """Makes a contiguous tensor, in place, that of `rank`. Collective."""
        if self.group is not None:
            dist.broadcast(values, group_src=rank, group=self.group)

    def largest(self, value: float) -> float:
        """The largest `value` of any rank, on every rank."""
        if self.group is None:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        with waiting():
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.group)
            return float(box)

    def own_store(self, timeout_s: float) -> dist.Store | None:
        """A connection of its own to the store of the process group, for another thread; None in a single process."""
        if self.group is None:
            return None
        store: dist.Store = self.group.get_group_store().clone()
        store.set_timeout(datetime.timedelta(seconds=timeout_s))
        return store

    def take(self, count: int) -> Iterator[int]:
        """0, 1, … `count` - 1, each on one rank only: the first that asks for it. A collective to start; then none waits."""
        if self.group is None:
            yield from range(count)
            return
        key, store = f"take/{self.broadcast(uuid4().hex)}", self.group.get_group_store()
        while (turn := store.add(key, 1) - 1) < count:
            yield turn

    def flags_anywhere(self, *flags: bool | torch.Tensor) -> list[bool]:
        """Each flag, raised if it is raised on any rank. One small all-reduce for all of them, and one wait."""
        return self.announce(*flags).heard()

    def announce(self, *flags: bool | torch.Tensor) -> Flags:
        """Begin what `flags_anywhere` does. Flags that this host knows travel over the CPU, beside the device's work."""
        device = self.device if any(isinstance(flag, torch.Tensor) for flag in flags) else torch.device("cpu")
        raised = torch.stack([torch.as_tensor(flag, device=device).float() for flag in flags])
        if self.group is None:
            return Flags(raised, None)
        return Flags(raised, dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.group, async_op=True))

    def share(self, values: torch.Tensor) -> Shared:
        """Begin to give a row of numbers to all ranks, over the CPU and beside the device's work. Collective."""
        own = values.detach().cpu().contiguous()
        if self.group is None:
            return Shared(own[None], None)
        everyone = own.new_empty(self.size * len(own))
        return Shared(everyone.view(self.size, -1), all_gather_begun(everyone, own, self.group))

    def agree(self, ok: bool | torch.Tensor, message: str) -> None:
        """Raises RankError on every rank, naming the ranks, unless `ok` holds on all of them."""
        if self.flags_anywhere(torch.logical_not(torch.as_tensor(ok)))[0]:
            failed = [rank for rank, fine in enumerate(self.gather_objects(bool(ok))) if not fine]
            raise RankError(f"{message} (on rank {', '.join(map(str, failed))} of {self.size})")

    def raise_together(self, kind: type[Exception], problem: str) -> None:
        """Raises kind(problem) on every rank, with the problem of the first rank that has one; "" is none. A collective."""
        problems = [text for text in self.gather_objects(problem) if text]
        if problems:
            raise kind(problems[0])

    def run_on_main(self, action: Any) -> Any:
        """`action()` on rank 0, its result everywhere; what it raises is raised on every rank, so that none waits."""
        result: Any = None
        failure: BaseException | None = None
        if self.is_main:
            try:
                result = action()
            except Exception as error:
                failure = error
        result, failure = self.broadcast((result, failure))
        if failure is not None:
            raise failure
        return result


def state_home() -> Path:
    """This user's folder for what is remembered between commands: clae-dist in XDG_STATE_HOME, or in ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "clae-dist"


@contextmanager
def connect(timeout_s: float = 600.0, device: Request = "auto", *, group_of_one: bool = False) -> Iterator[World]:
    """The World that a launcher describes in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

    Joins the process group that the launcher already started (Ray), or starts one and ends it (torchrun, local).
    Without WORLD_SIZE it is a world of this process alone, as it is with WORLD_SIZE 1: without a process group unless
    `group_of_one` asks for one, for code that calls torch.distributed itself.
    NCCL carries GPU tensors, gloo the CPU's. `device` is launch.device.
    Raises ConfigError on all ranks alike where they cannot have a GPU each (devices.py).
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and not dist.is_initialized():
        if group_of_one:
            _start_group("gloo", dist.HashStore(), 0, 1, timeout_s)
        try:
            yield World.single(local_device(device))
        finally:
            if group_of_one:
                dist.destroy_process_group()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    started_here = not dist.is_initialized()
    if started_here:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout_s)))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the addresses of ranks of earlier starts are left there
            store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        _start_group("gloo", store, rank, size, timeout_s)  # which serves as it is where all take the CPU
    elif (
        "nccl" not in dist.get_backend_config()
    ):  # a launcher's group that carries only the CPU's tensors: the CPU is requested
        device = "cpu"
    try:
        chosen = agree(look(device, local_rank, local_size), rank, size)
    except BaseException:
        if started_here:
            dist.destroy_process_group()
        raise
    use_gpu = chosen.type == "cuda"
    if use_gpu:
        torch.cuda.set_device(chosen)
    if use_gpu and started_here:
        dist.destroy_process_group()
        _start_group("cpu:gloo,cuda:nccl", store, rank, size, timeout_s, chosen)
    broken = True
    try:
        yield World(rank, size, local_rank, local_size, chosen, dist.group.WORLD)
        broken = False
    finally:
        # A rank that broke alone leaves NCCL's group as it is: to end it would wait for the others, who wait for this rank.
        if started_here and not (broken and use_gpu):
            dist.destroy_process_group()


@contextmanager
def as_one_of(num_ranks: int, device: torch.device) -> Iterator[World]:
    """The world of rank 0 of `num_ranks`, the others of which do not exist: collectives change nothing. To count them.

    This process must have no process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield World(0, num_ranks, 0, num_ranks, device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _start_group(
    backend: str, store: dist.Store, rank: int, size: int, timeout_s: float, gpu: torch.device | None = None
) -> None:
    """Start the default process group; its keys in the store are its own, so that another group can follow.

    With a `gpu`, NCCL connects at once and not in the first step: what is wrong with the network fails here, and subgroups
    are split off this group.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    keys = dist.PrefixStore(backend, store)
    dist.init_process_group(backend, store=keys, rank=rank, world_size=size, timeout=timeout, device_id=gpu)


def told(code: int) -> int:
    """The exit code of a rank. If launch/torchrun.sh requests it (CLAE_ENDING), a code that is no reason for a restart
    (errors.py) is written to that file and the rank exits with 0: torchrun restarts ranks whatever their code. Success
    replaces the code of an earlier start: torchrun stops all ranks when a host joins, and they report 75."""
    path = os.environ.get("CLAE_ENDING", "")
    if not path or restarts(code):
        return code
    try:
        Path(path).write_text(f"{code}\n")
    except OSError:  # no room: torchrun starts the ranks again, and they end alike
        return code
    return 0


def leave(code: int) -> NoReturn:
    """Ends this process, a rank that is done, with `code`: what was registered for its end runs, output is written out.

    The interpreter is not taken down. gloo's threads outlive their group and may be the last to hold a tensor; one that drops
    it while Python ends aborts the process (pytorch/pytorch#179291), and a rank that had finished would look killed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def abandon(code: int) -> NoReturn:
    """Ends this process at once with `code`: it hangs, and what is registered for its end might hang as well."""
    os._exit(told(code))
