"""Heartbeat and Prometheus metrics of a run: read while it trains, by Prometheus' own parser."""

from __future__ import annotations

import io
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Config, Tracking
from clae_dist.contrast.step import StepMetrics
from clae_dist.data.manifest import Manifest
from clae_dist.errors import ConfigError
from clae_dist.recipe import Recipe
from clae_dist.runs.ends import read_ends
from clae_dist.runs.heartbeat import read_heartbeat, write_heartbeat
from clae_dist.tracking.prometheus import Family, MetricsServer, exposition
from clae_dist.training import pulse
from clae_dist.training import train as training
from clae_dist.training.session import Session
from clae_dist.world import World
from tests.small_run import whole_run


def samples(text: str) -> dict[str, float]:
    parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(text))
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    return {
        " ".join([sample.name, *(value for key, value in sample.labels.items() if key != "run")]): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_run_is_scraped_and_beats_while_it_trains(shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(pulse, "EVERY_S", 0.0)
    monkeypatch.setattr(pulse, "_POLL_S", 0.01)
    tracking = Tracking(name="none", prometheus=port)
    config = whole_run(shards, tmp_path / "run", every_steps=2, sections={"tracking": tracking}, epochs=1)
    step, seen = training.pretrain_step, []

    def pretrain_step(*arguments: Any) -> StepMetrics:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            seen.append(samples(answer.read().decode()))
        return step(*arguments)

    monkeypatch.setattr(training, "pretrain_step", pretrain_step)
    console = io.StringIO()
    training.train(Recipe(config), World.single("cpu"), console)
    assert f"prometheus: http://127.0.0.1:{port}/metrics" in console.getvalue()
    assert [found["clae_step"] for found in seen] == [0, 1, 2, 3]
    last = seen[-1]
    assert (last["clae_steps"], last["clae_ranks"], last["clae_starts_total"]) == (4, 1, 1)
    assert last["clae_loss"] > 0
    assert last["clae_images_per_second"] > 0
    assert last["clae_peak_memory_bytes"] > 1e8
    assert 0 <= last["clae_seconds_since_progress"] < 600
    assert last["clae_time_seconds training"] > 0
    with pytest.raises(urllib.error.URLError):  # closed with the run
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
    beat = read_heartbeat(config.folder)
    assert beat is not None
    assert (beat.step, beat.total, beat.ranks) == (4, 4, 1)
    assert beat.metrics["loss"] > 0


def test_a_start_that_left_without_a_word_is_recorded_by_the_next(tmp_path: Path) -> None:
    from tests.runs.test_status import beat

    session = Session(Config(run_dir=str(tmp_path)), World.single("cpu"), print)
    pulse.record_missing_end(session)
    assert read_ends(tmp_path) == []
    write_heartbeat(tmp_path, beat(start=5.0))
    for _ in range(2):
        pulse.record_missing_end(session)
        (end,) = read_ends(tmp_path)
    assert (end.start, end.cause, end.host, end.step) == (5.0, "host", "", 17)  # nobody knows which


def test_text_for_prometheus_keeps_any_label_and_nothing_else_is_served() -> None:
    name = 'a "run"\\ with\nlines'
    family = Family("clae_ends_total", "counter", "Ends.", {"no progress": 2.0}, "cause", {"run": name})
    parser = pytest.importorskip("prometheus_client.parser")
    ((sample,),) = [found.samples for found in parser.text_string_to_metric_families(exposition([family]))]
    assert (sample.labels, sample.value) == ({"run": name, "cause": "no progress"}, 2.0)
    server = MetricsServer("127.0.0.1", 0, lambda: [family])
    try:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/other", timeout=30)
        with pytest.raises(ConfigError, match=r"tracking\.prometheus is .* cannot listen"):
            MetricsServer("127.0.0.1", server.port, lambda: [family])
    finally:
        server.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prometheus"]
