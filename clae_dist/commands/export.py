"""`clae export`."""

from __future__ import annotations

import argparse

from clae_dist.commands.arguments import add_run, add_shards, add_trust
from clae_dist.commands.settings import permission
from clae_dist.options import Parser, user_path

SUMMARY = "write the encoder as safetensors that timm or torchvision load without this package, or as ONNX"
DESCRIPTION = """\
  safetensors   encoder.safetensors, config.json and a README.md with the lines that load it; always written
  timm          timm's own layout, where timm has the same model
  onnx          encoder.onnx: pixels in [0, 1] in, features out, any number of images; the normalisation is inside. It is
                compared with torch on 64 images of the run's set, where it is there, and refused if they differ. Takes onnx,
                onnxscript and onnxruntime
  onnx-int8     encoder-int8.onnx: int8 weights and activations by static quantisation, with calibration images of the train
                split; onnx-int8.json has size, latency, features and accuracies beside the float32 graph's

--head adds head.safetensors, the linear probe of the train split, so that a served model also answers with classes.
"""


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument("--to", type=user_path, metavar="DIR", help="target folder (default: RUN/export)")
    parser.add_argument(
        "--format", default="safetensors,timm", metavar="LIST", help="formats with commas (default: safetensors,timm)"
    )
    parser.add_argument(
        "--calibration", type=int, default=256, metavar="N", help="images for the ranges of onnx-int8 (default: 256)"
    )
    parser.add_argument("--head", action="store_true", help="add a linear classifier of the run's labelled images")
    add_shards(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.deploy.layout import Contents
    from clae_dist.training.finish import export

    contents = Contents.parse(arguments.format, arguments.calibration, arguments.head)
    export(arguments.run, arguments.to, permission=permission(arguments), contents=contents, shards=arguments.shards)
    return 0
