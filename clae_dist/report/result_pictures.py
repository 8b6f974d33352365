"""Pictures of evaluation results. DRAWINGS is the only list of protocols in the report; others have their table alone.

evaluation.json may come from elsewhere: a drawing yields nothing for values that cannot be meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clae_dist.escape import shown
from clae_dist.evaluation.interval import wilson_interval
from clae_dist.evaluation.protocol import WHEN
from clae_dist.report.figures import AFTER, BEFORE, BLUE, GREEN, INK, VERMILION, chart, legend, plain_axes

LOOKS = {"before": (BEFORE, "--", "s", "untrained"), "after": (AFTER, "-", "o", "pretrained")}
_MOST_KINDS, _MOST_SEVERITIES, _MOST_BINS = 30, 10, 200
_LEAST_IMAGES = 10  # of a point in a reliability diagram


@dataclass(frozen=True)
class ProtocolResult:
    """The entry of one protocol in evaluation.json."""

    name: str
    title: str
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # metric → before or after → value
    details: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)  # before or after → name → values
    settings: Mapping[str, Any] = field(default_factory=dict)

    def values(self, when: str, name: str) -> list[float]:
        """A list of the details, [] without it."""
        return self.details.get(when, {}).get(name, [])

    def percent(self, metric: str, when: str) -> float | None:
        """A metric, None without it or outside of 0 to 100."""
        value = self.metrics.get(metric, {}).get(when)
        return value if value is not None and 0 <= value <= 100 else None


@dataclass(frozen=True)
class Drawing:
    """A figure with its texts."""

    figure: Figure
    title: str
    caption: str
    alt: str


def draw_robust(result: ProtocolResult) -> Iterator[Drawing]:
    """Accuracy of each attacked classifier against ε, with the 95 % interval as a band."""
    largest = result.settings.get("epsilon")
    bound = 255 * largest if isinstance(largest, (int, float)) and 0 < largest <= 1 else None
    for head in dict.fromkeys(name.removesuffix("_clean") for name in result.metrics if name.endswith("_clean")):
        figure, axes = chart(3.0)
        texts = []
        for when in WHEN:
            points = list(_against_epsilon(result, head, when, bound))
            if len(points) > 1:
                _band(axes, points, when)
                texts.append(f"{LOOKS[when][3]} {', '.join(f'{y:.1f} % at ε = {x:.3g}' for x, y, *_ in points)}")
        if not texts:
            continue
        strongest = _mark_attacks(axes, result, head, bound) if bound else ""
        plain_axes(axes, "ε · 255 (L∞)", "accuracy, %")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        legend(axes)
        masked = any(result.metrics.get(f"{head}_masked", {}).values())
        warning = " The gradients may be masked, so that the true accuracy may be lower." if masked else ""
        caption = f"Curve: PGD at several ε, and clean images at 0; the band is the 95 % interval.{strongest}{warning}"
        yield Drawing(figure, f"{head.upper()}: accuracy against ε", caption, f"Line chart: {'; '.join(texts)}.")


def _against_epsilon(
    result: ProtocolResult, head: str, when: str, bound: float | None
) -> Iterator[tuple[float, float, float, float]]:
    """ε in 255ths, accuracy and both ends of its interval, in ascending order of ε."""
    metrics = {0.0: f"{head}_clean"}
    for name in result.metrics:
        if at := re.fullmatch(re.escape(head) + r"_pgd_at_(\d{1,3}(\.\d{1,6})?)", name):
            metrics[float(at[1])] = name
    if bound:
        metrics[bound] = f"{head}_pgd"
    for epsilon, name in sorted(metrics.items()):
        value, low, high = (result.percent(name + end, when) for end in ("", "_low", "_high"))
        if value is not None:
            yield epsilon, value, value if low is None else low, value if high is None else high


def _band(axes: Axes, points: Sequence[tuple[float, float, float, float]], when: str) -> None:
    colour, line, marker, label = LOOKS[when]
    x, y, low, high = zip(*points, strict=True)
    axes.plot(x, y, line, color=colour, marker=marker, markersize=4, lw=1.7, label=f"{label}, PGD")
    axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)


def _mark_attacks(axes: Axes, result: ProtocolResult, head: str, bound: float) -> str:
    """Mark the attacks that run at one ε alone; a clause for the caption."""
    names = []
    for attack, label, marker, colour in (("fgsm", "FGSM", "^", GREEN), ("autoattack", "AutoAttack", "D", VERMILION)):
        value = result.percent(f"{head}_{attack}", "after")
        if value is not None:
            axes.plot([bound], [value], marker, color=colour, markersize=6, label=f"pretrained, {label}", zorder=3)
            names.append(f"{label} {value:.1f} %")
    return f" At ε = {bound:.3g}/255: {', '.join(names)}." if names else ""


def draw_calibration(result: ProtocolResult) -> Iterator[Drawing]:
    """Reliability diagrams, without and with temperature scaling."""
    for prefix, title in (("", "Reliability"), ("scaled_", "Reliability after temperature scaling")):
        figure, axes = chart(3.3)
        axes.plot([0, 100], [0, 100], color=INK, lw=1, label="perfect")
        texts = []
        for when in WHEN:
            bins = _bins(result, when, prefix)
            if not len(bins):
                continue
            colour, line, marker, label = LOOKS[when]
            counts, confidence, accuracy = bins.T
            ends = np.array([wilson_interval(p, int(n)) for p, n in zip(accuracy, counts, strict=True)])
            errors = np.abs(ends.T - accuracy)
            axes.plot(confidence, accuracy, line, color=colour, marker=marker, markersize=4, lw=1.5, label=label)
            axes.errorbar(confidence, accuracy, errors, fmt="none", ecolor=colour, elinewidth=0.9)
            gap = np.average(accuracy - confidence, weights=counts)
            texts.append(f"{label} {abs(gap):.1f} points {'above' if gap > 0 else 'below'} the diagonal on average")
        if not texts:
            continue
        plain_axes(axes, "confidence, %", "accuracy, %")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        legend(axes, 3)
        caption = (
            "Below the diagonal, the classifier is too confident. Bars: 95 % intervals of the bins; a bin needs 10 images."
        )
        yield Drawing(figure, title, caption, f"Accuracy against confidence: {'; '.join(texts)}.")


def _bins(result: ProtocolResult, when: str, prefix: str) -> np.ndarray:
    """(bins with _LEAST_IMAGES, 3): images, confidence and accuracy in percent."""
    names = ("images", "confidence", "accuracy")
    columns = [result.values(when, prefix + name) for name in names]
    if not 0 < len(columns[0]) == len(columns[1]) == len(columns[2]) <= _MOST_BINS:
        return np.empty((0, 3))
    bins = np.array(columns, float).T
    if bins.min() < 0 or bins[:, 1:].max() > 1 or bins[:, 0].max() > 1e12:
        return np.empty((0, 3))
    bins = bins[bins[:, 0] >= _LEAST_IMAGES]
    return bins * [1, 100, 100]


def draw_corruptions(result: ProtocolResult) -> Iterator[Drawing]:
    """Heat maps of accuracy, kinds × severities, on one scale."""
    maps = {when: _map(result.details.get(when, {})) for when in WHEN}
    drawn = [accuracy for accuracy in maps.values() if len(accuracy)]
    lowest, highest = min((one.min() for one in drawn), default=0), max((one.max() for one in drawn), default=0)
    for when, accuracy in maps.items():
        if not len(accuracy):
            continue
        kinds = [shown(kind)[:24].replace("_", " ") for kind in result.details[when]]
        figure, axes = chart(0.9 + 0.24 * len(kinds))
        axes.imshow(accuracy, cmap="cividis", vmin=lowest, vmax=max(highest, lowest + 1), aspect="auto")
        for (row, column), value in np.ndenumerate(accuracy):
            colour = "white" if value < (lowest + highest) / 2 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_yticks(range(len(kinds)), kinds, parse_math=False)
        axes.set_xticks(range(accuracy.shape[1]), [str(severity + 1) for severity in range(accuracy.shape[1])])
        axes.tick_params(colors=INK, labelsize=9, length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("severity", fontsize=9, color=INK)
        worst, best = (kinds[int(index)] for index in (accuracy.mean(1).argmin(), accuracy.mean(1).argmax()))
        label = LOOKS[when][3]
        alt = f"Heat map of {len(kinds)} corruptions: mean {accuracy.mean():.1f} %, lowest for {worst}, highest for {best}."
        yield Drawing(figure, f"Accuracy in %, {label} encoder", "Dark is low; both maps have one scale.", alt)


def _map(details: Mapping[str, list[float]]) -> np.ndarray:
    """(kinds, severities) in percent, empty for values that cannot be drawn."""
    lengths = {len(values) for values in details.values()}
    if len(lengths) != 1 or not 0 < next(iter(lengths)) <= _MOST_SEVERITIES or len(details) > _MOST_KINDS:
        return np.empty((0, 0))
    accuracy = np.array(list(details.values()), float)
    return accuracy if accuracy.min() >= 0 and accuracy.max() <= 100 else np.empty((0, 0))


def draw_ood(result: ProtocolResult) -> Iterator[Drawing]:
    """Histograms of the scores of the pretrained encoder, test images against foreign ones."""
    for name in result.details.get("after", {}):
        key = name.removesuffix("_edges")
        edges, *shares = (np.array(result.values("after", f"{key}_{part}"), float) for part in ("edges", "inside", "outside"))
        if key == name or not _is_histogram(edges, shares):
            continue
        figure, axes = chart()
        for share, (colour, line, label) in zip(
            shares, ((BLUE, "-", "test images"), (VERMILION, "--", "foreign")), strict=True
        ):
            axes.stairs(100 * share, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(100 * share, edges, color=colour, linestyle=line, lw=1.5, label=label)
        plain_axes(axes, "score: larger is more foreign", "images, %")
        legend(axes)
        area = {when: result.percent(f"{key}_auroc", when) for when in WHEN}
        texts = [f"{LOOKS[when][3]} {value:.1f} %" for when, value in area.items() if value is not None]
        caption = f"Area under the ROC curve: {', '.join(texts)}; 50 % is chance." if texts else ""
        means = [float((share * (edges[1:] + edges[:-1]) / 2).sum() / max(share.sum(), 1e-12)) for share in shares]
        alt = f"Two histograms: test images have a mean score of {means[0]:.3g}, foreign images of {means[1]:.3g}."
        yield Drawing(figure, key.replace("_", " "), caption, alt)


def _is_histogram(edges: np.ndarray, shares: Sequence[np.ndarray]) -> bool:
    if not 2 <= len(edges) <= _MOST_BINS or any(len(share) != len(edges) - 1 for share in shares):
        return False
    ascending = bool((np.diff(edges) > 0).all()) and float(np.abs(edges).max()) < 1e30
    return ascending and all(share.min() >= 0 and share.max() <= 1 for share in shares)


DRAWINGS: Mapping[str, Callable[[ProtocolResult], Iterator[Drawing]]] = {
    "robust": draw_robust,
    "calibration": draw_calibration,
    "corruptions": draw_corruptions,
    "ood": draw_ood,
}
