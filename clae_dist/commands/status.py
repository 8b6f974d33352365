"""`clae status`."""

from __future__ import annotations

import argparse
import json
import time

from clae_dist.commands.arguments import add_run
from clae_dist.escape import in_json
from clae_dist.options import Parser

SUMMARY = "say if a run is alive, slow, hung, dead or ended, since when and why; the exit code says it to scripts"
DESCRIPTION = (
    f"{SUMMARY[0].upper()}{SUMMARY[1:]}: 0 for a run that is new, alive, slow or finished, 75 for one that was stopped, 6 for "
    "one that hangs, 4 for one whose processes are gone, and for one that failed the exit code of that failure."
)


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--readmit",
        metavar="HOST",
        help="use HOST again, which the run excludes because it ended two starts in a row without progress",
    )


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.runs.copies import copy_state
    from clae_dist.runs.exclusion import readmit
    from clae_dist.runs.status import describe, status_of

    if arguments.readmit:
        readmit(arguments.run, arguments.readmit)

    def wait(seconds: float) -> None:
        time.sleep(seconds)
        copy_state(arguments.run)

    copy_state(arguments.run)
    status = status_of(arguments.run, wait)
    if arguments.json:
        print(in_json(json.dumps(status.as_dict(), indent=2)))
    else:
        for line in describe(status):
            print(line)
    return status.exit_code
