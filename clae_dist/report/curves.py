"""Charts of the report: small matplotlib figures for light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from clae_dist.evaluation.protocol import headlines
from clae_dist.report.record import RunRecord

CLEAN, ADVERSARIAL, THIRD, FOURTH = "#3b82b8", "#d9653b", "#4e9f75", "#9a7fc0"
INK = "#7d858f"  # of axes and text: readable on white and on near-black
RIGHT, WRONG = "#4e9f75", "#d9653b"


@dataclass(frozen=True)
class ChartLine:
    key: str
    label: str
    colour: str
    style: str = "-"


@dataclass(frozen=True)
class Chart:
    """One chart: a few logged keys over images seen."""

    name: str
    title: str
    note: str
    curves: tuple[ChartLine, ...]
    from_zero: bool = False


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "Contrast between clean views, and between the clean and the adversarial view.",
        (ChartLine("loss_clean", "clean", CLEAN), ChartLine("loss_adversarial", "adversarial", ADVERSARIAL)),
    ),
    Chart(
        "knn",
        "kNN accuracy, %",
        "While training: a part of the train split as bank, a part of the test split as queries.",
        (ChartLine("knn_accuracy", "kNN", THIRD, "o-"),),
    ),
    Chart(
        "learning_rate",
        "Learning rate",
        "Warm-up, then the schedule.",
        (ChartLine("learning_rate", "learning rate", CLEAN),),
        from_zero=True,
    ),
    Chart(
        "attack_loss",
        "Loss before and after the attack",
        "Of the global batch along the adversarial route: the gap is what the attack gains.",
        (ChartLine("attack_loss_before", "before", CLEAN), ChartLine("attack_loss_after", "after", ADVERSARIAL)),
    ),
    Chart(
        "cos_positive",
        "Cosine of positives",
        "Of two clean views of an image, and of a view and the adversarial image.",
        (ChartLine("cos_positive", "clean", CLEAN), ChartLine("cos_positive_adversarial", "adversarial", ADVERSARIAL)),
    ),
    Chart(
        "cos_negative",
        "Cosine of negatives",
        "Mean (solid) and hardest of the global batch (dashed).",
        (
            ChartLine("cos_negative_mean", "mean, clean", CLEAN),
            ChartLine("cos_negative_mean_adversarial", "mean, adversarial", ADVERSARIAL),
            ChartLine("cos_negative_hardest", "hardest, clean", CLEAN, "--"),
            ChartLine("cos_negative_hardest_adversarial", "hardest, adversarial", ADVERSARIAL, "--"),
        ),
    ),
    Chart(
        "delta",
        "Size of the perturbation δ",
        "Mean over images: L2 norm in pixel values of [0, 1], L∞ in 255ths of them.",
        (ChartLine("delta_linf", "L∞ · 255", ADVERSARIAL), ChartLine("delta_l2", "L2", CLEAN)),
        from_zero=True,
    ),
    Chart(
        "wrong_sign_share",
        "Wrong attack signs, %",
        "Share of pixel signs that one rank's own negatives alone would have got wrong.",
        (ChartLine("wrong_sign_share", "wrong signs", FOURTH),),
        from_zero=True,
    ),
    Chart(
        "alignment",
        "Alignment and uniformity",
        "Mean ‖a − b‖² of positives; log mean exp(−2‖a − b‖²) of negatives. Lower is better for both.",
        (ChartLine("alignment", "alignment", CLEAN), ChartLine("uniformity", "uniformity", THIRD)),
    ),
    Chart(
        "grad_norm",
        "Gradient norm",
        "Over all parameters, before clipping.",
        (ChartLine("grad_norm", "gradient norm", CLEAN),),
        from_zero=True,
    ),
    Chart("speed", "Images per second", "All ranks together.", (ChartLine("images_per_s", "images/s", CLEAN),), from_zero=True),
    Chart(
        "shares",
        "Where the time goes, %",
        "Share of a step spent waiting for data and attacking.",
        (ChartLine("attack_share", "attack", ADVERSARIAL), ChartLine("data_wait_share", "waiting for data", CLEAN)),
        from_zero=True,
    ),
)


def draw_chart(record: RunRecord, chart: Chart) -> bytes | None:
    """The chart as PNG bytes, or None where the run has logged none of its keys."""
    series = [(curve, *record.metrics.series(curve.key)) for curve in chart.curves]
    series = [(curve, x, y) for curve, x, y in series if x]
    if not series:
        return None
    figure = Figure(figsize=(4.1, 2.45), layout="constrained")
    axes = figure.add_subplot()
    for curve, x, y in series:
        scale = 255 if curve.key == "delta_linf" else 1
        marker = "o" if "o" in curve.style or len(x) == 1 else None
        line = curve.style.replace("o", "")
        axes.plot(x, [scale * v for v in y], line, marker=marker, markersize=4, color=curve.colour, label=curve.label, lw=1.7)
    if chart.name == "knn":
        _mark_evaluation(axes, record)
    if chart.from_zero:
        axes.set_ylim(bottom=0, top=None if any(any(y) for _, _, y in series) else 1)
    plain_axes(axes)
    if len(axes.get_lines()) > 1:
        _legend(axes, columns=2 if len(series) > 2 else len(axes.get_lines()))
    return png(figure)


def _mark_evaluation(axes: Axes, record: RunRecord) -> None:
    """Mark the result of `clae evaluate` beside those on subsets of the splits."""
    evaluation = record.evaluation or {}
    if after := headlines(evaluation.get("results", {}), "knn").get("after"):
        point = [evaluation["images_seen"]], [after.value]
        axes.plot(*point, linestyle="none", marker="D", markersize=6, color=ADVERSARIAL, label="evaluation, all test images")


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.6,
        borderpad=0,
    )


def plain_axes(axes: Axes) -> None:
    """Two spines, a faint grid, images seen below."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(axis="y", color=INK, alpha=0.22, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    axes.set_xlabel("images seen", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def short(count: float) -> str:
    """12_500_000 as 12.5 M."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def png(figure: Figure, dpi: int = 170) -> bytes:
    """The figure as PNG bytes with a transparent ground and no date in them: the same figure, the same bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def missing_keys(record: RunRecord, charts: Sequence[Chart]) -> list[str]:
    """Titles of the charts that this run has no values for."""
    return [chart.title for chart in charts if not any(record.metrics.series(curve.key)[0] for curve in chart.curves)]
