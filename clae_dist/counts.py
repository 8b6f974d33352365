"""Count what an action launches on a device: kernels, the bytes they move, host waits and collectives.

Counts are of torch's dispatcher. So they need no GPU: on the meta device, they take milliseconds at any size. An operation
counts as one kernel also if it launches several (a foreach operation over many tensors, the backward of a convolution).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WITHOUT_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}
WITHOUT_KERNEL |= {"lift_fresh", "detach", "set_", "resize_", "record_stream", "is_pinned", "_pin_memory"}
_WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
_COPIES = {"_to_copy", "copy_"}
_GATHERING = {"index", "gather", "index_select", "embedding"}  # they read as much as they return
_SCATTERING = {"index_copy_"}  # they read an index and rows, and write these rows


@dataclass(frozen=True)
class Collective:
    """One collective: torch's name without underscores, and the operator of this package that it is part of, or ""."""

    name: str
    within: str = ""


@dataclass(frozen=True)
class Counts:
    """Kernels, bytes read and written by them, and host waits. A copy between devices is no kernel; its bytes do not count."""

    kernels: int = 0
    bytes: int = 0
    waits: int = 0
    collectives: tuple[Collective, ...] = ()
    operations: tuple[str, ...] = field(default=(), compare=False, repr=False)  # names of the kernels, in order

    def collectives_named(self, name: str, within: str | None = None) -> int:
        """The number of these collectives, or of those that are part of operators whose names begin with `within`."""
        inside = [one for one in self.collectives if within is None or one.within.startswith(within)]
        return sum(one.name.startswith(name) for one in inside)


def counted(action: Callable[[], object], device: str = "cpu") -> Counts:
    """Run `action` and count its operations that touch a tensor on a device of this type.

    On the CPU every operation counts, also those that a training step on a GPU runs on the host.
    """
    with CountOperations(device) as counter:
        action()
    return counter.counts()


class InsideOperators(TorchDispatchMode):
    """A dispatch mode that sees what this package's operators in Python consist of, instead of them; `_within` names one."""

    def __init__(self) -> None:
        super().__init__()
        self._within = ""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        qualified = operation._schema.name
        name, kwargs = qualified.split("::")[1], kwargs or {}
        if qualified not in OPDEFS:
            return self._see(operation, name, args, kwargs)
        outside, self._within = self._within, name
        try:
            with self:
                return OPDEFS[qualified]._init_fn(*args, **kwargs)
        finally:
            self._within = outside

    def _see(self, operation: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call the operation and return its result."""
        return operation(*args, **kwargs)


class CountOperations(InsideOperators):
    """Context that counts; `counts()` may be called at any time."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self._kernels = self._bytes = self._waits = 0
        self._collectives: list[Collective] = []
        self._operations: list[str] = []
        self._counting = True

    def counts(self) -> Counts:
        """The counts so far."""
        return Counts(self._kernels, self._bytes, self._waits, tuple(self._collectives), tuple(self._operations))

    def add_wait(self) -> None:
        """Count a host wait that the dispatcher does not see."""
        self._waits += self._counting

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which nothing is counted."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def _see(self, operation: Any, name: str, args: Any, kwargs: Any) -> Any:
        result = self._call(operation, name, args, kwargs)
        if not self._counting:
            return result
        if operation.namespace in ("c10d", "_c10d_functional"):
            self._collectives.append(Collective(name.replace("_", ""), self._within))
            return result
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(result)
        if name in WITHOUT_KERNEL or all(tensor.device.type != self._device for tensor in (*inputs, *outputs)):
            return result
        if name in _COPIES and len({tensor.device.type for tensor in (*inputs, *outputs)}) > 1:
            self._waits += not kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        elif name in _WAITING or (name.startswith("index") and any(t.dtype == torch.bool for t in tensors_in(args[1:2]))):
            self._waits += 1
        elif not is_view(operation):
            self._kernels += 1
            self._bytes += moved_bytes(operation, name, args, kwargs, outputs)
            self._operations.append(name)
        return result

    def _call(self, operation: Any, name: str, args: Any, kwargs: Any) -> Any:
        return operation(*args, **kwargs)


def is_view(operation: Any) -> bool:
    """An operation whose result shares the memory of an argument that it does not write."""
    results = operation._schema.returns
    return bool(results) and all(one.alias_info is not None and not one.alias_info.is_write for one in results)


def moved_bytes(operation: Any, name: str, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> int:
    """Bytes that an operation reads and writes."""
    written = sum(map(_num_bytes, outputs))
    if name in _GATHERING:
        indices = tensors_in((args[1:], kwargs))
        return written + outputs[0].numel() * args[0].element_size() + sum(map(_num_bytes, indices))
    if name in _SCATTERING:
        return sum(map(_num_bytes, tensors_in(args[1:]))) + _num_bytes(args[-1])
    only_written = {argument.name for argument in operation._schema.arguments if argument.is_out}
    read = tensors_in((args[1:] if name in ("copy_", "fill_", "zero_") else args, _without(kwargs, only_written)))
    return written + sum(map(_num_bytes, read))


def _without(kwargs: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


def tensors_in(nested: object) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


def _num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements that are stored: an expanded dimension is read once."""
    lengths: Iterable[int] = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return torch.Size(lengths).numel() * tensor.element_size()
