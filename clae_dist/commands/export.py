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
  onnx          encoder.onnx: pixels in [0, 1] in, features out, any number of images; the normalisation is inside. Compared with
                torch on 64 images of the run's set, where it is there, and refused if they differ. Takes onnx, onnxscript and
                onnxruntime
"""


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument("--to", type=user_path, metavar="DIR", help="target folder (default: RUN/export)")
    parser.add_argument(
        "--format", default="safetensors,timm", metavar="LIST", help="formats with commas (default: safetensors,timm)"
    )
    add_shards(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.deploy.layout import parse_formats
    from clae_dist.training.finish import export

    formats = parse_formats(arguments.format)
    export(arguments.run, arguments.to, permission=permission(arguments), formats=formats, shards=arguments.shards)
    return 0
