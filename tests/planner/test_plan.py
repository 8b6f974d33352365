"""`clae plan`: traced work beside real steps, arithmetic by hand, refusals, and properties of plans."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from clae_dist.bench.outcome import machine, versions
from clae_dist.bench.real_step import step_of
from clae_dist.bench.step import one_step
from clae_dist.bench.steps import Kind, Variant, make_images, prepare
from clae_dist.cli import main
from clae_dist.config import Batch, Config, Data, Model, Optim, Parallel, Train
from clae_dist.errors import BAD_CONFIG, OK, ConfigError
from clae_dist.methods.clae import Clae
from clae_dist.methods.simclr import SimClr
from clae_dist.models.flops import flops_of
from clae_dist.planner import plan
from clae_dist.planner.costs import Images, Prices, best_interval_s, goodput_of
from clae_dist.planner.measured import Here, Measured, read_measured
from clae_dist.planner.memory import memory_of
from clae_dist.planner.network import Links
from clae_dist.planner.plan import Request, make_plan
from clae_dist.planner.table import Chip, Fsdp2Costs, chip_names, chip_of, network_of
from clae_dist.planner.timing import Rates, Sample, fit_rates, step_time
from clae_dist.planner.trace import Traced, _trace, between, trace
from clae_dist.planner.work import Amount, Bin, Message
from clae_dist.wire import Network
from clae_dist.world import World
from tests.ranks import RankPool

H100, IB = chip_of("h100"), network_of("ib-400")


def config_of(rows: int = 8, ranks: int = 2, **sections: Any) -> Config:
    defaults = {
        "data": Data(image_size=16),
        "model": Model(encoder="small_resnet", projector_dim=32, norm="local"),
        "method": SimClr.Settings(),
        "batch": Batch(global_size=rows * ranks),
        "optim": Optim(name="adamw"),
        "train": Train(precision="float32"),
    }
    return Config(**{**defaults, **sections})


@cache
def traced(rows: int = 8, ranks: int = 2, micro: int = 0, backend: str = "ddp") -> tuple[Traced, Config]:
    batch = Batch(global_size=rows * ranks, micro_size=micro)
    config = config_of(rows, ranks, batch=batch, parallel=Parallel(backend=backend))  # type: ignore[arg-type]
    return trace(config, ranks, gpu=False, norm_ranks=ranks), config


def request(config: Config, ranks: int, **fields: Any) -> Request:
    usual = {"wires": IB, "per_node": 8, "images": Images(1000, 1e5, "test"), "prices": Prices(2.0), "measured": Measured()}
    return Request(config, ranks, **{"chip": H100, "backends": ("ddp",), **usual, **fields})


# ---- what is counted ----


@pytest.mark.parametrize(
    "method",
    [pytest.param(SimClr.Settings(), id="simclr", marks=pytest.mark.slow), pytest.param(Clae.Settings(), id="clae")],
)
def test_products_are_those_of_a_real_step(method: Any) -> None:
    kind = Kind("small", "small_resnet", 16, 4)
    step = one_step(prepare(kind, Variant(method), torch.device("cpu")), make_images(kind, torch.device("cpu")))
    planned = config_of(4, 1, model=Model(encoder="small_resnet"), method=method)
    assert trace(planned, 1, gpu=False, norm_ranks=1).work.flops == flops_of(step) > 0


def test_memory_by_backend_and_rows() -> None:
    (few, config), (many, _) = traced(rows=8), traced(rows=16)
    weights = few.weight_bytes
    ddp = memory_of(few, config)
    assert ddp.parts["gradients"] == weights  # the buckets of DDP
    assert ddp.parts["optimiser"] == pytest.approx(2 * weights, rel=0.01)  # AdamW's two moments
    kept = [next(one.bytes["forward"] for one in step.work.moments if one.at == "forward") for step in (few, many)]
    assert kept[1] / kept[0] == pytest.approx(2, rel=0.02)
    sharded, on_shards = traced(backend="fsdp2")
    parts = memory_of(sharded, on_shards).parts
    assert parts["weights"] == sharded.buffer_bytes + weights / 2
    assert parts["optimiser"] == pytest.approx(weights, rel=0.01)


@pytest.mark.slow
def test_micro_batches_are_extrapolated() -> None:
    planned, config = traced(rows=16, micro=2)  # 8 parts, of which 4 at most are traced
    exact = _trace(config, 2, gpu=False, norm_ranks=2)
    assert planned.work.flops == pytest.approx(exact.work.flops, rel=1e-6)
    assert memory_of(planned, config).total == pytest.approx(memory_of(exact, config).total, rel=0.02)


def test_a_number_of_ranks_between_two_traces() -> None:
    (one, _), (two, _), (four, _) = traced(rows=16, ranks=2), traced(rows=8, ranks=4), traced(rows=4, ranks=8)
    found = between(one, four, 4, 4)
    assert found.rows == two.rows
    assert found.work.flops == pytest.approx(two.work.flops, rel=1e-6)
    assert found.work.messages == two.work.messages


def allocated_in_a_step(world: World, config: Config) -> int:
    """The most bytes that a step adds to what is there before it, by torch's allocator."""
    step = step_of(config, world)
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("micro", [0, 4])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_memory_is_what_the_allocator_gives(num_ranks: int, micro: int, ranks: RankPool) -> None:
    """With the copies that oneDNN makes of a convolution's weights, of which torch's allocator has the memory."""
    batch, data = Batch(global_size=8 * num_ranks, micro_size=micro), Data(image_size=32)
    config = config_of(8, num_ranks, batch=batch, method=Clae.Settings(), data=data)
    traced = trace(config, num_ranks, gpu=False, norm_ranks=num_ranks)
    memory = memory_of(traced, config)
    kept = sum(memory.parts.get(part, 0.0) for part in ("weights", "optimiser", "images"))
    buckets = traced.weight_bytes if num_ranks > 1 else 0
    added = ranks.run(num_ranks, allocated_in_a_step, config)
    assert memory.total == pytest.approx(max(added) + kept + buckets, rel=0.03)


