"""A store that is slow, away or unwilling never stops or slows a run."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from clae_dist.tracking.background import BackgroundTracker
from clae_dist.tracking.tracker import MetricsRow, Refused, Status


class FakeStore:
    address = "the store"

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.away = threading.Event()
        self.hold = threading.Event()  # set: calls go through
        self.hold.set()
        self.refuse = ""

    def _call(self, *call: Any) -> None:
        self.hold.wait()
        if self.away.is_set():
            raise ConnectionError("nobody home\nand more")
        if call[0] == self.refuse:
            raise Refused("no such thing here")
        self.calls.append(call)

    def open(self) -> None:
        self._call("open")

    def log_rows(self, rows: list[MetricsRow]) -> None:
        self._call("rows", [row.images_seen for row in rows])

    def set_tag(self, name: str, text: str) -> None:
        self._call("tag", name, text)

    def log_artifacts(self, path: Path, name: str) -> None:
        self._call("artifacts", str(path), name)

    def log_model(self, export_folder: Path, digest: str, images_seen: int) -> None:
        self._call("model", str(export_folder), digest, images_seen)

    def close(self, status: Status) -> None:
        self._call("close", status)


def seen(store: FakeStore) -> list[int]:
    return [images for call in store.calls if call[0] == "rows" for images in call[1]]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s"
        time.sleep(0.005)


def test_everything_arrives_in_order() -> None:
    store, said = FakeStore(), []
    tracker = BackgroundTracker(store, said.append)
    for step in range(250):
        tracker.log({"loss": 1.0}, step)
    tracker.log_artifacts(Path("report"), "report")
    tracker.log_model(Path("export"), "d1")
    tracker.close("stopped")
    assert seen(store) == list(range(250))
    assert store.calls[0] == ("open",)
    assert store.calls[-3:] == [("artifacts", "report", "report"), ("model", "export", "d1", 249), ("close", "stopped")]
    assert said == []


def test_a_row_is_copied_when_it_is_logged() -> None:
    store = FakeStore()
    rows: list[MetricsRow] = []
    store.log_rows = rows.extend  # type: ignore[method-assign]
    store.hold.clear()
    tracker = BackgroundTracker(store, print)
    metrics = {"loss": 1.0}
    tracker.log(metrics, 1)
    metrics["loss"] = 2.0
    store.hold.set()
    tracker.close("finished")
    assert rows[0].metrics == {"loss": 1.0}


def test_a_store_that_hangs_costs_the_run_nothing_and_the_queue_is_bounded() -> None:
    store, said = FakeStore(), []
    store.hold.clear()
    tracker = BackgroundTracker(store, said.append, capacity=100, close_timeout_s=0.2)
    start = time.perf_counter()
    for step in range(20_000):
        tracker.log({"loss": 1.0}, step)
    assert time.perf_counter() - start < 2.0  # 20,000 rows; one blocked call would be for ever
    start = time.perf_counter()
    tracker.close("finished")
    assert time.perf_counter() - start < 5.0
    assert said[-1] == "the store did not get 20000 rows of metrics; the run folder has all of it."
    store.hold.set()


def test_away_is_said_once_and_what_fits_is_sent_when_it_is_back() -> None:
    store, said = FakeStore(), []
    store.away.set()
    tracker = BackgroundTracker(store, said.append, capacity=50, retry_s=0.02)
    for step in range(60):
        tracker.log({"loss": 1.0}, step)
    wait_for(lambda: said)
    time.sleep(0.1)  # several more tries
    store.away.clear()
    wait_for(lambda: len(seen(store)) == 50)
    tracker.close("finished")
    assert seen(store) == list(range(10, 60))  # the oldest gave way
    assert said == [
        "the store is unreachable (nobody home); the run continues and sends the rest later.",
        "the store is reachable again.",
        "the store did not get 10 rows of metrics; the run folder has all of it.",
    ]


def test_away_in_mid_run_loses_nothing() -> None:
    store, said = FakeStore(), []
    tracker = BackgroundTracker(store, said.append, retry_s=0.02)
    tracker.log({"loss": 1.0}, 1)
    wait_for(lambda: seen(store) == [1])
    store.away.set()
    tracker.log({"loss": 1.0}, 2)
    wait_for(lambda: said)
    store.away.clear()
    tracker.close("finished")
    assert seen(store) == [1, 2]
    assert store.calls[-1] == ("close", "finished")


def test_a_store_that_is_away_at_the_end_is_given_up_and_named() -> None:
    store, said = FakeStore(), []
    store.away.set()
    tracker = BackgroundTracker(store, said.append, retry_s=60.0)
    tracker.log({"loss": 1.0}, 1)
    tracker.log_model(Path("export"), "d1")
    wait_for(lambda: said)
    start = time.perf_counter()
    tracker.close("failed")
    assert time.perf_counter() - start < 2.0  # not the 60 s of the next try
    assert said[-1] == "the store did not get 1 rows of metrics and encoder; the run folder has all of it."


def test_what_the_store_refuses_is_left_out_and_the_rest_goes_on() -> None:
    store, said = FakeStore(), []
    store.refuse = "artifacts"
    tracker = BackgroundTracker(store, said.append)
    tracker.log_artifacts(Path("a"), "report")
    tracker.log({"loss": 1.0}, 7)
    tracker.close("finished")
    assert seen(store) == [7]
    assert said[0] == "the store refused report (no such thing here); it is missing there."
    assert store.calls[-1] == ("close", "finished")


def test_a_refused_run_is_said_and_later_rows_are_counted() -> None:
    store, said = FakeStore(), []
    store.refuse = "open"
    tracker = BackgroundTracker(store, said.append)
    wait_for(lambda: said)
    tracker.log({"loss": 1.0}, 7)
    tracker.close("finished")
    assert said[0] == "the store refused this run (no such thing here); metrics.jsonl is still written."
    assert said[1].startswith("the store did not get 1 rows")


def test_a_tag_reaches_the_store() -> None:
    store = FakeStore()
    tracker = BackgroundTracker(store, print)
    tracker.tag("alarm.collapse", "step 2: the cause")
    tracker.close("finished")
    assert store.calls[-2:] == [("tag", "alarm.collapse", "step 2: the cause"), ("close", "finished")]
