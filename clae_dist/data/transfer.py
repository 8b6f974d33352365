"""Transfer of batches to the device, beside what the device computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from clae_dist.data.loader import LoadedBatch

Timed = Callable[[str], AbstractContextManager[None]]


def transferred(batches: Iterator[LoadedBatch], device: torch.device, timed: Timed) -> Iterator[LoadedBatch]:
    """The batches of a loader, each on its way to a GPU when it is taken: take it while the step before still runs there.

    The loader's batches are in pinned memory, so that the host does not wait. On the CPU they come as they are.
    `timed` is a clock's: what the device waits for a copy is counted as "copy".
    """
    return map(SideStream(device, timed).bring, batches) if device.type == "cuda" else batches


class SideStream:
    """A CUDA stream of its own for copies. Draws, ids and labels stay where the host reads them."""

    def __init__(self, device: torch.device, timed: Timed) -> None:
        self._device, self._stream, self._timed = device, torch.cuda.Stream(device), timed

    def bring(self, batch: LoadedBatch) -> LoadedBatch:
        """Start to copy; what the device is given from now on waits for the copy, what it was given before does not."""
        with torch.cuda.stream(self._stream):
            there = [
                None if tensor is None else tensor.to(self._device, non_blocking=True) for tensor in (batch.views, batch.local)
            ]
        working = torch.cuda.current_stream(self._device)
        with self._timed("copy"):
            working.wait_stream(self._stream)
        for tensor in there:
            if tensor is not None:
                tensor.record_stream(working)  # its memory is of the side stream, which must not take it back before
        views, local = there
        assert views is not None
        return batch._replace(views=views, local=local)
