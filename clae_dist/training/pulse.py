"""The heartbeat of a run and, on request, its Prometheus metrics, from a thread of rank 0 that no step waits for."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from clae_dist.errors import FAILED
from clae_dist.runs.ends import End, newest_step, read_ends, record_end
from clae_dist.runs.heartbeat import EVERY_S, Heartbeat, read_heartbeat, write_heartbeat
from clae_dist.tracking import Tracker
from clae_dist.training.hang_report import host_name
from clae_dist.training.session import Session
from clae_dist.training.watch import Watch

_POLL_S = 1.0
_CHECKPOINT_EVERY_S = 30.0  # looks for the newest checkpoint
_KEPT = ("images_per_s", "loss", "epoch", "goodput", "peak_memory_gib", "grad_norm", "learning_rate", "knn_accuracy")


class Pulse(Tracker):
    """Live values of rank 0. A tracker, so that it hears the metrics of the run; on other ranks, nothing is written."""

    def __init__(self, session: Session, watch: Watch) -> None:
        self._session, self._watch, self._attempt = session, watch, session.attempt
        self._metrics: dict[str, float] = {}
        self._checkpoint: int | None = None
        self._looked = float("-inf")
        self._over = threading.Event()
        self._progress_at, self._seen = time.monotonic(), watch.place
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        if self._session.world.is_main:
            with suppress(OSError):
                record_missing_end(self._session)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(_POLL_S)  # storage may hang

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        self._metrics = {**self._metrics, **{key: metrics[key] for key in _KEPT if key in metrics}}

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
            self._looked, self._checkpoint = now, newest_step(config.folder)
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


def record_missing_end(session: Session) -> None:
    """Record the end of an earlier start that left only its heartbeat. The training lease says that it is over."""
    folder = session.config.folder
    beat = read_heartbeat(folder)
    if beat is None or any(end.start == beat.start for end in read_ends(folder)):
        return
    text = "this start left without a word: it was killed, or its host was lost"
    end = End(
        beat.start, beat.written, "host", 0, beat.ranks, beat.host, beat.step, FAILED, text, checkpoint=newest_step(folder)
    )
    record_end(folder, end)
