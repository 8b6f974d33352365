"""`clae export`."""

from __future__ import annotations

import argparse

from clae_dist.commands.arguments import add_run, add_trust
from clae_dist.commands.settings import permission
from clae_dist.options import Parser, user_path

SUMMARY = "write the encoder as safetensors that timm or torchvision load without this package"


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument("--to", type=user_path, metavar="DIR", help="target folder (default: RUN/export)")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.training.finish import export

    export(arguments.run, arguments.to, permission=permission(arguments))
    return 0
