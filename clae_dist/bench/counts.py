"""Count what an action launches on a device: kernels, the bytes they move, and the times that the host waits for them.

Counts are of torch's dispatcher. So they need no GPU: on the meta device, they take milliseconds at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WITHOUT_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}
_WITHOUT_KERNEL |= {"lift_fresh", "detach", "set_", "resize_", "record_stream", "is_pinned", "_pin_memory"}
_WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
_COPIES = {"_to_copy", "copy_"}
_GATHERING = {"index", "gather", "index_select", "embedding"}  # they read as much as they return
_SCATTERING = {"index_copy_"}  # they read an index and rows, and write these rows


@dataclass(frozen=True)
class Counts:
    """Kernels, bytes read and written by them, and host waits. A copy between devices is no kernel; its bytes do not count."""

    kernels: int = 0
    bytes: int = 0
    waits: int = 0


def counted(action: Callable[[], object], device: str = "cpu") -> Counts:
    """Run `action` and count its operations that touch a tensor on a device of this type.

    On the CPU every operation counts, also those that a training step on a GPU runs on the host.
    """
    with _CountOperations(device) as counter:
        action()
    return Counts(counter.kernels, counter.bytes, counter.waits)


class _CountOperations(TorchDispatchMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.kernels = self.bytes = self.waits = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        name = operation._schema.name.split("::")[1]
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if name in _WITHOUT_KERNEL or all(tensor.device.type != self._device for tensor in (*inputs, *outputs)):
            return result
        if name in _COPIES and len({tensor.device.type for tensor in (*inputs, *outputs)}) > 1:
            self.waits += not kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        elif name in _WAITING or (name.startswith("index") and any(t.dtype == torch.bool for t in _tensors(args[1:2]))):
            self.waits += 1
        elif not _is_view(operation):
            self.kernels += 1
            self.bytes += _moved(operation, name, args, kwargs, outputs)
        return result


def _is_view(operation: Any) -> bool:
    """An operation whose result shares the memory of an argument that it does not write."""
    results = operation._schema.returns
    return bool(results) and all(one.alias_info is not None and not one.alias_info.is_write for one in results)


def _moved(operation: Any, name: str, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> int:
    written = sum(map(_num_bytes, outputs))
    if name in _GATHERING:
        indices = _tensors((args[1:], kwargs))
        return written + outputs[0].numel() * args[0].element_size() + sum(map(_num_bytes, indices))
    if name in _SCATTERING:
        return sum(map(_num_bytes, _tensors(args[1:]))) + _num_bytes(args[-1])
    only_written = {argument.name for argument in operation._schema.arguments if argument.is_out}
    read = _tensors((args[1:] if name in ("copy_", "fill_", "zero_") else args, _without(kwargs, only_written)))
    return written + sum(map(_num_bytes, read))


def _without(kwargs: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


def _tensors(nested: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


def _num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements that are stored: an expanded dimension is read once."""
    lengths: Iterable[int] = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return torch.Size(lengths).numel() * tensor.element_size()