# ---- arithmetic ----


def test_seconds_of_collectives() -> None:
    links = Links(H100, 8, IB)
    # 64 ranks on 8 nodes: bounded by the node's eight adapters of 50 GB/s, of which 80 % are assumed; tree latency.
    seconds = links.seconds(Message("backward", "allreduce", 10**9, 64))
    latency = 1e-6 * (4.4 + 2 * (7 * 1.8 * 0.52 + 3 * 5.0))
    assert seconds == pytest.approx(latency + 2 * 1e9 * 63 / 64 / (0.8 * 400e9))
    within = links.seconds(Message("loss", "allgatherbase", 10**6, 8))
    assert within == pytest.approx(1e-6 * (3.6 + 7 * 0.47) + 1e6 * 7 / 8 / (0.8 * 450e9))
    slow = replace(links, measured={("all_reduce", 2): Network(1e-3, 1e-9, 0.0)}, wires=None)
    assert slow.seconds(Message("backward", "allreduce", 10**6, 2)) == pytest.approx(2e-3)
    assert links.seconds(Message("loss", "allgatherbase", 10**6, 1)) == 0


def test_fsdp2_copies_its_units_and_takes_the_time_of_the_host_for_each() -> None:
    """SimCLR gathers every unit for two forwards and again in the backward of each, and reduces it once."""
    sharded, config = traced(backend="fsdp2")
    free = {(kind, 2): Network(0.0, 0.0, 0.0) for kind in ("all_gather", "reduce_scatter", "all_reduce")}
    links = Links(Chip("cpu", "", 0.0, 0.0, 0.0, "memory", 2, 0.0, "made up"), 2, None, free)
    rates = Rates({"float32": math.inf}, 1e9, 0.0, "made up", fsdp2=Fsdp2Costs(1e-3, 1e-4, 1e-5))
    weights, host_s = sum(sharded.unit_bytes), 5 * (6 * 1e-3 + 40 * 1e-4) + 40 * 1e-5
    assert (len(sharded.unit_bytes), sharded.num_parameters) == (6, 40)
    for crowding in (1, 3):
        time = step_time(sharded, config, rates, links, crowding=crowding)
        read_and_written = {"parameters": 4 * 2 * (weights + weights / 2), "reduction": 2 * weights}
        for part, moved in read_and_written.items():
            assert time.communicated[part] == pytest.approx(crowding * moved / 1e9)
        assert time.waits == pytest.approx(crowding * host_s)
    on_a_gpu = step_time(sharded, config, rates, replace(links, chip=H100))
    assert on_a_gpu.waits == pytest.approx(max(0.0, host_s - sum(on_a_gpu.computed.values())))
    slow = replace(rates, fsdp2=replace(rates.fsdp2, copied_bytes_per_s=5e8))
    assert step_time(sharded, config, slow, links).communicated["reduction"] == pytest.approx(2 * weights / 5e8)
    ddp, config = traced()
    assert step_time(ddp, config, rates, links).waits == 0


