"""`clae verify`."""

from __future__ import annotations

import argparse
import os

from clae_dist.commands.arguments import add_config, add_launcher, add_trust
from clae_dist.commands.parity import DEMO
from clae_dist.commands.settings import check_trust, resolved
from clae_dist.errors import ConfigError
from clae_dist.escape import say
from clae_dist.options import Parser, user_path
from clae_dist.redact import redact_text

SUMMARY = "check a new machine or cluster: everything that a training run relies on, in one table"
DESCRIPTION = """\
Runs and records, for a recipe (or a small built-in one) on images of noise:

  doctor        clae doctor
  collectives   all-gather, all-reduce, reduce-scatter, broadcast by size: values on all ranks, time, rate of a link
  batch norm    statistics of all ranks against one process in float64, on GPUs also torch's SyncBatchNorm
  parity X      the recipe under ddp, fsdp2 and ZeRO against one process in float64, float32 without TF32, and bfloat16
  attacks       every method takes a step, every attack raises its loss and stays within ε
  checkpoints   saved under one backend, loaded under another: the same bits
  compile       compiled blocks against eager ones
  resume        a run is killed with kill -9 and resumed: the bits of an undisturbed one
  bench X       clae bench gpu-counts, clae bench step, clae bench data

A check that fails, crashes or exceeds --limit does not stop the others, which have processes of their own. On the ranks of
torchrun or Ray all checks share these ranks: a rank that crashes, or a check that exceeds --limit, ends the command, with the
record of the checks before it. FOLDER/verify.txt is the table; FOLDER/verify.json also has versions, machine, configuration,
all figures and tracebacks. Both are written after every check.
"""
_EPILOG = """\
examples:
  clae verify --quick                                   this machine: every GPU, or two ranks on the CPU; about 3 minutes
  clae verify configs/imagenet/clae.yaml --to runs/verify
  clae verify --only parity,attacks --workers 4 --device cpu
  torchrun --nnodes 2 --nproc-per-node 8 … -m clae_dist verify configs/imagenet/clae.yaml --to /shared/verify

exit code 0: nothing failed (checks may have been skipped); 1: a check failed; 130: Ctrl-C, with the record so far.
launch/README.md says what each failure means.
"""
_LIMITS_S = {True: 300.0, False: 1800.0}  # of a check, with --quick and without


def add_arguments(parser: Parser) -> None:
    parser.epilog = _EPILOG + "\n" + (parser.epilog or "")
    add_config(parser, optional=True)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, backends and repeats")
    parser.add_argument(
        "--to", default="verify", type=user_path, metavar="FOLDER", help="folder of the results, which all hosts see"
    )
    parser.add_argument("--only", default="", metavar="NAMES", help="names of checks, such as doctor,parity,'bench step'")
    parser.add_argument("--workers", type=int, default=0, metavar="W", help="ranks (default: one a GPU, two on a CPU)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the ranks")
    parser.add_argument(
        "--limit", type=float, default=0.0, metavar="SECONDS", help="time limit of a check (default: 1800, with --quick 300)"
    )
    add_launcher(parser, "local", "ray")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    for name in ("workers", "limit"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name} is {getattr(arguments, name):g}; use 1 or more, or 0 for the default.")
    if arguments.config and "=" in arguments.config and not os.path.exists(arguments.config):
        arguments.overrides.insert(0, arguments.config)
        arguments.config = None
    recipe = resolved(arguments, () if arguments.config else DEMO)
    if arguments.config:
        recipe = check_trust(arguments, recipe)
    from clae_dist.verify.check import Subject
    from clae_dist.verify.run import Request, verify

    subject = Subject(
        recipe,
        words=(arguments.config, *arguments.overrides) if arguments.config else (),
        folder=arguments.to.absolute(),
        workers=arguments.workers or recipe.config.launch.workers,
        device=arguments.device if arguments.device != "auto" else recipe.config.launch.device,
        quick=arguments.quick,
        limit_s=arguments.limit or _LIMITS_S[arguments.quick],
    )
    only = tuple(name.strip() for name in arguments.only.split(",") if name.strip())
    ending = verify(Request(subject, arguments.launcher or recipe.config.launch.launcher, only), _say)
    if ending.message:
        print(redact_text(ending.message))
    return ending.code


def _say(text: str) -> None:
    say(redact_text(text), flush=True)
