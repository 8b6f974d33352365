"""`clae doctor`."""

from __future__ import annotations

import argparse

from clae_dist.commands.arguments import add_config, add_trust
from clae_dist.commands.settings import check_trust, resolved
from clae_dist.escape import say
from clae_dist.options import Parser
from clae_dist.redact import redact_text

SUMMARY = "check versions, devices, collectives, shards, disk, shared memory and MLflow; with CONFIG also the recipe's needs"


def add_arguments(parser: Parser) -> None:
    add_config(parser, optional=True)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    config = check_trust(arguments, resolved(arguments)).config if arguments.config else None
    from clae_dist.doctor import run_doctor

    return run_doctor(config, lambda text: say(redact_text(text)))
