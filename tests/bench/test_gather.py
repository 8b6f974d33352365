"""`clae bench gather`: bytes by arithmetic, on real processes."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

from clae_dist import cli
from clae_dist.bench import gather, peers
from clae_dist.bench.measure import Row, UnequalError
from clae_dist.contrast import distributed
from clae_dist.objectives import names
from clae_dist.wire import Traffic, fit
from clae_dist.world import World
from tests.ranks import RankPool

TINY = gather.GatherBench(world_sizes=(2,), images=4, dim=8, repeats=2, message_bytes=(64, 1024, 4096), with_peers=False)


def test_bytes_of_each_collective() -> None:
    part, whole = torch.zeros(10), torch.zeros(40)  # float32: 40 and 160 bytes
    traffic = Traffic(num_ranks=4)
    traffic.add("allgather", ([[part] * 4], [part]))
    traffic.add("allgatherbase", (whole, part))
    traffic.add("reducescatterbase", (part, whole))
    traffic.add("alltoall", ([part] * 4, [part] * 4))
    traffic.add("allreduce", ([whole],))
    traffic.add("scatter", ([part], [[part] * 4]))  # at the root
    traffic.add("scatter", ([part], []))  # elsewhere
    traffic.add("barrier", (torch.zeros(1),))
    assert [size for _, size in traffic.sent] == [120, 120, 120, 120, 240, 30, 30]
    with pytest.raises(ValueError, match="'telepathy' is unknown"):
        traffic.add("telepathy", (part,))


def test_alpha_and_beta_of_what_was_made_of_them() -> None:
    sizes = [1e3, 1e4, 1e5, 1e6, 1e7]
    network = fit(sizes, [2e-5 + 3e-9 * size for size in sizes])
    assert network.alpha_s == pytest.approx(2e-5)
    assert network.beta_s_per_byte == pytest.approx(3e-9)
    assert network.worst < 1e-9
    falling = fit(sizes, [1e-3 / (1 + index) for index in range(5)])  # noise alone: neither is negative
    assert falling.alpha_s > 0
    assert falling.beta_s_per_byte == 0


def _measure(world: World) -> list[Row]:
    return gather.measure(world, TINY, lambda text: None)


@pytest.mark.parametrize("size", [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4))])
def test_what_ours_sends(ranks: RankPool, size: int) -> None:
    found = ranks.run(size, _measure)
    assert all(rows[0].case == found[0][0].case for rows in found)
    rows = {(row.case.split(":")[0], row.name): row for row in found[0]}
    network = [row for (case, _), row in rows.items() if case == "the network"]
    assert [row.name for row in network] == ["all_gather", "reduce_scatter", "all_reduce"]
    assert all({"alpha_s", "beta_s_per_byte"} <= set(row.more) for row in network)
    (unit,) = [row for (case, _), row in rows.items() if case.startswith("units")]
    assert unit.more["copied_bytes_per_s"] > 0
    assert unit.more["unit_s"] + unit.more["parameter_s"] > 0
    assert unit.more["update_s"] > 0
    view, numbers = 4 * size * 8 * 4, 4 * size * 4  # bytes of all rows of a view, and of a number a row
    of_one_rank = (size - 1) / size
    lean, full = rows["NT-Xent", "log_sum_exp"], rows["NT-Xent", "reduce_scatter"]
    assert lean.wire_bytes == round(of_one_rank * (2 * view + 2 * numbers))
    assert full.wire_bytes == round(of_one_rank * 4 * view)
    assert (lean.more["collectives"], full.more["collectives"]) == (3, 4)
    assert lean.bytes_ratio_to["reduce_scatter"] == pytest.approx(lean.wire_bytes / full.wire_bytes)


def _forgetful(world: World) -> str:
    """Ours with a gather that gives every rank its own shifts."""
    right = distributed._shifts_of_all_ranks
    distributed._shifts_of_all_ranks = lambda shift, group: shift.repeat(dist.get_world_size(group), 1, 1)
    try:
        gather.measure(world, TINY, lambda text: None)
    except UnequalError as error:
        return str(error)
    finally:
        distributed._shifts_of_all_ranks = right
    return ""


def test_a_gather_that_computes_something_else_is_refused_on_every_rank(ranks: RankPool) -> None:
    """One that only some ranks refuse would leave the others waiting."""
    assert all("reduce_scatter differs" in message for message in ranks.run(2, _forgetful))


@pytest.mark.slow
def test_the_command_on_processes_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gather, "QUICK", TINY)
    assert cli.main(["bench", "gather", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "machine", "notes", "rows"}
    assert all((row["wire_bytes"] or row["more"]["unit_s"]) > 0 for row in found["rows"])
    assert {row["what"].split(":")[0] for row in found["rows"]} >= {"all_reduce", "log_sum_exp", "reduce_scatter"}


@pytest.mark.slow
def test_bytes_beside_the_peers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "QUICK", gather.GatherBench(world_sizes=(2,), repeats=2, message_bytes=(4096, 65536)))
    assert cli.main(["bench", "gather", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    live = [row for row in rows if "uel" not in row["case"]]  # uel's columns are constants: either way it sends the rows alone
    ratios: dict[str, float] = {}
    for row in live:
        ratios |= row["bytes_ratio_to"] if row["what"].startswith("log_sum_exp") else {}
    lean = {row["case"].split(":")[0]: row["wire_bytes"] for row in rows if row["what"].startswith("log_sum_exp")}
    (full,) = {row["wire_bytes"] for row in live if row["what"].startswith(("open_clip", "reduce_scatter: ours"))}
    assert len(lean) == len(names())
    assert all(sent <= 0.52 * full for sent in lean.values())
    bars = {"reduce_scatter": 0.52, "open_clip": 0.52, "lightly": 0.35}
    assert all(ratios[name] <= bar for name, bar in bars.items() if name in ratios)
    assert all(name in ratios for name in peers.PACKAGES if peers.is_installed(name))
