"""Transfer batches to the device while the previous step still runs there."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clae_dist.data.loader import LoadedBatch


class Transfer(Iterator[LoadedBatch]):
    """The batches of a loader, one ahead of the step with a copier; without one (on the CPU), as they come.

    An error of a batch is raised at that batch's turn, not during the step before.
    """

    def __init__(self, batches: Iterator[LoadedBatch], copier: SideStream | None) -> None:
        self._batches, self._copier = batches, copier
        self._ahead: LoadedBatch | Exception | None = None

    @staticmethod
    def to(device: torch.device, batches: Iterator[LoadedBatch]) -> Transfer:
        """For batches in pinned memory where `device` is a GPU."""
        return Transfer(batches, SideStream(device) if device.type == "cuda" else None)

    def __next__(self) -> LoadedBatch:
        if self._copier is None:
            return next(self._batches)
        found = self._take() if self._ahead is None else self._ahead
        self._ahead = None
        if isinstance(found, Exception):
            raise found
        self._copier.hand_over(found)
        return found

    def look_ahead(self) -> None:
        """Start the copy of the next batch. Call it when a step has been queued on the device."""
        if self._copier is not None and self._ahead is None:
            self._ahead = self._take()

    def _take(self) -> LoadedBatch | Exception:
        assert self._copier is not None
        try:
            return self._copier.start(next(self._batches))
        except Exception as error:  # StopIteration, too
            return error


class SideStream:
    """A copier with a CUDA stream of its own. Draws, ids and labels stay where the host reads them."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def start(self, batch: LoadedBatch) -> LoadedBatch:
        with torch.cuda.stream(self._stream):
            views, local = (
                None if tensor is None else tensor.to(self._device, non_blocking=True) for tensor in (batch.views, batch.local)
            )
            assert views is not None
            return batch._replace(views=views, local=local)

    def hand_over(self, batch: LoadedBatch) -> None:
        working = torch.cuda.current_stream(self._device)
        working.wait_stream(self._stream)
        for tensor in (batch.views, batch.local):
            if tensor is not None:
                tensor.record_stream(working)  # its memory is of the side stream, which must not take it back before
