"""README.md of an exported encoder: its origin, and working code that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clae_dist.deploy.int8_table import int8_section

_BUILD = {
    "timm": """encoder = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **config["arguments"])""",
    "torchvision": """encoder = torchvision.models.get_model(config["architecture"], weights=None, **config["arguments"])
setattr(encoder, config["head"], torch.nn.Identity())  # no classifier""",
}
_STEM = """
stem = config["stem"]  # for small images: 3x3, no max-pool
encoder.conv1 = torch.nn.Conv2d(3, stem["out_channels"], 3, stem["stride"], padding=1, bias=False)
encoder.maxpool = torch.nn.Identity()"""
_LOCAL_DIR = """
timm loads this folder by itself as well: `timm.create_model("local-dir:FOLDER", pretrained=True)` takes images that are
normalised with `mean` and `std`, as the transforms of `timm.data` for it do.
"""
_HEAD = """
`head.safetensors` is a linear classifier of the features: `weight` (features, classes) and `bias`, with the names of the
classes in the header and in config.json.
"""
_ONNX = """
## ONNX

`encoder.onnx` takes the same pixels, `images` float32 (n, 3, {side}, {side}) in [0, 1] for any n: the normalisation is inside;
division of uint8 by 255, resizing and cropping are not. Its features differ from
torch's by at most {difference:.1e} of the largest one ({compared_on}).
`weights` in config.json and `clae-dist weights` in the graph's metadata are the digest of the weights.

```python
import onnxruntime

session = onnxruntime.InferenceSession("encoder.onnx")


def features_by_onnx(images):
    return session.run(["features"], {{"images": images}})[0]  # arrays of numpy
```
"""
_LOAD = """import json
from pathlib import Path

import torch
import {library}
from safetensors.torch import load_file

{build}

encoder.load_state_dict(load_file(folder / "encoder.safetensors"), strict=True)
encoder.eval()

mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))


def features(images):
    \"\"\"(n, {num_features}) from float RGB images (n, 3, {side}, {side}) in [0, 1].\"\"\"
    with torch.no_grad():
        return encoder((images - mean) / std).flatten(1)
"""


def readme(description: Mapping[str, Any], int8: Mapping[str, Any] | None, card: str) -> str:
    """The text of README.md for an export that `description` (config.json) describes.

    `int8` is the content of onnx-int8.json, if it is there, and `card` the sections of the model card.
    """
    build = _BUILD[description["library"]]
    reading = 'folder = Path(".")  # of this README\nconfig = json.loads((folder / "config.json").read_text())'
    lines = f"{reading}\n{build}"
    if description["stem"]:
        lines += _STEM
    side = description["input_size"][1]
    code = _LOAD.format(library=description["library"], build=lines, num_features=description["num_features"], side=side)
    return f"""# {description["encoder"]}, pretrained with {description["method"]}

The encoder after {description["images_seen"]:,} images, without projector (clae-dist {description["package_version"]}).
`encoder.safetensors` holds the weights, `config.json` the architecture, the pixel statistics and where the encoder comes from
(digests of the set of images and of the configuration). Loading it takes torch, safetensors and {description["library"]}:

```python
{code}```
{"" if description["timm_problem"] else _LOCAL_DIR}
Train further from here as with any {description["library"]} model; its batch-norm statistics are those of the
{description["route"]} images.
{_HEAD if "classes" in description else ""}\
{_ONNX.format(side=side, **description["onnx"]) if "onnx" in description else ""}\
{int8_section(int8) if int8 else ""}\
{card}"""
