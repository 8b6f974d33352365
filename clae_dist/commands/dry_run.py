"""`clae dry-run`."""

from __future__ import annotations

import argparse
import sys

from clae_dist.commands.arguments import add_config, add_launcher, add_trust
from clae_dist.commands.settings import check_trust, resolved, set_option
from clae_dist.escape import say
from clae_dist.options import Parser
from clae_dist.redact import redact_text

SUMMARY = "build ranks, data, model and optimiser of a recipe and run one tiny step, without tracking or evaluation"


def add_arguments(parser: Parser) -> None:
    add_config(parser)
    add_launcher(parser, "ray", "local")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    set_option(arguments, "launcher", "launch.launcher")
    recipe = check_trust(arguments, resolved(arguments))
    from clae_dist.launchers.dry_run import dry_run

    ending = dry_run(recipe, debug=arguments.debug)
    if ending.code:
        say(redact_text(f"clae: {ending.message}"), file=sys.stderr)
    else:
        say(redact_text(f"dry run passed: {ending.message}"))
    return ending.code
