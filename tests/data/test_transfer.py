"""One batch ahead: in order, whole when it is used, and what goes wrong is heard of when it is that batch's turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from clae_dist.data.loader import LoadedBatch
from clae_dist.data.transfer import SideStream, Transfer
from clae_dist.errors import DataError


def batch(number: int) -> LoadedBatch:
    views = torch.full((2, 4, 3, 8, 8), number, dtype=torch.uint8)
    return LoadedBatch(
        views, torch.zeros(2, 4, 10), torch.full((4,), number), torch.zeros(4, dtype=torch.int64), {f"bad {number}": "x"}
    )


class Recording:
    """A copier that writes down what happens."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def start(self, batch: LoadedBatch) -> LoadedBatch:
        self.events.append(f"start {batch.ids[0]}")
        return batch

    def hand_over(self, batch: LoadedBatch) -> None:
        self.events.append(f"use {batch.ids[0]}")


def loader(events: list[Any], count: int, error: Exception | None = None) -> Iterator[LoadedBatch]:
    for number in range(count):
        events.append(f"load {number}")
        yield batch(number)
    events.append("no more")
    if error:
        raise error


def steps(transfer: Transfer, events: list[Any], most: int = 99) -> None:
    for _ in range(most):
        found = next(transfer, None)
        if found is None:
            return
        assert found.bad == {f"bad {found.ids[0]}": "x"}
        events.append(f"step {found.ids[0]}")
        transfer.look_ahead()
        transfer.look_ahead()  # once is enough


def test_the_next_batch_starts_after_a_step_was_given_to_the_device_and_before_the_next() -> None:
    events: list[Any] = []
    steps(Transfer(loader(events, 2), Recording(events)), events)
    first, second = (["use 0", "step 0"], ["use 1", "step 1"])
    assert events == ["load 0", "start 0", *first, "load 1", "start 1", *second, "no more"]


def test_what_goes_wrong_with_a_batch_does_not_end_the_step_before() -> None:
    events: list[Any] = []
    transfer = Transfer(loader(events, 2, DataError("no such shard")), Recording(events))
    with pytest.raises(DataError, match="no such shard"):
        steps(transfer, events)
    assert events[-2:] == ["step 1", "no more"]
    again = Transfer(loader(events := [], 2, DataError("no such shard")), Recording(events))
    steps(again, events, most=2)  # a run that ends here never hears of it
    assert events[-2:] == ["step 1", "no more"]


def test_the_cpu_has_nothing_to_do() -> None:
    events: list[Any] = []
    steps(Transfer.to(torch.device("cpu"), loader(events, 2)), events)
    assert events == ["load 0", "step 0", "load 1", "step 1", "no more"]
    one = batch(0)
    assert next(Transfer.to(torch.device("cpu"), iter([one]))) is one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_views_are_whole_and_laid_out_as_they_were() -> None:
    device = torch.device("cuda")
    made = [torch.randint(0, 256, (2, 64, 96, 96, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3) for _ in range(6)]
    pinned = [batch(number)._replace(views=views.pin_memory()) for number, views in enumerate(made)]
    transfer = Transfer(iter(pinned), SideStream(device))
    for views in made:
        found = next(transfer)
        assert (found.views.device.type, found.draws.device.type) == ("cuda", "cpu")
        assert found.views.stride() == views.stride()
        torch.cuda._sleep(10_000_000)  # the device is busy: a batch that came too early or late would show
        same = (found.views == views.to(device)).all()
        transfer.look_ahead()
        assert bool(same)
