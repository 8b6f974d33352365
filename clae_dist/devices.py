"""The device of each rank: one GPU for every rank, or the CPU for all of them, decided by all ranks before they communicate.

A rank sees the GPUs of its host (`CUDA_VISIBLE_DEVICES`), or only its own where a launcher gives every rank one. Without the
exchange, a rank that sees too few would take the CPU while the others wait for it in NCCL.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from clae_dist.errors import ConfigError

Request = Literal["auto", "cpu", "cuda"]  # launch.device
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True)
class Sight:
    """A rank's place on its host, what it was asked to compute on, and the GPUs that it sees."""

    host: str
    local_rank: int
    local_size: int
    request: Request
    gpus: int
    uuid: str = ""  # of the GPU that it would take; "" where that is unknown
    problem: str = ""  # why CUDA does not start, in one line

    @property
    def gpu(self) -> int | None:
        """The index of the GPU that this rank takes among those that it sees: the only one, or that of its local rank."""
        if self.gpus >= self.local_size:
            return self.local_rank
        return 0 if self.gpus == 1 else None


def local_device(request: Request = "auto") -> torch.device:
    """The device of a process that works alone, always with an index on a GPU. Raises ConfigError for "cuda" without a GPU."""
    if request == "cpu" or (request == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"launch.device is 'cuda', but torch sees no GPU on {platform.node()}; {_CPU}.")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Context in which a GPU rounds the factors of float32 products and convolutions to TF32 (11 bits), or does not (24 bits).

    torch's own default is to round in convolutions and not in products.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, was_allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = was_allowed


@contextmanager
def kernels(*, deterministic: bool) -> Iterator[None]:
    """Context in which torch takes deterministic kernels, or else the fastest ones that cuDNN finds."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.deterministic
    was_set = _WORKSPACE in os.environ
    if deterministic:
        os.environ.setdefault(_WORKSPACE, ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(deterministic)
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.benchmark, cudnn.deterministic = before[1:]
        if not was_set:
            os.environ.pop(_WORKSPACE, None)


def look(request: Request, local_rank: int, local_size: int) -> Sight:
    """The devices that this rank sees."""
    gpus = 0 if request == "cpu" else torch.cuda.device_count()
    sight = Sight(platform.node(), local_rank, local_size, request, gpus)
    if sight.gpu is None:
        return sight
    try:
        uuid = str(getattr(torch.cuda.get_device_properties(sight.gpu), "uuid", ""))
    except (RuntimeError, AssertionError) as error:
        return Sight(**{**asdict(sight), "problem": (str(error).splitlines() or [type(error).__name__])[0]})
    return Sight(**{**asdict(sight), "uuid": uuid if uuid.strip("0-") else ""})


def choose(sights: Sequence[Sight], rank: int) -> torch.device:
    """The device of `rank`, given what every rank sees, in the order of ranks. Raises the same ConfigError on all of them."""
    requests = {sight.request for sight in sights}
    if len(requests) > 1:
        each = ", ".join(f"{request} on {_ranks(_where(sights, request=request))}" for request in sorted(requests))
        raise ConfigError(f"launch.device differs between the ranks: {each}; give all of them the same.")
    if requests == {"cpu"} or (requests == {"auto"} and not any(sight.gpus for sight in sights)):
        return torch.device("cpu")
    problems = list(filter(None, [_without_gpu(sights), _does_not_start(sights), _shared(sights)]))
    if problems:
        raise ConfigError(f"{'; '.join(problems)}. Start one rank a GPU (launch.workers, --gpus-per-node), or {_CPU}.")
    return torch.device("cuda", sights[rank].gpu or 0)


_CPU = "ask for the CPU with launch.device=cpu (or an empty CUDA_VISIBLE_DEVICES on every host)"


def _without_gpu(sights: Sequence[Sight]) -> str:
    """Hosts with fewer visible GPUs than ranks: "host b has 3 visible GPUs for ranks 4 to 7"."""
    hosts = dict.fromkeys(sight.host for sight in sights if sight.gpu is None)
    told = []
    for host in hosts:
        ranks = _where(sights, host=host)
        seen = sorted({sights[rank].gpus for rank in ranks})
        gpus = " or ".join(map(str, seen))
        told.append(f"host {host} has {gpus} visible GPU{'' if seen == [1] else 's'} for {_ranks(ranks)}")
    return "; ".join(told)


def _does_not_start(sights: Sequence[Sight]) -> str:
    broken = [(rank, sight) for rank, sight in enumerate(sights) if sight.problem]
    return "; ".join(f"CUDA does not start on host {sight.host} (rank {rank}): {sight.problem}" for rank, sight in broken)


def _shared(sights: Sequence[Sight]) -> str:
    """GPUs that several ranks would take: each sees one GPU, and not one of its own."""
    by_gpu: dict[str, list[int]] = {}
    for rank, sight in enumerate(sights):
        if sight.uuid:
            by_gpu.setdefault(sight.uuid, []).append(rank)
    shared = [ranks for ranks in by_gpu.values() if len(ranks) > 1]
    return "; ".join(f"host {sights[ranks[0]].host} has 1 visible GPU for {_ranks(ranks)}" for ranks in shared)


def _where(sights: Sequence[Sight], **fields: Any) -> list[int]:
    return [rank for rank, sight in enumerate(sights) if all(getattr(sight, key) == value for key, value in fields.items())]


def _ranks(ranks: Sequence[int]) -> str:
    """As "rank 3", "ranks 0, 2" or "ranks 4 to 7"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def agree(sight: Sight, rank: int, size: int) -> torch.device:
    """The device of this rank, after an exchange over the CPU in the default process group. Collective.

    Not through a store: torchrun's store outlives a start of the ranks, and its hosts count their starts differently.
    Raises ConfigError on all ranks alike.
    """
    sights: list[Any] = [None] * size
    dist.all_gather_object(sights, sight)
    return choose(sights, rank)
