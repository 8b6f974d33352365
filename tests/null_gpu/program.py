"""`python -m tests.null_gpu.program train CONFIG …`: the program, on the null GPU that tests.null_gpu.build made.

Kernels do nothing there, so values read back from the device mean nothing. Only where that would end the run is something
replaced here: numbers are finite, and flags and objects that ranks exchange go over the CPU. All else is the program itself,
and spawned ranks import this module as well.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from typing import Any

import torch
import torch.distributed as dist

from clae_dist import world
from clae_dist.parallel import deepspeed as deepspeed_backend
from clae_dist.training import train as run

COUNTERS = ("launches", "waits", "all_gathers", "all_reduces", "reduce_scatters", "broadcasts")
MAX_DEVICES = 16

_null = ctypes.CDLL("libnull_gpu.so")
for _name in ("null_gpu_count", "null_gpu_allocations"):
    getattr(_null, _name).restype = ctypes.c_long

_step = run.pretrain_step
_wait = world.Flags.heard
_prepare_deepspeed = deepspeed_backend._prepare
_eigh = torch.linalg.eigh
STEPS: list[dict[str, int]] = []  # what each training step counted


def counts() -> dict[str, int]:
    """What this process has done on the device so far."""
    return {name: int(_null.null_gpu_count(number)) for number, name in enumerate(COUNTERS)}


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    """True everywhere, also on the CPU, where a checkpoint's weights came from the device."""
    finite = torch.ones(tensor.shape, dtype=torch.bool)
    return finite.pin_memory().to(tensor.device, non_blocking=True) if tensor.is_cuda else finite


def _eigenvectors(matrix: torch.Tensor) -> Any:
    """cuSOLVER is a library of its own, which is not replaced: those of an identity, on the matrix's device."""
    values, vectors = _eigh(torch.eye(matrix.shape[-1], dtype=matrix.dtype))
    return torch.return_types.linalg_eigh((values.to(matrix.device), vectors.to(matrix.device)))


def _prepare(here: world.World) -> Any:
    """DeepSpeed skips a step whose gradient norm, read from the device, is not finite."""
    package = _prepare_deepspeed(here)
    zero = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    zero.is_invalid_grad_norm = lambda norm: False
    zero.DeepSpeedZeroOptimizer.has_overflow = lambda optimizer, partition_gradients=True: False
    return package


def _heard(flags: world.Flags) -> list[bool]:
    """Flags that the host knows; one that a kernel should have computed is not raised."""
    heard = _wait(flags)
    return heard if flags.raised.device.type == "cpu" else [False] * len(heard)


def _broadcast(here: world.World, value: Any) -> Any:
    if here.group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=here.group, device=torch.device("cpu"))
    return box[0]


def _counted_step(training: Any, *arguments: Any, **settings: Any) -> Any:
    """A training step; before it, all of the model must lie on this rank's device, and NCCL must know that device."""
    tensors = [*training.encoding.backend.model.parameters(), *training.encoding.backend.model.buffers()]
    elsewhere = {str(tensor.device) for tensor in tensors} - {str(training.world.device)}
    assert not elsewhere, f"the model lies on {elsewhere}, the rank's device is {training.world.device}"
    if dist.is_initialized() and dist.group.WORLD is not None:
        assert dist.group.WORLD.bound_device_id == training.world.device
    before = counts()
    result = _step(training, *arguments, **settings)
    STEPS.append({name: value - before[name] for name, value in counts().items()})
    return result


def devices() -> list[int]:
    """The null GPUs on which this process has allocated memory."""
    return [index for index in range(MAX_DEVICES) if _null.null_gpu_allocations(index)]


torch.backends.cudnn.enabled = False  # a library of its own, which is not replaced
torch.Tensor.isfinite = _finite  # type: ignore[assignment,method-assign]
torch.isfinite = _finite
torch.linalg.eigh = _eigenvectors
deepspeed_backend._prepare = _prepare
world.Flags.heard = _heard  # type: ignore[method-assign]
world.World.broadcast = _broadcast  # type: ignore[method-assign]
run.pretrain_step = _counted_step

if __name__ == "__main__":
    from clae_dist.cli import main

    sys.exit(main())
