"""Signature and input example of an exported encoder, as MLflow's page shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clae_dist.reading import ReadError, is_count, is_list_of, read_object

EXAMPLE = "input_example.json"
_GREY = 0.5


def describe_input(export_folder: Path, folder: Path) -> dict[str, Any]:
    """Write an input example (a grey image) into `folder`. Returns fields of MLflow's Model: the signature and the example.

    Returns {} for an export without a readable description.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    try:
        description = read_object(export_folder / "config.json")
    except ReadError:
        return {}
    size: Any = description.get("input_size")
    width: Any = description.get("num_features", -1)
    if not (is_list_of(is_count)(size) and len(size) == 3):
        return {}
    images = TensorSpec(np.dtype(np.float32), (-1, *size), name=None)
    features = TensorSpec(np.dtype(np.float32), (-1, width if is_count(width) else -1), name=None)
    example = np.full((1, *size), _GREY, np.float32)
    (folder / EXAMPLE).write_text(json.dumps(example.tolist()))
    return {
        "signature": ModelSignature(inputs=Schema([images]), outputs=Schema([features])),
        "saved_input_example_info": {"artifact_path": EXAMPLE, "type": "ndarray", "format": "tf-serving"},
    }
