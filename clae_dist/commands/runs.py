"""`clae runs`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from clae_dist.errors import OK, ConfigError
from clae_dist.escape import in_json, say
from clae_dist.options import Parser, run_path
from clae_dist.staging import is_url, shown_path

SUMMARY = "list the runs below a folder: state (running, finished, stopped, dead), progress and last metrics"


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "folder", metavar="FOLDER", type=run_path, nargs="?", default=Path("runs"), help="the folder to search (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.runs.listing import list_runs, table_of

    folder: Path = arguments.folder
    if is_url(shown_path(folder)):
        from clae_dist.runs.copies import copy_listed

        copy_listed(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"FOLDER is {shown_path(folder)!r}, which is not a folder; name one that holds run folders, such as runs."
        )
    runs = list_runs(folder)
    if arguments.json:
        print(in_json(json.dumps([{**run.as_dict(), "folder": shown_path(Path(run.folder))} for run in runs], indent=2)))
        return OK
    if not runs:
        say(f"no run folders below {shown_path(folder)}")
        return OK
    for line in table_of(runs, folder, time.time()):
        print(line)
    return OK
