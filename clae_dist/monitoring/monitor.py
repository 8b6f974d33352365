"""Compare windows of new embeddings with a reference, and raise an alarm when two in a row differ.

# R rows of the reference, M rows of the window, F width of the features
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from clae_dist.deploy.embedding import LOOKS
from clae_dist.deploy.window import Window, check_same_encoder
from clae_dist.errors import ConfigError
from clae_dist.monitoring.two_sample import (
    Finding,
    classifier_test,
    components_test,
    distance_test,
    distances,
    draw_members,
    kernel,
    look_test,
    median_distance,
    mmd2,
    mmd_test,
    witness,
)
from clae_dist.wording import count_of

DECIDING = ("mmd", "classifier")  # the tests that can raise the alarm
LEAST_REFERENCE, LEAST_WINDOW = 500, 50
GOOD_REFERENCE, GOOD_WINDOW = 2000, 300
_ROWS = 2000  # of a kernel matrix's sides, each
_MMD_DRAWS, _CLASSIFIER_DRAWS = 100, 10  # of windows of the reference itself, which calibrate the floors


@dataclass(frozen=True)
class Limits:
    """`alpha`: the p-value below which a test finds a difference. `seed` draws permutations, halves and subsets."""

    alpha: float = 0.01
    permutations: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Verdict:
    """A window's findings by test. `floors`: effects that parts of the reference itself reach. `moved` (M,): how much more
    a row is like the window than like the reference."""

    name: str
    rows: int
    findings: dict[str, Finding]
    floors: dict[str, float]
    moved: torch.Tensor

    def differs(self, test: str, alpha: float) -> bool:
        finding = self.findings[test]
        return finding.p < alpha and finding.effect > self.floors.get(test, -1.0)

    def suspects(self, alpha: float) -> list[str]:
        """The deciding tests that find a difference."""
        return [test for test in DECIDING if self.differs(test, alpha)]


class Monitor:
    """A reference that windows are compared with. One half of it fits components and is the bank of neighbours."""

    def __init__(self, reference: Window, limits: Limits) -> None:
        """Raises ConfigError for a reference of too few rows."""
        if len(reference) < LEAST_REFERENCE:
            raise ConfigError(
                f"the reference {reference.name!r} has {count_of(len(reference), 'row')}; give at least "
                f"{LEAST_REFERENCE}, better {GOOD_REFERENCE}."
            )
        self.reference, self.limits = reference, limits
        order = torch.randperm(len(reference), generator=self._generator())
        rows = reference.features[order]
        self._rows, self._bank, self._held = rows[:_ROWS], rows[::2], rows[1::2]
        self._held_distances = distances(self._bank, self._held)
        self._bandwidth = median_distance(self._rows)
        self._gram = kernel(self._rows.double(), self._bandwidth)
        self._floors: dict[int, dict[str, float]] = {}

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.limits.seed)

    def check(self, window: Window) -> Verdict:
        """Raises ConfigError for a window of another encoder, or of too few rows."""
        check_same_encoder(self.reference, window)
        if len(window) < LEAST_WINDOW:
            raise ConfigError(
                f"the window {window.name!r} has {count_of(len(window), 'row')}; give at least "
                f"{LEAST_WINDOW}, better {GOOD_WINDOW}."
            )
        generator = self._generator()
        features = window.features
        chosen = torch.randperm(len(features), generator=generator)[:_ROWS]
        part = features[chosen]
        findings = {
            "mmd": mmd_test(self._rows, part, self._bandwidth, self.limits.permutations, generator),
            "classifier": classifier_test(self._rows, part, generator),
            "components": components_test(self._bank, self._held, features),
            "distance": distance_test(self._held_distances, distances(self._bank, features)),
        }
        findings |= {
            name: look_test(self.reference.looks[name], values)
            for name, values in window.looks.items()
            if name in self.reference.looks
        }
        moved = witness(features, chosen, self._rows, self._bandwidth)
        return Verdict(window.name, len(window), findings, self._floors_of(len(part)), moved)

    def _floors_of(self, size: int) -> dict[str, float]:
        """The largest effects of draws of as many rows from the reference, at most half of it, against its other rows."""
        size = min(size, len(self._rows) // 2)
        if size not in self._floors:
            generator = self._generator()
            drawn = mmd2(self._gram, draw_members(len(self._rows), size, _MMD_DRAWS, generator))
            areas = []
            for _ in range(_CLASSIFIER_DRAWS):
                order = torch.randperm(len(self._rows), generator=generator)
                areas.append(classifier_test(self._rows[order[size:]], self._rows[order[:size]], generator).effect)
            self._floors[size] = {"mmd": float(drawn.max()), "classifier": max(areas)}
        return self._floors[size]


def check_different(reference: Window, windows: Sequence[Window]) -> None:
    """Raise ConfigError for files with the same rows: one window given twice would be two suspect windows in a row."""
    before = [reference]
    for window in windows:
        for other in before:
            if torch.equal(other.features, window.features):
                raise ConfigError(
                    f"{window.name!r} has the same rows as {other.name!r}; give the reference and each window once, the oldest "
                    "window first."
                )
        before.append(window)


def check_windows(monitor: Monitor, windows: Sequence[Window], say: Callable[[str], None]) -> Iterator[Verdict]:
    """The verdict of each window in order."""
    for window in windows:
        verdict = monitor.check(window)
        say(line_of(verdict, monitor.limits.alpha))
        yield verdict


def alarms(verdicts: Sequence[Verdict], alpha: float) -> list[str]:
    """The pairs of suspect windows in a row, with the tests that found them; no alarm if empty."""
    told = [(verdict, " and ".join(verdict.suspects(alpha))) for verdict in verdicts]
    return [
        f"{earlier.name} (by {before}), {later.name} (by {after})"
        for (earlier, before), (later, after) in pairwise(told)
        if before and after
    ]


def line_of(verdict: Verdict, alpha: float) -> str:
    """A verdict as text."""
    looks = [f"{name} p {verdict.findings[name].p:.2g}" for name in LOOKS if name in verdict.findings]
    mmd, area, components, distance = (verdict.findings[name] for name in ("mmd", "classifier", "components", "distance"))
    suspects = verdict.suspects(alpha)
    said = f"differs by {' and '.join(suspects)}" if suspects else "no difference that counts"
    return (
        f"{verdict.name}: {verdict.rows:,} rows: {said} (MMD² {mmd.effect:.2g}, p {mmd.p:.2g}; classifier AUROC "
        f"{area.effect:.3f}, p {area.p:.2g}; components p {components.p:.2g}; {100 * distance.effect:.1f} % beyond the "
        f"reference's 99 % distance, p {distance.p:.2g}{''.join(f'; {text}' for text in looks)})"
    )
