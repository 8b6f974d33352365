"""`clae checkpoints`."""

from __future__ import annotations

import argparse

from clae_dist.commands.arguments import add_run, add_trust
from clae_dist.commands.settings import permission
from clae_dist.errors import ConfigError
from clae_dist.escape import say
from clae_dist.options import Parser, user_path

SUMMARY = "list, verify and export a run's checkpoints; exit code 1 if one is damaged"


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument("--verify", action="store_true", help="read every byte, and print the damaged files")
    parser.add_argument("--json", action="store_true", help="print one JSON array, newest first")
    parser.add_argument(
        "--export", type=int, nargs="?", const=-1, metavar="STEP", help="write all tensors, unsharded (default: the newest)"
    )
    parser.add_argument("--to", type=user_path, metavar="FILE", help="the safetensors file that --export writes")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.runs.checkpoint.listing import export_checkpoint, say_checkpoints
    from clae_dist.runs.trust import check_folder

    if (arguments.export is None) != (arguments.to is None):
        raise ConfigError("--export [STEP] and --to FILE belong together, but only one is given; give both.")
    check_folder(arguments.run, permission(arguments))
    if arguments.export is None:
        return say_checkpoints(
            arguments.run, verify=arguments.verify, as_json=arguments.json, say=print if arguments.json else say
        )
    say(f"wrote {export_checkpoint(arguments.run, arguments.export, arguments.to)}")
    return 0
