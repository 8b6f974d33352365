"""Record the work of a step by torch's dispatcher: operations, bytes, collectives, and the storages that are alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import flop_registry

from clae_dist.counts import WITHOUT_KERNEL, InsideOperators, is_view, moved_bytes, tensors_in
from clae_dist.planner.work import NO_PRODUCT, Amount, Bin, Live, Message, Work
from clae_dist.wire import buffer_bytes, carries_data

STATISTICS = "statistics"  # part of the collectives within a batch norm
_CONVOLUTIONS = {"convolution": 1, "convolution_backward": 2}  # index of the weights among the arguments


class Recorder(InsideOperators):
    """Context that records. `part` names the part of the step in which operations count and storages are made."""

    def __init__(self, *, without_data: bool = True, scratch: bool = False) -> None:
        """With fake tensors (`without_data`), numbers that the host reads are made up.

        Args:
            scratch: count the memory in which oneDNN reorders a convolution's weights, on a CPU.
        """
        super().__init__()
        self._without_data, self._scratch = without_data, scratch
        self.work = Work()
        self.part = "forward"
        self._owner_of: dict[int, tuple[str, int, Any]] = {}  # storage -> owner, bytes, weak reference
        self._live: dict[str, float] = {}
        self._peaks: dict[tuple[str, bool], tuple[float, Live]] = {}

    # ---- what is alive ----

    def own(self, owner: str, tensors: Any) -> None:
        """Count the storages of these tensors as `owner`'s, from now on."""
        for tensor in tensors:
            self._register(tensor.untyped_storage(), owner, take_over=True)

    def _register(self, storage: torch.UntypedStorage, owner: str, *, take_over: bool = False) -> None:
        key = storage._cdata
        known = self._owner_of.get(key)
        if known is not None and known[2]() is not None:
            if take_over and known[0] != owner:
                self._move(known[0], owner, known[1])
                self._owner_of[key] = (owner, *known[1:])
            return
        size = storage.nbytes()
        self._owner_of[key] = (owner, size, weakref.ref(storage, lambda _: self._gone(key)))
        self._live[owner] = self._live.get(owner, 0.0) + size
        self._note_peak()

    def _move(self, before: str, after: str, size: int) -> None:
        self._live[before] -= size
        self._live[after] = self._live.get(after, 0.0) + size

    def _gone(self, key: int) -> None:
        owner, size, _ = self._owner_of.pop(key)
        self._live[owner] -= size

    def _note_peak(self, scratch: int = 0) -> None:
        """Keep the moment of each part with the most bytes, with and without gradients, which a backend may shard."""
        total = sum(self._live.values()) + scratch
        for with_gradients, size in ((True, total), (False, total - self._live.get("gradients", 0.0))):
            key = self.part, with_gradients
            if size > self._peaks.get(key, (0.0, None))[0]:
                self._peaks[key] = (
                    size,
                    Live(
                        f"{self.part}{'' if with_gradients else ' but for gradients'}",
                        {**self._live, "scratch": float(scratch)},
                    ),
                )

    def finish(self) -> Work:
        """The work so far."""
        self.work.moments = [live for _, live in self._peaks.values()]
        return self.work

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Context in which operations belong to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    # ---- operations ----

    def _see(self, operation: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "_local_scalar_dense" and self._without_data:  # any number, such as 1 step taken
            return 1.0 if args[0].is_floating_point() else args[0].dtype != torch.bool
        result = operation(*args, **kwargs)
        if operation.namespace in ("c10d", "_c10d_functional"):
            self._add_message(name.replace("_", ""), args)
            return result
        outputs = tensors_in(result)
        for tensor in outputs:
            self._register(tensor.untyped_storage(), self.part)
        if self._scratch and name in _CONVOLUTIONS:
            self._note_peak(_scratch_bytes(name, args))
        if name not in WITHOUT_KERNEL and not is_view(operation):
            self._add_kernel(operation, name, args, kwargs, outputs, result)
        return result

    def _add_kernel(self, operation: Any, name: str, args: Any, kwargs: Any, outputs: list[torch.Tensor], result: Any) -> None:
        num_bytes = moved_bytes(operation, name, args, kwargs, outputs)
        formula = flop_registry.get(operation._overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=result)) if formula is not None else 0.0
        dtype, intensity = NO_PRODUCT, 0
        if flops:
            dtype = str(outputs[0].dtype).removeprefix("torch.")
            intensity = max(0, round(flops / max(1, num_bytes)).bit_length())
        self.work.bins.setdefault(Bin(self.part, dtype, intensity), Amount()).add(flops, num_bytes)

    def _add_message(self, kind: str, args: Any) -> None:
        if not carries_data(kind):
            return
        part = STATISTICS if self._within.startswith("global_batch_norm") else self.part
        groups = [dist.ProcessGroup.unbox(one).size() for one in args if isinstance(one, torch.ScriptObject) and _is_group(one)]
        message = Message(part, kind, buffer_bytes(kind, args), groups[0] if groups else dist.get_world_size())
        self.work.messages[message] = self.work.messages.get(message, 0.0) + 1


def _scratch_bytes(name: str, args: Any) -> int:
    """Memory beside the results: a copy of the weights for the output, and for each gradient of images and weights.

    Seen in torch's allocator with oneDNN 3, for kernels of 1 and 3 pixels, strides 1 and 2, channels last.
    """
    weights: torch.Tensor = args[_CONVOLUTIONS[name]]
    return weights.numel() * weights.element_size() * (1 if name == "convolution" else sum(args[-1][:2]))


def _is_group(boxed: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(boxed._type())
