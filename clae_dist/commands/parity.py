"""`clae parity`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from clae_dist.commands.arguments import add_config
from clae_dist.commands.settings import resolved, set_option
from clae_dist.errors import OK, UNEXPECTED, ConfigError
from clae_dist.options import Parser
from clae_dist.redact import redact_text

SUMMARY = "prove on this machine that W processes compute the same as one"
DESCRIPTION = """\
Runs a recipe's model, method and optimiser in W processes and in one, on the same global batch of synthetic images, and
compares the loss, every parameter gradient, the input gradient, the signs of delta, and the parameters after some steps. In
float64 (float32 under DeepSpeed) differences are either rounding or a bug. Run it on your cluster before a long training:

  clae parity configs/cifar10/clae.yaml --world-size 4 --backend fsdp2
  torchrun --nnodes 2 --nproc-per-node 8 … -m clae_dist parity configs/imagenet/clae.yaml     (on torchrun's ranks)

With --loss, a loss of your own or of another package, which gathers rows by itself, is examined instead: its value and the
gradient of the rows in W processes of this machine against one, and which of the known mistakes it makes, if any:

  clae parity --loss lightly.loss:NTXentLoss --loss-args temperature=0.1 gather_distributed=true

exit code 0: equal; 1: different, and the first tensor that differs is named with the usual cause.
"""

_LOSS = (
    "package.module:Class or package.module:function, installed or in the current folder. It is called with this rank's rows "
    "of two views, each (B, D), of unit length; or with all 2B rows and the number of each row's image, where its second "
    "parameter is called labels, indexes, targets or ids. It returns this rank's loss"
)
_LOSS_ARGS = (
    "for the constructor of the class, or for the call where the constructor has no such parameter; parameters called rank and "
    "world_size are set for you"
)
_STOP_GRADIENT = "the loss holds some rows constant on purpose: what autograd says in one process is right"

# Settings without a recipe. A higher learning rate would amplify rounding.
DEMO = (
    "model.encoder=small_resnet",
    "data.image_size=32",
    "optim.name=sgd",
    "optim.learning_rate=0.03",
    "optim.warmup_epochs=0",
)


def add_arguments(parser: Parser) -> None:
    add_config(parser, optional=True)
    parser.add_argument("--world-size", type=int, default=2, metavar="W", help="ranks on this machine (default 2)")
    parser.add_argument("--backend", choices=("ddp", "fsdp2", "deepspeed"), help="overrides parallel.backend")
    parser.add_argument("--steps", type=int, default=3, metavar="K", help="optimiser steps before the comparison (default 3)")
    parser.add_argument(
        "--rows", type=int, default=4, metavar="B", help="images per rank (default 4); one process holds W times as many"
    )
    parser.add_argument("--loss", default="", metavar="MODULE:NAME", help=_LOSS)
    parser.add_argument("--loss-args", nargs="+", default=[], metavar="key=value", help=_LOSS_ARGS)
    parser.add_argument("--stop-gradient", action="store_true", help=_STOP_GRADIENT)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    for flag in ("world_size", "steps", "rows"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}; use at least 1.")
    if arguments.loss:
        return _of_a_loss(arguments)
    if arguments.loss_args or arguments.stop_gradient:
        raise ConfigError(f"--{'loss-args' if arguments.loss_args else 'stop-gradient'} is for --loss, which names the loss.")
    if arguments.config and "=" in arguments.config and not os.path.exists(arguments.config):
        arguments.overrides.insert(0, arguments.config)
        arguments.config = None
    set_option(arguments, "backend", "parallel.backend")
    recipe = resolved(arguments, () if arguments.config else DEMO)
    from clae_dist.parity.run import parity

    ending = parity(recipe, world_size=arguments.world_size, rows=arguments.rows, steps=arguments.steps, as_json=arguments.json)
    if ending.message:
        print(redact_text(ending.message), file=sys.stderr if ending.message.startswith("clae: ") else sys.stdout)
    return ending.code


def _of_a_loss(arguments: argparse.Namespace) -> int:
    if arguments.config or arguments.backend:
        raise ConfigError(f"--loss examines a loss alone; it takes no {'--backend' if arguments.backend else 'recipe'}.")
    import yaml

    from clae_dist.parity.loss import LossCase, loss_parity
    from clae_dist.parity.loss_verdict import table
    from clae_dist.plugins import find_beside

    settings = {}
    for text in arguments.loss_args:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ConfigError(f"--loss-args has {text!r}; expected key=value.")
        settings[key] = yaml.safe_load(value)
    find_beside(Path("loss"), [arguments.loss])
    case = LossCase(arguments.loss, settings, arguments.world_size, arguments.rows, arguments.stop_gradient)
    found = loss_parity(case)
    print(json.dumps(found.as_dict()) if arguments.json else "\n".join(table(found)))
    return OK if found.passed else UNEXPECTED
