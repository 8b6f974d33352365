"""Stand-ins that run the code paths of a GPU in one process on CPU tensors, so that what they launch can be counted.

Numbers of kernels, collectives and host waits do not depend on the size of the images, so that small ones suffice. Values mean
nothing: the other ranks do not exist, and their rows are this rank's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import adam, optimizer
from torch.utils import _foreach_utils

from clae_dist.bench.measure import replaced
from clae_dist.counts import CountOperations, Counts, tensors_in
from clae_dist.objectives import softmax
from clae_dist.parallel import ddp
from clae_dist.world import World, as_one_of

DEVICE = torch.device("cpu", 0)  # stands for the GPU; without an index, "cpu" is the host
_HOST = "_clae_on_host"  # attribute of tensors that would lie on the host


@contextmanager
def stand_in_ranks(num_ranks: int, device: torch.device = DEVICE) -> Iterator[World]:
    """The world of rank 0 of `num_ranks`, of which the others do not exist. This process must have no process group."""
    with as_one_of(num_ranks, device) as world, replaced(ddp, DistributedDataParallel=_Ddp), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1 x 1 convolutions on a CPU
        yield world


class _Ddp(DistributedDataParallel):
    """torch's, whose own all-reduce expects a result that the stand-in group does not give."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, lambda state, bucket: _all_reduce(bucket))


def _all_reduce(bucket: Any) -> Any:
    rows = bucket.buffer()
    dist.all_reduce(rows)
    future: Any = torch.futures.Future()
    future.set_result(rows)
    return future


@contextmanager
def counting_as_on_gpu() -> Iterator[CountOperations]:
    """Context that counts what a GPU would be asked to do, on CPU tensors that say that they lie on a GPU.

    Numbers that the host sends to the device, and lists that it reads from there, are host waits. What is computed of tensors
    that were made on the host, by torch.tensor or torch.as_tensor, does not count.
    """
    counter = _CountOnCpu("cpu")
    with ExitStack() as stack:
        stack.enter_context(
            replaced(torch.Tensor, is_cuda=property(lambda tensor: True), tolist=_counts_wait(counter, _tolist))
        )
        stack.enter_context(replaced(torch.Tensor, new_tensor=_counts_wait(counter, torch.Tensor.new_tensor)))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(replaced(torch, **{name: _counts_copy(counter, getattr(torch, name))}))
        stack.enter_context(replaced(adam, _get_value=_not_counted(counter, adam._get_value)))  # of a step that is on the host
        for module in (optimizer, _foreach_utils):
            stack.enter_context(replaced(module, _get_foreach_kernels_supported_devices=lambda: ["cpu"]))
        stack.enter_context(replaced(softmax, _CHUNK_BYTES={"cpu": softmax._CHUNK_BYTES["cuda"]}))
        with counter:
            yield counter


def count_as_on_gpu(action: Callable[[], object]) -> Counts:
    """Run `action` and return what a GPU would have been asked to do."""
    with counting_as_on_gpu() as counter:
        action()
        return counter.counts()


_tolist = torch.Tensor.tolist


def _counts_wait(counter: CountOperations, function: Callable[..., Any]) -> Callable[..., Any]:
    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(tensor, _HOST):
            counter.add_wait()
        return function(tensor, *args, **kwargs)

    return counting


def _not_counted(counter: CountOperations, function: Callable[..., Any]) -> Callable[..., Any]:
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with counter.paused():
            return function(*args, **kwargs)

    return quiet


def _counts_copy(counter: CountOperations, function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.tensor and torch.as_tensor: numbers are copied to a device, and the host waits for that; or they stay."""

    def counting(data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, torch.Tensor):
            return function(data, *args, **kwargs)
        sent = torch.device(kwargs.get("device") or "cpu") == DEVICE
        if sent:
            counter.add_wait()
        with counter.paused():
            result = function(data, *args, **kwargs)
        if not sent:
            setattr(result, _HOST, True)
        return result

    return counting


class _CountOnCpu(CountOperations):
    """Operations on tensors of the host are not counted; operators that exist on GPUs only return the right shapes."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tensors_in((args, kwargs))
        if not inputs or not all(hasattr(tensor, _HOST) for tensor in inputs):
            return super().__torch_dispatch__(operation, types, args, kwargs)
        with self.paused():
            result = super().__torch_dispatch__(operation, types, args, kwargs)
        for tensor in tensors_in(result):
            setattr(tensor, _HOST, True)
        return result

    def _call(self, operation: Any, name: str, args: Any, kwargs: Any) -> Any:
        stand_in = _CUDA_ONLY.get(name)
        return operation(*args, **kwargs) if stand_in is None else stand_in(*args, **kwargs)


def _two_a_channel(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return x.new_zeros(x.shape[1], dtype=torch.float32), x.new_ones(x.shape[1], dtype=torch.float32)


def _four_a_channel(grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(grad.new_zeros(grad.shape[1], dtype=torch.float32) for _ in range(4))


_CUDA_ONLY: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": _two_a_channel,
    "batch_norm_elemt": lambda x, *_: x.clone(),
    "batch_norm_backward_reduce": _four_a_channel,
    "batch_norm_backward_elemt": lambda grad, *_: grad.clone(),
}
