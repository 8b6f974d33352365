"""Where a step's time goes, peak memory, and the share of a GPU's peak rate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from clae_dist.config import Batch, Config, Model, Views
from clae_dist.methods.clae import Clae
from clae_dist.methods.simclr import SimClr
from clae_dist.models.flops import forward_flops
from clae_dist.training import clock, usage
from clae_dist.training.clock import Clock
from clae_dist.training.journal import _Time
from clae_dist.training.usage import Usage, peak_flops


def test_a_phase_inside_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 2.0, 5.0, 6.0, 10.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    phases = Clock(torch.device("cpu"))  # at 0
    with phases.timed("forward"), phases.timed("attack"):  # 1 to 6, 2 to 5
        pass
    assert phases.read() == (10.0, {"forward": 2.0, "attack": 3.0})


def test_a_phase_that_fails_leaves_the_next_one_alone() -> None:
    phases = Clock(torch.device("cpu"))
    with pytest.raises(ValueError, match="broke"), phases.timed("forward"):
        raise ValueError("broke")
    with phases.timed("update"):
        pass
    assert set(phases.read()[1]) == {"update"}


def test_the_line_about_phases() -> None:
    times = _Time()
    metrics = times.add(10.0, {"forward": 4.0, "backward": 3.0, "data": 1.0, "attack": 0.01}, 1.25)
    assert metrics["forward_share"] == 40
    assert metrics["peak_memory_gib"] == 1.25
    times.add(10.0, {"forward": 8.0}, 1.5)
    assert times.describe() == "training time: forward 60 %, other 20 %, backward 15 %, data 5 %; peak memory 1.5 GiB a rank"


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", False, 312e12),
        ("NVIDIA A100-PCIE-40GB", "float32", True, 156e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", False, 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", True, 756e12),
        ("NVIDIA H200 NVL", "float32", False, 60e12),
        ("NVIDIA H200", "float32", False, 67e12),
        ("Tesla V100-SXM2-32GB", "float32", True, 15.7e12),  # without such products TF32 changes nothing
        ("Tesla T4", "float32", False, 8.1e12),
        ("NVIDIA L40S", "bfloat16", False, 362e12),
        ("NVIDIA A10G", "bfloat16", False, 0.0),  # another GPU than the A10
        ("NVIDIA A100-SXM4-80GB", "float64", False, 0.0),
        ("null GPU 0", "bfloat16", False, 0.0),
    ],
)
def test_peak_rates(name: str, precision: str, tf32: bool, expected: float) -> None:
    assert peak_flops(name, precision, tf32=tf32) == pytest.approx(expected)


def test_operations_of_a_forward() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    assert forward_flops(encoder, 16) == 2 * (16 * 16 * 8 * 27 + 8 * 16 * 16 * 10)
    assert encoder[0].weight.device.type == "cpu"
    assert encoder.training


def of(config: Config) -> Usage:
    return Usage(config, torch.device("cpu"), shared_norms=False, pass_flops=1e9, peak=2e12)


def test_the_share_of_the_peak_rate() -> None:
    plain = Config(batch=Batch(global_size=100), model=Model(encoder="small_resnet"), method=SimClr.Settings())
    assert of(plain).mfu(4, 14, 10, 10.0) == pytest.approx(100 * 10 * 6 * 100 * 1e9 / (10 * 2e12))  # two views, 3 passes each
    late = replace(plain, method=Clae.Settings(start_epoch=1.0))
    assert of(late).mfu(0, 10, 10, 10.0) == of(plain).mfu(0, 10, 10, 10.0)
    assert of(late).mfu(10, 20, 10, 10.0) > of(plain).mfu(10, 20, 10, 10.0)  # type: ignore[operator]


def test_no_share_of_an_unknown_rate_or_cost() -> None:
    plain = Config(method=SimClr.Settings())
    assert replace(of(plain), peak=0.0).mfu(0, 10, 10, 10.0) is None
    assert of(replace(plain, views=Views(local_crops=2))).mfu(0, 10, 10, 10.0) is None


def test_peak_memory_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage.sys, "platform", "linux")
    assert 0.05 < of(Config()).peak_memory_gib() < 100  # in KiB or MiB it would be a thousand times another number
