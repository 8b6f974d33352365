"""Names a slow rank. All ranks take equally long for a step, since each waits for the slowest: it is the one that never waits.

Each rank counts its own seconds by part of the step, without those in which it waited for others (`Clock.waiting`), and every
few seconds they are given to all ranks, beside the step. A rank is slow if, in a part, it takes longer than the others by a
share of the step that has lasted for `_NUM_WINDOWS` windows.

# K windows, W ranks, N numbers a rank: its seconds a step by part, then those of _EXTRAS
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from clae_dist.data.loader import LoadedBatch
from clae_dist.training.clock import Clock
from clae_dist.training.session import Session
from clae_dist.world import Shared

PARTS = ("data", "copy", "augmentation", "forward", "attack", "backward", "update", "other")
_EXTRAS = ("step", "reading", "decoding")  # of the loader processes: a batch's seconds
_WINDOW_S, _NUM_WINDOWS = 5.0, 8
_SLOW = 0.07  # of the step's time, that a rank takes longer
_STEADY = 7 / 8  # of the windows have at least half of it


@dataclass(frozen=True)
class Slow:
    """A rank that takes `seconds` a step for a part, where the others take `others_s`."""

    rank: int
    part: str
    seconds: float
    others_s: float
    price: float  # share of the step's time that the run would gain if the rank were as fast as the slowest other

    def describe(self, host: str) -> str:
        """One line for the console."""
        what = "everything outside of the step's parts" if self.part == "other" else self.part
        return (
            f"rank {self.rank} on {host} is slow: {what} takes {self.seconds:.3g} s a step, elsewhere {self.others_s:.3g} s; "
            f"without that, a step would be {100 * self.price:.0f} % shorter."
        )


class Pace:
    """Compares the paces of the ranks. `slow` is the slow rank, if any, on every rank. Collective."""

    def __init__(self, session: Session, clock: Clock, tag: Callable[[str, str], None]) -> None:
        self._session, self._world, self._clock, self._tag = session, session.world, clock, tag
        self._hosts = session.world.gather_objects(platform.node())
        self._windows: deque[torch.Tensor] = deque(maxlen=_NUM_WINDOWS)
        self._steps, self._window, self._warm = 0, 2, False
        self._reading_s = self._decoding_s = 0.0
        self._sent: Shared | None = None
        self.slow: Slow | None = None

    def step(self, batch: LoadedBatch) -> None:
        """Count a step that has been taken."""
        if self._world.size == 1:
            return
        self._steps += 1
        self._reading_s += batch.took.reading_s
        self._decoding_s += batch.took.decoding_s
        if self._sent is not None:
            rows_WN, self._sent = self._sent.heard(), None
            self._hear(rows_WN.double())
        elif self._steps >= self._window:
            seconds, spent = self._clock.lap()
            self._sent = self._world.share(self._row(seconds, spent))
            self._steps, self._reading_s, self._decoding_s = 0, 0.0, 0.0

    def metrics(self) -> dict[str, float]:
        """The number of the slow rank and its price in percent, if there is one."""
        return {"slow_rank": float(self.slow.rank), "slow_share": 100 * self.slow.price} if self.slow else {}

    def describe(self) -> str:
        """The line about the slow rank; "" without one."""
        return self.slow.describe(self._hosts[self.slow.rank]) if self.slow else ""

    def _row(self, seconds: float, spent: dict[str, float]) -> torch.Tensor:
        own = {name: spent.get(name, 0.0) for name in PARTS}
        if self._world.device.type == "cpu":  # a GPU's parts are beside the host's
            own["other"] = seconds - sum(spent.values())
        return torch.tensor([*own.values(), seconds, self._reading_s, self._decoding_s]) / self._steps

    def _hear(self, rows_WN: torch.Tensor) -> None:
        step_s = float(rows_WN[:, len(PARTS)].median())
        long_enough = self._window * step_s > _WINDOW_S / 2
        self._window = max(2, round(_WINDOW_S / max(step_s, 1e-6)))  # the same on all ranks
        if long_enough and self._warm:
            self._windows.append(rows_WN)
        self._warm = True
        if len(self._windows) == _NUM_WINDOWS:
            self._tell(find_slow(torch.stack(list(self._windows))))

    def _tell(self, now: Slow | None) -> None:
        before, self.slow = self.slow, now
        self._session.attempt.slow = self.describe()
        if now is not None and (before is None or (now.rank, now.part) != (before.rank, before.part)):
            self._session.say(self.describe())
            self._tag("slow_rank", self.describe())
        elif now is None and before is not None:
            self._session.say(f"rank {before.rank} on {self._hosts[before.rank]} is no longer slow.")
            self._tag("slow_rank", "none")


def find_slow(windows_KWN: torch.Tensor) -> Slow | None:
    """The rank and part that lose most, if they lose enough, for long enough."""
    own_KWP, step_K11 = windows_KWN[..., : len(PARTS)], windows_KWN[..., len(PARTS)].median(1).values[:, None, None]
    shares_KWP = (own_KWP - _others(own_KWP)) / step_K11
    lasting_WP = (shares_KWP > _SLOW / 2).double().mean(0) >= _STEADY
    shares_WP = torch.where(lasting_WP, shares_KWP.median(0).values, 0.0)
    if shares_WP.max() < _SLOW:
        return None
    rank, part = divmod(int(shares_WP.argmax()), len(PARTS))
    longest_KP = torch.cat([own_KWP[:, :rank], own_KWP[:, rank + 1 :]], 1).amax(1)
    price = ((own_KWP[:, rank] - longest_KP).clamp_min(0).sum(1) / step_K11[:, 0, 0]).median()
    name = PARTS[part]
    if name == "data":
        loader_KWE = windows_KWN[..., len(PARTS) + 1 :]
        name = _EXTRAS[1 + int((loader_KWE - _others(loader_KWE)).median(0).values[rank].argmax())]
    seconds, of_others = (float(values[:, rank, part].median()) for values in (own_KWP, _others(own_KWP)))
    return Slow(rank, name, seconds, of_others, float(price))


def _others(values_KWP: torch.Tensor) -> torch.Tensor:
    """For each rank, the median of the others."""
    ranks = range(values_KWP.shape[1])
    of_others = [values_KWP[:, [other for other in ranks if other != rank]].quantile(0.5, dim=1) for rank in ranks]
    return torch.stack(of_others, 1)