def test_measured_costs_of_fsdp2_replace_the_assumed_ones() -> None:
    assert request(config_of(), 2).rates.fsdp2 == Fsdp2Costs()
    found = Fsdp2Costs(2e-4, 1e-5, 3e-5, 4e9)
    assert request(config_of(), 2, measured=Measured(fsdp2=found)).rates.fsdp2 == found


def test_rates_are_found_again() -> None:
    steps = [(1e9, 1e8, 100), (4e9, 1e8, 120), (1e9, 5e8, 300), (2e9, 2e8, 150)]
    samples = [Sample(*step, step[0] / 5e10 + step[1] / 1e10 + step[2] * 1e-5) for step in steps]
    rates = fit_rates(samples, "made up")
    bins = [(Bin("forward", "float32", 3), Amount(1e9, 7e9, 0)), (Bin("forward", "", 0), Amount(0, 1e8, 100))]
    assert rates.seconds(bins) == pytest.approx(1e9 / 5e10 + 1e8 / 1e10 + 100e-5, rel=1e-6)


def test_a_product_takes_the_longer_of_operations_and_bytes() -> None:
    rates = Rates({"float32": 1e12}, 1e11, 0.0, "made up")
    assert rates.seconds([(Bin("forward", "float32", 1), Amount(1e12, 1e10, 1))]) == 1.0
    assert rates.seconds([(Bin("forward", "float32", 1), Amount(1e10, 1e11, 1))]) == 1.0


def test_goodput() -> None:
    assert goodput_of(100.0, 1.0, 10_000.0) == pytest.approx(1 / (1 + 0.01 + 0.017))
    best = best_interval_s(2.0, 1e6)
    assert best == 2000
    assert goodput_of(best, 2.0, 1e6) >= max(goodput_of(best * factor, 2.0, 1e6) for factor in (0.5, 0.9, 1.1, 2))
    assert 0 < goodput_of(math.inf, 1.0, 1e4) < goodput_of(1e3, 1.0, 1e4)


# ---- plans ----


def test_what_does_not_fit_is_refused_with_a_setting_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Traced] = {}

    def once(*arguments: Any, **named: Any) -> Traced:
        """The three plans differ in the chip's memory and the micro-batches: what one has traced, others need not."""
        key = repr((arguments, named))
        if key not in kept:
            kept[key] = trace(*arguments, **named)
        return kept[key]

    monkeypatch.setattr(plan, "trace", once)
    config = config_of(rows=64, data=Data(image_size=32))
    needed = memory_of(trace(config, 2, gpu=True, norm_ranks=2), config).total
    small = replace(H100, memory_bytes=0.8 * needed / 0.92)
    with pytest.raises(ConfigError, match=r"use batch.micro_size=\d+") as refused:
        make_plan(request(config, 2, chip=small))
    micro = int(str(refused.value).rsplit("batch.micro_size=", 1)[1])
    fits = make_plan(request(replace(config, batch=replace(config.batch, micro_size=micro)), 2, chip=small))
    assert fits.options[0].memory.total <= 0.8 * needed
    with pytest.raises(ConfigError, match="no micro-batch fits"):
        make_plan(request(config, 2, chip=replace(H100, memory_bytes=1e6)))


@pytest.mark.slow
def test_more_ranks_and_faster_networks_are_no_slower() -> None:
    config = config_of(rows=32, ranks=4)
    plan = make_plan(request(config, 4, per_node=2))
    rates = {point.ranks: point.images_per_s for point in plan.curve}
    assert set(rates) >= {2, 4, 8}
    best = plan.options[0]
    assert best.time.total == pytest.approx(sum(best.time.parts.values()))
    assert best.costs.money == pytest.approx(2.0 * 4 * best.costs.hours)
    assert best.costs.energy_kwh == pytest.approx(0.7 * 4 * best.costs.hours)
    slow = make_plan(request(config, 4, per_node=2, wires=network_of("ethernet-10")))
    assert slow.options[0].time.exposed["reduction"] > best.time.exposed["reduction"]
    assert slow.options[0].time.exposed["gather"] > best.time.exposed["gather"]


def test_nodes_need_a_network() -> None:
    with pytest.raises(ConfigError, match="add --network"):
        make_plan(request(config_of(ranks=4), 4, per_node=2, wires=None))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "did you mean h100"),
        (["--gpu", "h100", "--network", "carrier-pigeon"], "--network is 'carrier-pigeon'"),
        (["--gpu", "cpu"], "clae bench step --json"),
        (["--gpu", "h100", "--ranks", "3"], "3 ranks need equal rows"),
        (["--gpu", "h100", "--mtbf", "0"], "--mtbf is 0"),
    ],
)
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [] if "--ranks" in words else ["--ranks", "2"]
    assert main(["plan", "quickstart", *ranks, *words]) == BAD_CONFIG
    assert message in capsys.readouterr().err


