"""Metrics of the steps: losses of the global batch, speed, and advice if time is lost."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from clae_dist.contrast.step import StepMetrics
from clae_dist.cores import usable_cores
from clae_dist.data.loader import num_workers
from clae_dist.runs.goodput import Ledger
from clae_dist.tracking import Tracker
from clae_dist.tracking.console import WAITING
from clae_dist.training.bad_samples import BadSamples
from clae_dist.training.clock import Clock
from clae_dist.training.pace import Pace
from clae_dist.training.plan import Plan
from clae_dist.training.session import Session
from clae_dist.training.usage import Usage
from clae_dist.wording import count_of

GOODPUT_EVERY_S = 3600.0  # between lines about it on the console
MOST_WAIT = WAITING  # percent of the time for data, above which a run says what to change


PHASES = ("augmentation", "forward", "attack", "backward", "update", "diagnosis", "checkpoint")


class _Time:
    """Seconds of rank 0's training by phase. "forward" is without attacks, and has the losses."""

    def __init__(self) -> None:
        self._seconds, self._spent = 0.0, dict.fromkeys(("data", *PHASES), 0.0)
        self._memory_gib = 0.0

    def add(self, seconds: float, spent: Mapping[str, float], memory_gib: float) -> dict[str, float]:
        """Add `seconds`, of which `spent` are known, and the peak memory; returns metrics."""
        self._seconds, self._memory_gib = self._seconds + seconds, memory_gib
        for name in self._spent:
            self._spent[name] += spent.get(name, 0.0)
        shares = {f"{name}_share": 100 * spent.get(name, 0.0) / seconds for name in PHASES}
        return {**shares, "peak_memory_gib": memory_gib}

    def describe(self) -> str:
        """One line for the console, with the phases by size."""
        shares = {name: 100 * spent / max(self._seconds, 1e-9) for name, spent in self._spent.items()}
        shares["other"] = max(0.0, 100 - sum(shares.values()))
        sizes = sorted(shares.items(), key=lambda share: -share[1])
        parts = ", ".join(f"{name} {share:.0f} %" for name, share in sizes if share >= 0.5)
        return f"training time: {parts}; peak memory {self._memory_gib:.1f} GiB a rank"


class Journal:
    """Sends metrics to the tracker. `first_step`, `train_s`: number and duration of the steps of earlier starts."""

    def __init__(
        self,
        session: Session,
        plan: Plan,
        tracker: Tracker,
        bad: BadSamples,
        ledger: Ledger,
        usage: Usage,
        first_step: int,
        train_s: float,
    ) -> None:
        self._session, self._world, self._plan, self._tracker = session, session.world, plan, tracker
        self.ledger, self._said_goodput = ledger, time.monotonic()
        self._bad, self._usage = bad, usage
        self._time = _Time()
        self.clock = Clock(session.world.device)
        self.pace = Pace(session, self.clock, tracker.tag)
        self._started = time.perf_counter() - train_s
        self._logged = first_step
        self._lines, self._advised = 0, False
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}  # of the steps since the last line, and how many have a value
        self._last: dict[str, torch.Tensor] = {}  # values of the last step

    @property
    def train_s(self) -> float:
        """Seconds of training, over all starts of this run."""
        return time.perf_counter() - self._started

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log a line of metrics after `step` steps."""
        place = {"step": step, "epoch": step / self._plan.steps_per_epoch, "time_s": round(self.train_s, 3)}
        self._tracker.log({**place, **values}, self._plan.images_seen(step))

    def tag(self, name: str, text: str) -> None:
        """Set a tag on the tracking page."""
        self._tracker.tag(name, text)

    def add(self, metrics: StepMetrics) -> None:
        """Add a step's values, without synchronisation."""
        terms = {f"loss_{name}": value for name, value in metrics.terms.items()}
        values = {"loss": metrics.loss, **terms, "grad_norm": metrics.grad_norm}
        self._last = {f"{name}_step": value.detach().double() for name, value in values.items()}
        for name, value in {**values, **{f"{name}_mean": value for name, value in metrics.attack.items()}}.items():
            total, steps = self._sums.get(name, (torch.zeros_like(value, dtype=torch.float64), 0))
            self._sums[name] = total + value.detach().double(), steps + 1

    def steps(self) -> dict[str, float]:
        """Means over the ranks, since the last call. Collective.

        Returns:
            loss, loss_…, grad_norm: means over the steps that have the value; …_step: the last step's.
            delta_linf_mean, delta_l2_mean, attack_loss_before_mean: means over the steps with an attack.
        """
        values = {**{name: total / steps for name, (total, steps) in self._sums.items()}, **self._last}
        self._sums, self._last = {}, {}
        if not values:
            return {}
        means = self._world.mean(torch.stack(list(values.values())))
        return dict(zip(values, means.tolist(), strict=True))

    def speed(self, step: int) -> dict[str, float]:
        """Rates, shares (percent) of the time since the last call, and the largest memory of a rank. Collective."""
        seconds, spent = self.clock.read()
        own = spent["data"] = spent.get("data", 0.0) + spent.pop("copy", 0.0)
        waited = self._world.largest(100 * own / seconds)  # the others wait for the rank that waits
        self.ledger.move("training", "data", waited / 100 * seconds - own)
        self._advise(waited)
        use = self._time.add(seconds, spent, self._world.largest(self._usage.peak_memory_gib()))
        mfu = self._usage.mfu(self._logged, step, self._plan.steps_per_epoch, seconds)
        goodput = self.ledger.so_far()
        if time.monotonic() - self._said_goodput > GOODPUT_EVERY_S:
            self._said_goodput = time.monotonic()
            self._session.say(goodput.describe())
            self._session.say(self._time.describe())
        num_images = (step - self._logged) * self._session.config.batch.global_size
        self._logged = step
        return {
            "images_per_s": num_images / seconds,
            "data_wait_share": waited,
            **use,
            **({"mfu": mfu} if mfu is not None else {}),
            "goodput": goodput.shares["training"],
            **self.pace.metrics(),
            **({"bad_samples": float(len(self._bad.known))} if self._bad.known else {}),
        }

    def close(self, step: int) -> None:
        """Log the goodput of the run at the end of this start."""
        self.ledger.close()
        goodput = self.ledger.so_far()
        self.log(step, goodput.metrics())
        self._session.say(goodput.describe())
        if self._lines:
            self._session.say(self._time.describe())

    def _advise(self, waited: float) -> None:
        """Print advice once if the run waits for data; not in the first lines, while the loader starts."""
        self._lines += 1
        if waited > MOST_WAIT and self._lines > 2 and not self._advised:
            self._advised = True
            workers = num_workers(self._session.config, self._world.local_size)
            self._session.say(
                f"{waited:.0f} % of the time is spent waiting for data, more than {MOST_WAIT} %: more loader processes "
                f"(data.workers is {workers} a rank, this machine has {usable_cores()} cores for "
                f"{count_of(self._world.local_size, 'rank')}), or smaller images (`python -m data_prep … --resize short=256`); "
                "`clae bench data` measures a core's rate."
            )
