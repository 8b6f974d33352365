"""The heartbeat of a run and, on request, its Prometheus metrics, from a thread of rank 0 that no step waits for."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress

from clae_dist.errors import FAILED
from clae_dist.runs.ends import End, newest_step, read_ends, record_end
from clae_dist.runs.goodput import Ledger
from clae_dist.runs.heartbeat import EVERY_S, Heartbeat, read_heartbeat, write_heartbeat
from clae_dist.tracking import Tracker
from clae_dist.tracking.prometheus import Family, MetricsServer
from clae_dist.training.hang_report import host_name
from clae_dist.training.session import Session
from clae_dist.training.watch import Watch

_POLL_S = 1.0
_CHECKPOINT_EVERY_S = 30.0  # looks for the newest checkpoint


class Pulse(Tracker):
    """Live values of rank 0. A tracker, so that it hears the metrics of the run; on other ranks, nothing is written."""

    def __init__(self, session: Session, watch: Watch) -> None:
        self._session, self._watch, self._attempt = session, watch, session.attempt
        self._metrics: dict[str, float] = {}
        self._checkpoint: int | None = None
        self._checkpoint_at = time.monotonic()
        self._server: MetricsServer | None = None
        self._ends: Counter[str] = Counter()
        self.ledger: Ledger | None = None  # set once there is one
        self._looked = float("-inf")
        self._over = threading.Event()
        self._progress_at, self._seen = time.monotonic(), watch.place
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        if self._session.world.is_main:
            with suppress(OSError):
                record_missing_end(self._session)
        if self._session.config.tracking.prometheus:
            self._session.world.run_on_main(self._serve)
        if self._session.world.is_main:
            self._thread.start()
        return self

    def _serve(self) -> None:
        tracking = self._session.config.tracking
        self._ends = Counter(end.cause for end in read_ends(self._session.config.folder))
        self._server = MetricsServer(tracking.prometheus_host, tracking.prometheus, self.families)
        self._session.say(f"prometheus: http://{tracking.prometheus_host}:{self._server.port}/metrics")

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._server is not None:
            self._server.close()
        if self._thread.is_alive():
            self._thread.join(_POLL_S)  # storage may hang

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        self._metrics = {**self._metrics, **{key: metrics[key] for key in _GAUGES if key in metrics}}

    def _run(self) -> None:
        written = float("-inf")
        over = False
        while not over:
            over = self._over.wait(_POLL_S)
            now = time.monotonic()
            if self._watch.place is not self._seen:
                self._seen, self._progress_at = self._watch.place, now
            # Nothing is written to a folder that may still turn out to belong to another run.
            if self._attempt.opened and (over or now - written >= EVERY_S):
                written = now
                with suppress(OSError):  # a full disk is reported by checkpoints; the next heartbeat tries again
                    write_heartbeat(self._session.config.folder, self.beat())

    def beat(self) -> Heartbeat:
        """The heartbeat of now."""
        now, config, place = time.monotonic(), self._session.config, self._seen
        if now - self._looked >= _CHECKPOINT_EVERY_S:
            before, self._looked, self._checkpoint = self._checkpoint, now, newest_step(config.folder)
            if self._checkpoint != before:
                self._checkpoint_at = now
        return Heartbeat(
            time=time.time(),
            start=self._attempt.start,
            step=place.step,
            total=self._attempt.total,
            phase=place.doing,
            quiet_s=round(now - self._progress_at, 1),
            limit_s=self._watch.limit_s(place.doing),
            ranks=self._session.world.size,
            host=platform.node(),
            pid=os.getpid(),
            hosts=list(dict.fromkeys(map(host_name, self._watch.hosts))),
            metrics=self._metrics,
            checkpoint=self._checkpoint,
            slow=self._attempt.slow,
        )

    def families(self) -> Iterator[Family]:
        """The run as Prometheus sees it."""
        now, place, run = time.monotonic(), self._watch.place, {"run": self._session.config.name}

        def gauge(name: str, help_text: str, value: float | None) -> Family:
            return Family(f"clae_{name}", "gauge", help_text, {} if value is None else {"": value}, labels=run)

        yield gauge("step", "Steps taken.", place.step)
        yield gauge("steps", "Steps of the whole run.", self._attempt.total or None)
        yield gauge("ranks", "Ranks of this start.", self._session.world.size)
        yield gauge("slow_rank", "1 if a slow rank was found.", float(bool(self._attempt.slow)))
        yield gauge("seconds_since_progress", "Seconds since rank 0 last made progress.", now - self._progress_at)
        if self._checkpoint is not None:
            yield gauge("checkpoint_step", "Step of the newest checkpoint.", self._checkpoint)
            text = "Seconds since the newest checkpoint was seen, which is looked for every 30 s."
            yield gauge("seconds_since_checkpoint", text, now - self._checkpoint_at)
        for key, (name, help_text, factor) in _GAUGES.items():
            yield gauge(name, help_text, self._metrics[key] * factor if key in self._metrics else None)
        if self.ledger is not None:
            goodput = self.ledger.snapshot()
            text = "Seconds since the first start, by what they were spent on."
            yield Family("clae_time_seconds", "gauge", text, dict(goodput.spent.items()), "kind", run)
            yield Family("clae_starts_total", "counter", "Starts of the run.", {"": goodput.starts}, labels=run)
        yield Family("clae_ends_total", "counter", "Ends of earlier starts, by cause.", self._ends, "cause", run)


_GAUGES = {  # metric of the run: name, help, factor
    "images_per_s": ("images_per_second", "Images a second, of all ranks.", 1.0),
    "loss": ("loss", "Loss, the mean since the line of metrics before.", 1.0),
    "grad_norm": ("gradient_norm", "Norm of the gradient.", 1.0),
    "learning_rate": ("learning_rate", "Learning rate.", 1.0),
    "epoch": ("epoch", "Epochs done.", 1.0),
    "goodput": ("goodput_percent", "Share of the wall time spent on steps whose result was kept.", 1.0),
    "knn_accuracy": ("knn_accuracy_percent", "Accuracy of kNN during training.", 1.0),
    "peak_memory_gib": ("peak_memory_bytes", "Largest memory of a rank.", float(2**30)),
}


def record_missing_end(session: Session) -> None:
    """Record the end of an earlier start that left only its heartbeat. The training lease says that it is over.

    No host is named: all ranks are gone, and their launcher, which a scheduler may have killed.
    """
    folder = session.config.folder
    beat = read_heartbeat(folder)
    if beat is None or any(end.start == beat.start for end in read_ends(folder)):
        return
    text = "this start left without a word: it was killed, or its host was lost"
    end = End(beat.start, beat.written, "host", 0, beat.ranks, "", beat.step, FAILED, text, checkpoint=newest_step(folder))
    record_end(folder, end)