def test_every_chip_has_rates() -> None:
    for name in chip_names():
        if name != "cpu":
            chip = chip_of(name)
            assert Rates.of_table(chip, tf32=False).flops_per_s[chip.precision("auto")] > 1e12


# ---- measured files ----


def measured_file(folder: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> Path:
    step = {"case": "a", "what": "plain: SimCLR", "median_s": 0.1, "more": {"flops": 1e9, "kernel_bytes": 1e8, "kernels": 500}}
    case, more = "the network: 2 ranks (gloo)", {"alpha_s": 1e-3, "beta_s_per_byte": 1e-9}
    networks = [{"case": case, "what": f"{kind}: x", "more": more} for kind in ("all_gather", "reduce_scatter", "all_reduce")]
    units = {"case": "units: 2 ranks (gloo)", "what": "fsdp2: x", "more": asdict(Fsdp2Costs(2e-4, 1e-5, 3e-5, 4e9))}
    content = {"versions": versions(), "machine": machine(torch.device("cpu")), "rows": [step, *networks, units]}
    change(content)
    path = folder / "bench.json"
    path.write_text(json.dumps(content))
    return path


def test_measured_files(tmp_path: Path) -> None:
    here = Here(versions(), machine(torch.device("cpu")))
    cpu = replace(H100, name="cpu")
    found = read_measured([measured_file(tmp_path)], cpu, here, force=False)
    assert found.networks["all_reduce", 2].alpha_s == 1e-3
    assert found.rates() is not None
    assert found.fsdp2 == Fsdp2Costs(2e-4, 1e-5, 3e-5, 4e9)

    def older(content: dict[str, Any]) -> None:
        content["versions"] = {**content["versions"], "clae-dist": "0.0.1"}
        content["rows"][-1]["more"] = {"unit_s": 3e-4}

    def elsewhere(content: dict[str, Any]) -> None:
        content["machine"] = {**content["machine"], "cpu": "Another CPU"}

    for change, named in ((older, "clae-dist 0.0.1"), (elsewhere, "'Another CPU'")):
        path = measured_file(tmp_path, change)
        with pytest.raises(ConfigError, match=named):
            read_measured([path], cpu, here, force=False)
        assert read_measured([path], cpu, here, force=True).samples
    with pytest.raises(ConfigError, match="no GPU, but --gpu is h100"):
        read_measured([measured_file(tmp_path)], H100, here, force=False)
    with pytest.raises(ConfigError, match="has no row"):
        read_measured([measured_file(tmp_path, lambda content: content.update(rows=[]))], cpu, here, force=False)


def test_a_real_step_as_one_of_many_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["data.image_size=16", "batch.global_size=64", "method.name=simclr", "name=tiny", "model.norm=local"]
    network = measured_file(tmp_path, lambda content: content["rows"].pop(0))
    words = ["plan", "quickstart", *small, "--gpu", "cpu", "--as-if-world", "8", "--measured", str(network), "--json"]
    assert main(words) == OK
    plan = json.loads(capsys.readouterr().out)
    step = plan["real_step"]
    assert plan["ranks"] == step["ranks"] == 8
    assert "--as-if-world 8" in plan["rates"]
    assert step["planned_bytes"] == next(one for one in plan["backends"] if one["backend"] == "ddp")["memory_bytes"]
    assert step["seconds"] > 0
    assert step["peak_bytes"] > 0
    if not torch.cuda.is_available():
        assert main(["plan", "quickstart", "--gpu", "h100", "--as-if-world", "8"]) == BAD_CONFIG
        assert "use --gpu cpu" in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["data.image_size=16", "batch.global_size=16", "method.name=simclr", "name=tiny"]
    words = ["plan", "quickstart", *small, "--ranks", "2", "--gpu", "cpu", "--measured", str(measured_file(tmp_path))]
    assert main([*words, "--json", "--to", str(tmp_path / "plan.json"), "--images", "160", "--price", "1"]) == OK
    printed = capsys.readouterr().out
    plan = json.loads(printed)
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
    by_name = {backend["backend"]: backend for backend in plan["backends"]}
    assert set(by_name) == {"ddp", "fsdp2", "deepspeed"}
    assert all(backend["step_s"] > 0 and backend["memory_bytes"] > 0 for backend in by_name.values())
    assert by_name["fsdp2"]["memory_parts_bytes"]["weights"] < by_name["ddp"]["memory_parts_bytes"]["weights"]
