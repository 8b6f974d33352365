"""Figures of the report: their type, colours and axes, on light and dark pages."""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Colours that colour-blind people tell apart. Reference: Okabe and Ito 2008.
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK = "#7d858f"  # of axes and text: readable on white and on near-black
BEFORE, AFTER = ORANGE, BLUE  # pretraining


@dataclass(frozen=True)
class Picture:
    """A PNG with its texts; `name` is its file beside the report, `pixels` marks images rather than a chart."""

    name: str
    png: bytes
    title: str
    caption: str
    alt: str  # for readers who do not see the picture: its kind and its main values
    pixels: bool = False


@dataclass(frozen=True)
class ReportSection:
    """A heading with pictures, or a note in their place."""

    title: str
    lead: str = ""
    figures: tuple[Picture, ...] = ()
    note: str = ""

    @property
    def charts(self) -> bool:
        """True if the figures are small charts, side by side."""
        return not any(figure.pixels for figure in self.figures)


def chart(height: float = 2.45) -> tuple[Figure, Axes]:
    """A small figure with one pair of axes, as wide as a phone."""
    figure = Figure(figsize=(4.1, height), layout="constrained")
    return figure, figure.add_subplot()


def plain_axes(axes: Axes, x_label: str, y_label: str = "") -> None:
    """Two spines, a faint grid, few ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(axis="y", color=INK, alpha=0.22, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    axes.set_ylabel(y_label, fontsize=9, color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def legend(axes: Axes, columns: int = 2) -> None:
    """A legend above the axes."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=2.4,
        borderpad=0,
    )


def png(figure: Figure, dpi: int = 170) -> bytes:
    """The figure as PNG bytes with a transparent ground and no date in them: the same figure, the same bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, transparent=True, metadata={"Software": None})
    return buffer.getvalue()
