"""`clae bench gpu-counts`: what it counts, its limits, and that it sees what a leaner step avoids."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

from clae_dist.bench import gpu_actions, gpu_counts, stand_in
from clae_dist.bench.gpu_counts import CountOutcome, CountRow
from clae_dist.bench.stand_in import count_as_on_gpu, stand_in_ranks
from clae_dist.counts import Collective
from clae_dist.models import batch_norm


@pytest.mark.slow
def test_rows_of_a_small_network() -> None:
    rows = {row.name: row for row in gpu_counts.rows(quick=True)}
    assert rows["augmentation, eager: kernels"].within_limit
    assert rows["augmentation, eager: host waits"].value == 0
    assert rows["graph breaks of a compiled block"].value == 0
    assert rows["all-reduces before a save"].value == 1
    # 12 norms and 4 forwards, of which the two that are trained share their collectives: the same in the backward pass.
    assert rows["step: all-gathers of batch statistics"].value == rows["step: all-reduces of batch statistics"].value
    assert rows["FSDP2: unit gathers of a step"].within_limit
    assert rows["FSDP2: reduce-scatters of a step"].value == 11
    assert rows["host waits of a step"].value >= 1
    assert not dist.is_initialized()


def test_numbers_that_the_host_sends_or_reads_are_waits() -> None:
    x = torch.ones(3)
    device = stand_in.DEVICE
    actions = {
        "item": lambda: x.sum().item(),
        "tolist": lambda: x.tolist(),
        "truth": lambda: bool(x.sum() > 0),
        "new_tensor": lambda: x.new_tensor([1.0]),
        "tensor": lambda: torch.tensor(1.0, device=device),
        "as_tensor": lambda: torch.as_tensor(True, device=device),
    }
    assert {name: count_as_on_gpu(action).waits for name, action in actions.items()} == dict.fromkeys(actions, 1)
    on_the_host = {
        "of a device": lambda: torch.as_tensor(x, device=device) + 1,
        "number": lambda: torch.tensor(1.0).item(),
        "flags": lambda: torch.stack([torch.as_tensor(True, device=torch.device("cpu")).float()]).tolist(),
    }
    assert {name: count_as_on_gpu(action).waits for name, action in on_the_host.items()} == dict.fromkeys(on_the_host, 0)


def test_replacements_end_with_the_context() -> None:
    before = torch.tensor, torch.Tensor.tolist
    count_as_on_gpu(lambda: None)
    assert (torch.tensor, torch.Tensor.tolist) == before
    assert not torch.ones(1).is_cuda


def test_collectives_within_an_operator_are_told_apart() -> None:
    with stand_in_ranks(4) as world:
        assert world.group is not None
        x, name = torch.rand(2, 3, 4, 4), world.group.group_name

        def action() -> None:
            batch_norm._forward(x, [], [], [2], 1e-5, name)
            dist.all_reduce(x, group=world.group)

        counts = count_as_on_gpu(action)
    assert counts.collectives == (Collective("allgatherbase", "global_batch_norm"), Collective("allreduce"))
    assert "batch_norm_stats" in counts.operations  # the code path of a GPU


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler, after a break
def test_a_graph_break_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = batch_norm.GlobalBatchNorm.forward

    def breaking(norm: batch_norm.GlobalBatchNorm, x: torch.Tensor) -> torch.Tensor:
        return forward(norm, x + x.sum().item())  # a number on the host

    monkeypatch.setattr(batch_norm.GlobalBatchNorm, "forward", breaking)
    assert gpu_actions.graph_breaks(gpu_counts.QUICK.shape) > 0


def test_outcome_as_table_and_as_json() -> None:
    outcome = CountOutcome([CountRow("waits", 2, "waits", 1, "by hand"), CountRow("kernels", 3, "kernels", None, "by hand")])
    assert "MORE" in outcome.as_table()
    content = json.loads(outcome.as_json())
    assert [row["within_limit"] for row in content["rows"]] == [False, True]
    assert "torch" in content["versions"]
