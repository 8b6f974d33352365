"""The result of `clae monitor` as an object for programs, and as a page with the images that moved most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clae_dist.deploy.embedding import LOOKS
from clae_dist.deploy.thumbnails import open_images, thumbnail
from clae_dist.deploy.window import Window
from clae_dist.monitoring.monitor import Monitor, Verdict
from clae_dist.page import render

FORMAT = "clae-dist drift 1"
_SHOWN = 24  # pictures


def as_object(monitor: Monitor, verdicts: Sequence[Verdict], raised: Sequence[str]) -> dict[str, Any]:
    """All findings. The effects are MMD², AUROC, a distance of distribution functions, and a share of rows."""
    return {
        "format": FORMAT,
        "reference": {"file": monitor.reference.name, "rows": len(monitor.reference)},
        "limits": vars(monitor.limits),
        "windows": [
            {
                "file": verdict.name,
                "rows": verdict.rows,
                "tests": {name: vars(finding) for name, finding in verdict.findings.items()},
                "floors": verdict.floors,
                "suspect_by": verdict.suspects(monitor.limits.alpha),
            }
            for verdict in verdicts
        ],
        "alarm": list(raised),
    }


def page(
    monitor: Monitor, verdicts: Sequence[Verdict], last: Window, raised: Sequence[str], source: str | None, split: str
) -> str:
    """HTML. `source`: where the last window's images are; without it, the page has their ids alone.

    Raises ConfigError or DataError if its images are not there.
    """
    order = verdicts[-1].moved.argsort(descending=True)[:_SHOWN].tolist()
    images = open_images(source, split, last) if source else None
    moved = [
        {
            "id": str(last.ids[row]),
            "moved": float(verdicts[-1].moved[row]),
            "picture": thumbnail(images, last.ids[row]) if images else "",
        }
        for row in order
    ]
    return render(
        "clae_dist",
        "monitor.html",
        title="Drift of embeddings",
        result=as_object(monitor, verdicts, raised),
        looks=LOOKS,
        moved=moved,
    )
