"""Batches on their way to the device: whole when they are used, and laid out as they were."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from clae_dist.data.loader import LoadedBatch
from clae_dist.data.transfer import SideStream, transferred


def batch(number: int) -> LoadedBatch:
    views = torch.full((2, 4, 3, 8, 8), number, dtype=torch.uint8)
    return LoadedBatch(views, torch.zeros(2, 4, 10), torch.full((4,), number), torch.zeros(4, dtype=torch.int64), {})


def test_the_cpu_has_nothing_to_do() -> None:
    batches = iter([batch(0)])
    assert transferred(batches, torch.device("cpu"), nullcontext) is batches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_views_are_whole_and_laid_out_as_they_were() -> None:
    device = torch.device("cuda")
    made = [torch.randint(0, 256, (2, 64, 96, 96, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3) for _ in range(6)]
    side = SideStream(device, nullcontext)
    ahead = side.bring(batch(0)._replace(views=made[0].pin_memory()))
    for number, views in enumerate(made):
        found = ahead
        assert (found.views.device.type, found.draws.device.type) == ("cuda", "cpu")
        assert found.views.stride() == views.stride()
        torch.cuda._sleep(10_000_000)  # the device is busy: a batch that came too early or late would show
        same = (found.views == views.to(device)).all()
        ahead = side.bring(batch(0)._replace(views=made[(number + 1) % len(made)].pin_memory()))
        assert bool(same)
