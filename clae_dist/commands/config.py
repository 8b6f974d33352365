"""`clae config`."""

from __future__ import annotations

import argparse

from clae_dist.commands.arguments import add_config
from clae_dist.commands.settings import resolved
from clae_dist.options import Parser

SUMMARY = "print the resolved settings and the origin of each"


def add_arguments(parser: Parser) -> None:
    add_config(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.config.sharing import shareable
    from clae_dist.recipe import to_yaml

    config, origins = resolved(arguments)
    print(to_yaml(shareable(config), origins), end="")
    return 0
