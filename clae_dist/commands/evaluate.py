"""`clae evaluate`."""

from __future__ import annotations

import argparse

from clae_dist.commands.arguments import add_run, add_shards, add_trust
from clae_dist.commands.settings import permission
from clae_dist.options import Parser

SUMMARY = "evaluate a run's encoder, before and after pretraining, by kNN and linear probe"


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    add_shards(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.training.finish import evaluate

    evaluate(arguments.run, shards=arguments.shards, permission=permission(arguments))
    return 0
