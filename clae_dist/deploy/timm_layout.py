"""timm's own layout of a model folder, which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

It is config.json with `architecture`, `num_classes`, `model_args` and `pretrained_cfg`, beside model.safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Of features: the same operations on the same weights, in an order that may differ between torchvision's and timm's modules.
_TOLERANCE = 1e-6


def unsupported(description: Mapping[str, Any]) -> str:
    """The reason why timm cannot build the encoder that `description` (config.json) describes; "" if it may."""
    import timm

    name = description["architecture"]
    if description["stem"]:
        return f"its 3x3 stem for small images is not that of timm's {name}"
    return "" if timm.is_model(name) else f"timm has no model {name!r}"


def timm_settings(description: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that timm reads, beside those of `description`."""
    import timm

    size = description["input_size"][1]
    registered = timm.models.get_pretrained_cfg(description["architecture"])
    traits = {key: getattr(registered, key, None) for key in ("first_conv", "classifier", "fixed_input_size")}
    return {
        "num_classes": 0,
        "model_args": description["arguments"] if description["library"] == "timm" else {},
        "pretrained_cfg": {
            **{key: value for key, value in traits.items() if value},
            "num_classes": 0,
            **{key: description[key] for key in ("input_size", "mean", "std")},
            "interpolation": "bilinear",
            "crop_pct": 1.0 if size <= 64 else 0.875,
            "crop_mode": "center",
        },
    }


def difference(folder: Path, network: nn.Module, image_size: int) -> str:
    """The reason why the model that timm loads from `folder` is not `network`; "" if their features are the same."""
    import timm

    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    name = f"local-dir:{folder}"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            features = timm.create_model(name, pretrained=True).eval()(images)
            expected = network(images).flatten(1)
    except Exception as error:  # each model's constructor and filter of weights has errors of its own
        return f"timm's model of that name is another one ({' '.join(str(error).split())[:120]})"
    if features.shape != expected.shape:
        return f"timm's model has features of the shape {tuple(features.shape)}, expected {tuple(expected.shape)}"
    distance = float((features - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    return "" if distance <= _TOLERANCE else f"the features of timm's model differ by {distance:.1e}"
