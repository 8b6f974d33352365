"""A tracker that sends to a slow or unreachable store from its own thread, so that no step waits for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from clae_dist.tracking.files import MetricsRows
from clae_dist.tracking.mlflow import MlflowStore
from clae_dist.tracking.tracker import MetricsRow, Refused, Say, Status, Tracker, brief

ROWS_AT_ONCE = 100


class _GaveUp(Exception):
    """The run has ended and the store is still unreachable."""


class BackgroundTracker(Tracker):
    """A Tracker that queues for a store, which is called from one thread only. Any exception of it but Refused is retried.

    Metrics wait in a queue of `capacity` rows; when it is full the oldest row is dropped and counted. Artifacts and the
    model are never dropped before the end. `close` waits at most `close_timeout_s`.

    Args:
        rows: logged before this process was started; sent first.
    """

    def __init__(
        self,
        store: MlflowStore,
        say: Say,
        *,
        images_seen: int = 0,
        rows: MetricsRows | Sequence[MetricsRow] = (),
        capacity: int = 10_000,
        close_timeout_s: float = 30.0,
        retry_s: float = 15.0,
    ) -> None:
        self._store, self._say, self._retry_s, self._close_timeout_s = store, say, retry_s, close_timeout_s
        self._rows: deque[MetricsRow] = deque()
        self._earlier, self._num_earlier = iter(rows), len(rows)  # of an earlier start; read when they are sent
        self._jobs: deque[tuple[str, Callable[[], None]]] = deque()
        self._taken_rows = 0  # taken from the queue by the thread and not finished
        self._taken_job: list[str] = []
        self._capacity = capacity
        self._lost_rows = 0
        self._lost_jobs: list[str] = []
        self._last_images_seen = images_seen
        self._status: Status | None = None
        self._unreachable = self._has_refused = False
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracking {store.address}", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        row = MetricsRow(dict(metrics), images_seen, int(time.time() * 1000))
        with self._changed:
            self._last_images_seen = images_seen
            if self._over.is_set() or len(self._rows) >= self._capacity:
                self._lost_rows += 1
                if self._over.is_set():
                    return
                self._rows.popleft()
            self._rows.append(row)
            self._changed.notify()

    def tag(self, name: str, text: str) -> None:
        self._add_job(f"tag {name}", lambda: self._store.set_tag(name, text))

    def log_artifacts(self, path: Path, name: str) -> None:
        self._add_job(name, lambda: self._store.log_artifacts(path, name))

    def log_model(self, export_folder: Path, digest: str) -> None:
        images_seen = self._last_images_seen
        self._add_job("encoder", lambda: self._store.log_model(export_folder, digest, images_seen))

    def close(self, status: Status) -> None:
        with self._changed:
            self._status = status
            self._changed.notify()
        if not self._over.wait(min(2.0, self._close_timeout_s)):
            with self._changed:
                waiting = self._num_earlier + len(self._rows) + len(self._jobs) + self._taken_rows + len(self._taken_job)
            self._say(f"{self._store.address}: sending the last {waiting} records (for {self._close_timeout_s:.0f} s at most)")
            self._over.wait(self._close_timeout_s - 2.0)
        with self._changed:
            rows = self._lost_rows + self._num_earlier + len(self._rows) + self._taken_rows
            jobs = [*self._lost_jobs, *self._taken_job, *(name for name, _ in self._jobs)]
        if rows or jobs:
            also = f" and {', '.join(jobs)}" if jobs else ""
            self._say(f"{self._store.address} did not get {rows} rows of metrics{also}; the run folder has all of it.")
        elif not self._over.is_set():
            self._say(f"{self._store.address} did not confirm the end of the run in time; the run folder has all of it.")

    def _add_job(self, name: str, job: Callable[[], None]) -> None:
        with self._changed:
            if self._over.is_set():
                self._lost_jobs.append(name)
            else:
                self._jobs.append((name, job))
                self._changed.notify()

    # ---- in the thread ----

    def _work(self) -> None:
        try:
            self._until_done(self._store.open)
            while self._send_next():
                pass
            status = self._status
            assert status is not None, "the loop ends when a status is set"
            self._until_done(lambda: self._store.close(status))
        except _GaveUp:
            pass  # `close` counts what is left in the queue
        except Refused as error:
            self._say(f"{self._store.address} refused this run ({error}); metrics.jsonl is still written.")
        finally:
            with self._changed:
                self._over.set()

    def _send_next(self) -> bool:
        """Send a part of the queue, after waiting for one. Returns False when the run has ended and the queue is empty."""
        earlier = list(islice(self._earlier, ROWS_AT_ONCE)) if self._num_earlier else []
        with self._changed:
            self._num_earlier = max(0, self._num_earlier - len(earlier)) if earlier else 0
            self._changed.wait_for(lambda: earlier or self._rows or self._jobs or self._status)
            rows = earlier or [self._rows.popleft() for _ in range(min(len(self._rows), ROWS_AT_ONCE))]
            name, job = ("", None) if rows or not self._jobs else self._jobs.popleft()
            self._taken_rows, self._taken_job = len(rows), [name] if name else []
        if not rows and job is None:
            return False
        try:
            self._until_done(job or (lambda: self._store.log_rows(rows)))
        except Refused as error:
            self._lose_taken()
            if not self._has_refused:
                self._has_refused = True
                self._say(f"{self._store.address} refused {name or 'metrics'} ({error}); it is missing there.")
        except _GaveUp:
            self._lose_taken()
            raise
        with self._changed:
            self._taken_rows, self._taken_job = 0, []
        return True

    def _lose_taken(self) -> None:
        with self._changed:
            self._lost_rows += self._taken_rows
            self._lost_jobs += self._taken_job
            self._taken_rows, self._taken_job = 0, []

    def _until_done(self, action: Callable[[], None]) -> None:
        """Retry until the store accepts it. Raises Refused for a rejection, _GaveUp if the run ends first."""
        while True:
            over = self._status is not None
            try:
                action()
            except Refused:
                raise
            except Exception as error:
                if not self._unreachable:
                    self._unreachable = True
                    self._say(
                        f"{self._store.address} is unreachable ({brief(error)}); the run continues and sends the rest later."
                    )
                if over:
                    raise _GaveUp from error
                with self._changed:
                    self._changed.wait_for(lambda: self._status is not None, timeout=self._retry_s)
                continue
            if self._unreachable:
                self._unreachable = False
                self._say(f"{self._store.address} is reachable again.")
            return
