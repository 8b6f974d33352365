"""The report's pages of images: adversarial triples and nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from clae_dist.escape import shown
from clae_dist.report.attacked import AttackedImages, amplification
from clae_dist.report.figures import GREEN, INK, VERMILION, png

NUM_TRIPLES = 8
LONGEST_LABEL = 12


class Frame(NamedTuple):
    """A frame of an image; the line style carries the meaning without the colour."""

    colour: str
    style: Literal["-", ":"]


RIGHT, WRONG, UNKNOWN = Frame(GREEN, "-"), Frame(VERMILION, ":"), Frame(INK, "-")


def draw_triples(attacked: AttackedImages) -> bytes:
    """Rows clean, perturbation (amplified around grey) and adversarial, one column per image. PNG bytes."""
    count, factor = min(NUM_TRIPLES, len(attacked.clean)), amplification(attacked)
    delta = attacked.adversarial - attacked.clean
    rows = (("clean", attacked.clean), (f"δ × {factor}", 0.5 + factor * delta), ("adversarial", attacked.adversarial))
    tight = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=(1.05 * count + 0.45, 3.3), layout=tight)
    for r, (name, images) in enumerate(rows):
        for c in range(count):
            axes = figure.add_subplot(3, count, r * count + c + 1)
            _show(axes, images[c])
            if c == 0:
                axes.set_ylabel(name, fontsize=9, color=INK)
    return png(figure)


def draw_neighbours(
    queries: Sequence[Mapping[str, Any]],
    query_images: torch.Tensor,
    neighbour_images: Sequence[torch.Tensor],
    classes: Sequence[str],
) -> bytes:
    """One row per test image: the image, then its nearest train images in frames that show if the class is right. PNG."""
    columns = 1 + max(len(images) for images in neighbour_images)
    figure = Figure(figsize=(1.06 * columns + 0.25, 1.22 * len(queries)))
    grid = figure.add_gridspec(
        len(queries),
        columns + 1,
        width_ratios=[1, 0.22, *[1] * (columns - 1)],
        wspace=0.08,
        hspace=0.28,
        left=0.01,
        right=0.99,
        top=0.97,
        bottom=0.02,
    )
    for r, query in enumerate(queries):
        axes = figure.add_subplot(grid[r, 0])
        _show(axes, query_images[r].float() / 255)
        axes.set_title(
            _class_name(classes, query["label"]), fontsize=8.5, color=INK, fontweight="bold", pad=3, parse_math=False
        )
        for c, label in enumerate(query["neighbour_labels"]):
            axes = figure.add_subplot(grid[r, c + 2])
            known = label >= 0 and query["label"] >= 0
            frame = (RIGHT if label == query["label"] else WRONG) if known else UNKNOWN
            _show(axes, neighbour_images[r][c].float() / 255, frame)
            axes.set_title(_class_name(classes, label), fontsize=7.5, color=frame.colour, pad=3, parse_math=False)
    return png(figure)


def _class_name(classes: Sequence[str], label: int) -> str:
    name = shown(classes[label]) if 0 <= label < len(classes) else "no class"
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def _show(axes: Axes, image_3SS: torch.Tensor, frame: Frame | None = None) -> None:
    axes.imshow(image_3SS.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(frame is not None)
        spine.set_linewidth(2.4)
        if frame:
            spine.set_color(frame.colour)
            spine.set_linestyle(frame.style)


def share_right(queries: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The number of shown neighbours with the class of their query, and the number of all with a class."""
    pairs = [(query["label"], label) for query in queries for label in query["neighbour_labels"] if query["label"] >= 0]
    return sum(a == b for a, b in pairs), len(pairs)
