"""`clae replay`."""

from __future__ import annotations

import argparse

from clae_dist.commands.arguments import add_shards, add_trust
from clae_dist.commands.settings import permission
from clae_dist.options import Parser, user_path
from clae_dist.redact import redact_text

SUMMARY = "repeat a recorded step whose loss or gradient was non-finite, and name the module where it begins"
DESCRIPTION = """\
Repeats a recorded step (weights, settings, random numbers; the images come from the shards, in the run's order), compares loss
and gradients, and names the first module whose output is non-finite. Runs in one process with the whole global batch, so use a
machine with enough memory; with model.norm=local or model.norm_group, in as many processes as the run had ranks.

exit code 0: reproduced; 1: not reproduced, and the difference is named (a faulty device, or another machine's rounding).
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("step", metavar="STEP", type=user_path, help="the recorded step, such as RUN/nonfinite/step-00000123")
    add_shards(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.launchers.replay import replay_step

    ending = replay_step(arguments.step, arguments.shards, permission(arguments))
    print(redact_text(ending.message))
    return ending.code
