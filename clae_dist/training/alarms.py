"""Alarms while a run trains: collapsed embeddings, and attacks that do nothing.

They judge the measurements of contrast/diagnostics.py, which are the same on every rank: nothing here is collective. A
cause is raised when two measurements in a row show it, the untrained network's not counted. Besides every
train.diagnose_every steps, a run of 50 steps or more is measured after 2 % and 4 % of its steps, so that a run that is lost
from its start is named before 5 % of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from clae_dist.config import Config

Seen = Mapping[str, float]

COLLAPSED_SPREAD = 1e-3  # 1 - mean cosine of different images: below, embeddings are nearly equal
COLLAPSED_RANK = 1.5  # RankMe: below, embeddings lie on a line
FALLEN_SPREAD, FALLEN_RANK = 0.02, 4.0  # below, after a fall since the first measurement of this start …
FALL_OF_SPREAD, FALL_OF_RANK = 10.0, 3.0  # … by these factors, training has destroyed the embeddings
RECOVERING = 1.05  # growth of spread or rank since the measurement before, above which there is no collapse
SMALLEST_RISE = 1e-4  # of the loss by the attack, in nats
AS_MUCH = 0.8  # of the attack's rise: noise that reaches it is as good as the attack
ZERO_SHARE = 90.0  # percent of pixels whose gradient is exactly zero
EARLY = (0.02, 0.04)  # shares of the run
FEWEST_STEPS = 50  # of a run, for early measurements


class Alarms:
    """Prints a line for each cause, once per start, and sets the tag `alarm.NAME` on the tracking page."""

    def __init__(self, config: Config, total: int, say: Callable[[str], None], tag: Callable[[str, str], None]) -> None:
        self._config, self._say, self._tag = config, say, tag
        self._on = config.guard.alarms
        self._early = {round(share * total) for share in EARLY} if self._on and total >= FEWEST_STEPS else set()
        self._first: Seen = {}
        self._before: Seen = {}
        self._suspected: set[str] = set()
        self._raised: set[str] = set()

    def due(self, step: int) -> bool:
        """True if a measurement is needed after `step` steps in addition to those of train.diagnose_every."""
        return step in self._early

    def judge(self, step: int, seen: Seen) -> dict[str, float]:
        """Metrics {"alarm_NAME": 1.0} of the causes that this measurement and the one before it show."""
        if not (self._on and seen):
            return {}
        self._first = self._first or seen
        causes = self._causes(seen) if step else {}
        shown = {name: text for name, text in causes.items() if name in self._suspected}
        self._suspected, self._before = set(causes), seen
        for name, text in shown.items():
            if name not in self._raised:
                self._raised.add(name)
                self._tag(f"alarm.{name}", f"step {step}: {text}")
                self._say(f"ALARM {name.replace('_', ' ')} at step {step}: {text} (guard.alarms=false turns alarms off)")
        return {f"alarm_{name}": 1.0 for name in shown}

    def _causes(self, seen: Seen) -> dict[str, str]:
        causes = {"collapse": self._collapse(seen), **self._attack(seen)}
        return {name: text for name, text in causes.items() if text}

    def _collapse(self, seen: Seen) -> str:
        spread, rank = _spread(seen), seen.get("rank_me", float("inf"))
        recovering = spread > RECOVERING * _spread(self._before)
        narrow = spread < COLLAPSED_SPREAD and not recovering
        on_a_line = rank < COLLAPSED_RANK and not rank > RECOVERING * self._before.get("rank_me", float("inf"))
        fallen = not recovering and spread < min(FALLEN_SPREAD, _spread(self._first) / FALL_OF_SPREAD)
        fallen = fallen and rank < min(FALLEN_RANK, self._first.get("rank_me", 0.0) / FALL_OF_RANK)
        if not (narrow or on_a_line or fallen):
            return ""
        optim = self._config.optim
        return (
            f"embeddings of different images are nearly the same (mean cosine {1 - spread:.5f}, effective rank {rank:.2f}, "
            f"uniformity {seen['uniformity']:.4f}), and the encoder learns nothing more. Start again with a lower rate, "
            f"such as optim.learning_rate={optim.learning_rate / 10:g} (now {optim.learning_rate:g}), or a longer warm-up "
            f"(optim.warmup_epochs is {optim.warmup_epochs:g}); a loss of your own needs negatives."
        )

    def _attack(self, seen: Seen) -> dict[str, str]:
        if "attack_loss_before" not in seen:
            return {}
        before, after = seen["attack_loss_before"], seen["attack_loss_after"]
        zero, noisy = seen["zero_gradient_share"], seen.get("attack_loss_noise", float("-inf"))
        without = "method.name=simclr trains without an attack and costs less"
        if zero > ZERO_SHARE:
            return {
                "masked_attack": f"the attack's gradient is exactly zero in {zero:.1f} % of the pixels, so an operation "
                "between pixels and loss blocks it (rounding, quantised inputs, a detached tensor). Remove that operation from "
                f"the encoder or the loss; otherwise {without}."
            }
        if after - before < SMALLEST_RISE:
            epsilon, unit = self._config.attack.epsilon, self._config.attack.unit
            return {
                "useless_attack": f"the attack does not raise the loss ({before:.5f} before it, {after:.5f} after it), so the "
                f"adversarial view trains nothing. Use a larger attack.epsilon, such as 8/255 with attack.unit=pixel (now "
                f"{epsilon:g}, {unit}), or attack.name=pgd with a smaller attack.step_size; if the loss stands still, a lower "
                f"optim.learning_rate (now {self._config.optim.learning_rate:g}); otherwise {without}."
            }
        if noisy - before >= AS_MUCH * (after - before):
            return {
                "masked_attack": f"random noise of the attack's size raises the loss as much as the attack ({before:.5f} to "
                f"{noisy:.5f}, attack {after:.5f}): the gradient does not point to where the loss rises. Remove rounding or "
                f"quantisation of the inputs, or use attack.name=pgd attack.random_start=true; otherwise {without}."
            }
        return {}


def _spread(seen: Seen) -> float:
    """1 - mean cosine of embeddings of different images; infinite where it was not measured."""
    return 1 - seen["cos_negative_mean"] if "cos_negative_mean" in seen else float("inf")
