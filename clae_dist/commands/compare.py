"""`clae compare`."""

from __future__ import annotations

import argparse

from clae_dist.commands.arguments import add_trust
from clae_dist.commands.settings import permission
from clae_dist.errors import OK, ConfigError
from clae_dist.options import Parser, run_path

SUMMARY = "print the results of runs side by side, with the settings in which they differ"


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", type=run_path, nargs="+", help="folders of two or more runs of one set of images"
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    if len(arguments.runs) < 2:
        raise ConfigError(f"only {str(arguments.runs[0])!r} is given; name two or more runs, such as runs/clae runs/simclr.")
    from clae_dist.report.comparison import compare_runs
    from clae_dist.runs.trust import check_folder

    for folder in arguments.runs:
        check_folder(folder, permission(arguments))
    for line in compare_runs(arguments.runs):
        print(line)
    return OK
