"""`clae report`."""

from __future__ import annotations

import argparse

from clae_dist.commands.arguments import add_run, add_shards, add_trust
from clae_dist.commands.settings import permission
from clae_dist.options import Parser, run_path

SUMMARY = "write a run's report (HTML, PNGs) and summary.json, and print the table"


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    add_shards(parser)
    parser.add_argument(
        "--compare",
        type=run_path,
        metavar="RUN",
        action="append",
        default=[],
        help="another run that has a report, as a further column of the table; may be given several times",
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.training.finish import report

    report(arguments.run, arguments.compare, shards=arguments.shards, permission=permission(arguments))
    return 0
