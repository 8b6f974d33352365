"""Charts of the report: small matplotlib figures for light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from clae_dist.evaluation.protocol import headlines
from clae_dist.report import figures
from clae_dist.report.figures import BLUE, GREEN, PINK, VERMILION, Picture
from clae_dist.report.record import RunRecord

CLEAN, ADVERSARIAL = BLUE, VERMILION


@dataclass(frozen=True)
class ChartLine:
    key: str
    label: str
    colour: str
    style: str = "-"
    step_key: str = ""  # values of single steps, drawn thin beside the means of `key`; alone in a run that has no means


@dataclass(frozen=True)
class Chart:
    """One chart: a few logged keys over images seen."""

    name: str
    title: str
    note: str
    curves: tuple[ChartLine, ...]
    from_zero: bool = False
    otherwise: tuple[ChartLine, ...] = ()  # drawn if the run has logged none of `curves`


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "Between clean views, and between the clean and the adversarial view. "
        "Thick: mean of the steps since the last point; thin: single steps.",
        (
            ChartLine("loss_clean", "clean", CLEAN, step_key="loss_clean_step"),
            ChartLine("loss_adversarial", "adversarial", ADVERSARIAL, step_key="loss_adversarial_step"),
        ),
        otherwise=(ChartLine("loss", "all terms", GREEN, step_key="loss_step"),),
    ),
    Chart(
        "knn",
        "Accuracy while training, %",
        "While training: a part of the train split as bank, a part of the test split as queries.",
        (ChartLine("knn_accuracy", "kNN", GREEN, "o-"), ChartLine("linear_accuracy", "linear probe", PINK, "o--")),
        otherwise=(ChartLine("accuracy", "head", GREEN, "o-"), ChartLine("target_accuracy", "target", PINK, "o--")),
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
        "Of the global batch along the adversarial route: the gap is what the attack gains. "
        "Thick blue: mean of the steps since the last point; else single steps.",
        (
            ChartLine("attack_loss_before_mean", "before", CLEAN, step_key="attack_loss_before"),
            ChartLine("attack_loss_after", "after", ADVERSARIAL),
        ),
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
        "Mean over images: L2 norm in pixel values of [0, 1], L∞ in 255ths of them. "
        "Thick: mean of the steps since the last point; thin: single steps.",
        (
            ChartLine("delta_linf_mean", "L∞ · 255", ADVERSARIAL, step_key="delta_linf"),
            ChartLine("delta_l2_mean", "L2", CLEAN, step_key="delta_l2"),
        ),
        from_zero=True,
    ),
    Chart(
        "wrong_sign_share",
        "Wrong attack signs, %",
        "Share of pixel signs that one rank's own negatives alone would have got wrong.",
        (ChartLine("wrong_sign_share", "wrong signs", PINK),),
        from_zero=True,
    ),
    Chart(
        "alignment",
        "Alignment and uniformity",
        "Mean ‖a − b‖² of positives; log mean exp(−2‖a − b‖²) of negatives. Lower is better for both.",
        (ChartLine("alignment", "alignment", CLEAN), ChartLine("uniformity", "uniformity", GREEN)),
    ),
    Chart(
        "grad_norm",
        "Gradient norm",
        "Over all parameters, before clipping. Thick: mean of the steps since the last point; thin: single steps.",
        (ChartLine("grad_norm", "gradient norm", CLEAN, step_key="grad_norm_step"),),
        from_zero=True,
    ),
    Chart("speed", "Images per second", "All ranks together.", (ChartLine("images_per_s", "images/s", CLEAN),), from_zero=True),
    Chart(
        "shares",
        "Where the time goes, %",
        "Share of the time of training. Forward is without the attack.",
        (
            ChartLine("attack_share", "attack", ADVERSARIAL),
            ChartLine("data_wait_share", "waiting for data", CLEAN),
            ChartLine("forward_share", "forward", GREEN),
            ChartLine("backward_share", "backward", PINK),
        ),
        from_zero=True,
    ),
)


Series = tuple[list[float], list[float]]  # images seen, values


def _logged(record: RunRecord, curves: Sequence[ChartLine]) -> list[tuple[ChartLine, Series, Series]]:
    """Lines that the run has values of: its main series, and that of single steps where it has both and they differ."""
    lines = []
    for curve in curves:
        main, steps = record.metrics.series(curve.key), record.metrics.series(curve.step_key or curve.key)
        lines.append((curve, main, steps) if main[0] and steps != main else (curve, main if main[0] else steps, ([], [])))
    return [line for line in lines if line[1][0]]


def draw_chart(record: RunRecord, chart: Chart) -> Picture | None:
    """The chart as a picture, or None where the run has logged none of its keys."""
    lines = _logged(record, chart.curves) or _logged(record, chart.otherwise)
    if not lines:
        return None
    figure, axes = figures.chart()
    for curve, main, steps in lines:
        axes.plot(steps[0], _scaled(curve, steps[1]), "-", marker=".", markersize=3, color=curve.colour, alpha=0.55, lw=0.6)
        _draw_main(axes, curve, main, width=2.4 if steps[0] else 1.7)
    series = [(curve, *main) for curve, main, _ in lines]
    if chart.name == "knn":
        _mark_evaluation(axes, record)
    if chart.from_zero:
        axes.set_ylim(bottom=0, top=None if any(any(y) for _, _, y in series) else 1)
    images_axes(axes)
    labelled = len(axes.get_legend_handles_labels()[0])
    if labelled > 1:
        figures.legend(axes, columns=2 if len(series) > 2 else labelled)
    values = [(curve.label, _scaled(curve, y)) for curve, _, y in series]
    texts = [f"{label} from {y[0]:.4g} to {y[-1]:.4g}" for label, y in values]
    alt = f"Line chart over images seen: {'; '.join(texts)}."
    return Picture(chart.name, figures.png(figure), chart.title, chart.note, alt)


def _draw_main(axes: Axes, curve: ChartLine, series: Series, width: float) -> None:
    marker = "o" if "o" in curve.style or len(series[0]) == 1 else None
    style, values = curve.style.replace("o", ""), _scaled(curve, series[1])
    axes.plot(series[0], values, style, marker=marker, markersize=4, color=curve.colour, label=curve.label, lw=width)


def _scaled(curve: ChartLine, values: list[float]) -> list[float]:
    return [255 * value for value in values] if curve.key == "delta_linf_mean" else values


def _mark_evaluation(axes: Axes, record: RunRecord) -> None:
    """Mark the result of `clae evaluate` beside those on subsets of the splits."""
    evaluation = record.evaluation or {}
    if after := headlines(evaluation.get("results", {}), "knn").get("after"):
        point = [evaluation["images_seen"]], [after.value]
        axes.plot(*point, linestyle="none", marker="D", markersize=6, color=ADVERSARIAL, label="evaluation, all test images")


def images_axes(axes: Axes) -> None:
    """Plain axes with the number of images seen below."""
    figures.plain_axes(axes, "images seen")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))


def short(count: float) -> str:
    """12_500_000 as 12.5 M."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def missing_keys(record: RunRecord, charts: Sequence[Chart]) -> list[str]:
    """Titles of the charts that this run has no values for."""
    return [chart.title for chart in charts if not (_logged(record, chart.curves) or _logged(record, chart.otherwise))]
