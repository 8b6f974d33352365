"""The ONNX files of an export: the graph, compared with torch, and its int8 form with a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clae_dist.deploy.encoder import Encoder
from clae_dist.deploy.layout import GRAPH, INT8_GRAPH, INT8_REPORT, Contents
from clae_dist.deploy.onnx_graph import CHECKED_IMAGES, check_graph, write_graph
from clae_dist.deploy.onnx_int8 import METHOD, quantise
from clae_dist.deploy.onnx_report import compare
from clae_dist.deploy.run_images import RunImages, some_views
from clae_dist.errors import DataError

Say = Callable[[str], None]
INT8_FORMAT = "clae-dist int8 1"


def add_graphs(
    folder: Path, encoder: Encoder, facts: Mapping[str, str], contents: Contents, images: RunImages | None, say: Say
) -> dict[str, Any]:
    """Write the ONNX files into an export's folder. Returns the facts about them for config.json; {} without any.

    Raises ConfigError for an encoder that cannot be expressed, and for a graph that computes something else.
    """
    if "onnx" not in contents.formats:
        return {}
    write_graph(encoder, folder / GRAPH, facts)
    try:
        views, origin = some_views(images, CHECKED_IMAGES, encoder.image_size)
    except DataError:  # the manifest is there, and its shards are not
        views, origin = some_views(None, CHECKED_IMAGES, encoder.image_size)
    distance = check_graph(folder / GRAPH, encoder, views)
    if "onnx-int8" in contents.formats:
        assert images is not None
        _add_int8(folder, encoder, contents.calibration, images, say)
    return {"onnx": {"difference": distance, "compared_on": origin}}


def _add_int8(folder: Path, encoder: Encoder, count: int, images: RunImages, say: Say) -> None:
    split = images.config.data.train_split
    views = images.views(split, count)
    say(f"int8: calibration with {len(views)} images of {split}")
    quantise(folder / GRAPH, folder / INT8_GRAPH, views)
    report = {
        "format": INT8_FORMAT,
        "weights": encoder.weights_digest(),
        "method": METHOD,
        "calibration": {"images": len(views), "split": split},
        "manifest_digest": images.manifest.digest,
        **compare(encoder, folder / GRAPH, folder / INT8_GRAPH, images, say),
    }
    (folder / INT8_REPORT).write_text(json.dumps(report, indent=2) + "\n")
