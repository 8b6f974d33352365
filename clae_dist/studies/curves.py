"""Learning curves of a study against their cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from clae_dist.report.curves import images_axes
from clae_dist.report.figures import BLUE, GREEN, INK, ORANGE, PINK, SKY, VERMILION, legend, png
from clae_dist.studies.results import CellResult

# A colour, a marker and a line style of each method.
_STYLES = tuple(
    zip(
        (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, INK),
        ("o", "s", "^", "D", "v", "P", "X"),
        ("-", "--", "-.", ":", "-", "--", "-."),
        strict=True,
    )
)


def draw_curves(results: Sequence[CellResult], methods: Sequence[str], in_passes: bool) -> Iterator[tuple[str, bytes]]:
    """Title and PNG of the kNN accuracy over encoder passes or images: the mean over seeds, and the range as a band."""
    figure = Figure(figsize=(4.1, 3.3), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate(methods):
        curves = [result.curve for result in results if result.cell.method == method and result.curve[0]]
        if not curves:
            continue
        colour, marker, line = _STYLES[number % len(_STYLES)]
        length = min(len(x) for x, _ in curves)
        x, y = np.array(curves[0][0][:length]), np.array([accuracies[:length] for _, accuracies in curves])
        axes.plot(x, y.mean(0), line, color=colour, marker=marker, markersize=4, lw=1.7, label=method)
        axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
    if not axes.get_lines():
        return
    images_axes(axes)
    axes.set_xlabel("encoder passes" if in_passes else "images seen", fontsize=9, color=INK)
    legend(axes)
    yield "kNN accuracy while training, %", png(figure)
