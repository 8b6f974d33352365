"""The arguments of `clae …`, and their help."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from clae_dist import __version__
from clae_dist.options import Parser, user_path

_EXIT_CODES = """\
exit codes: 0 done; 1 unexpected; 2 a setting or an argument; 3 data; 4 a rank failed; 5 storage;
            6 a rank hung, and the run was not started again;
            75 stopped on request with everything saved (start the same command again); 130 ended at once by Ctrl-C;
            doctor: 1 where it found a problem
"""

_CONFIG_HELP = "a recipe: a YAML file, or the name of one in the package, such as quickstart or cifar10/clae"
_OVERRIDES_HELP = (
    "settings over the recipe's, such as batch.global_size=512 attack.epsilon=8/255; `clae config CONFIG` lists all"
)
_SHARDS_HELP = "where the run's images are (default: as config.yaml says)"
_PARITY = """\
Runs a recipe's model, attack and optimiser in W processes and in one, on the same global batch of made-up images, and compares
loss, every parameter gradient, the input gradient, the signs of delta, and the parameters after some steps. In float64 (float32
under DeepSpeed) differences are rounding or a mistake. Run it on your cluster before you spend money on it:

  clae parity configs/cifar10/clae.yaml --world-size 4 --backend fsdp2
  torchrun --nnodes 2 --nproc-per-node 8 … -m clae_dist parity configs/imagenet/clae.yaml     (torchrun's ranks are the W)

exit code 0: the same; 1: not, and the first tensor that differs is named with what usually causes it.
"""
_REPLAY = """\
Takes one step again as it was written down (weights, settings, random numbers; the images come from the shards, in the run's
order), compares loss and gradients, and names the first module whose output is not finite. In one process with the whole
global batch, so use a machine that holds it; with model.norm=local, in as many processes as the run had ranks.

exit code 0: reproduced; 1: not, and what differs is named (a device that computes wrongly, or another machine's rounding).
"""
_BENCH = """\
Measures this machine. What is compared is first found equal (loss and gradients against float64; steps bit for bit), then
timed in turns, so that what disturbs the machine disturbs all of it. With `pip install -e '.[bench]'`, lightly's and
open_clip's losses are among it.

  contrast   one rank's loss, forward and backward: 512 rows (both views) against 8,192 and 1,024 against 32,768, then 512
             against up to a million. Floor: four matrix products, rows x all rows x width, timed in turns with the rest.
  gather     the loss on 2 and 4 processes (under torchrun: on its ranks, your network): collectives, and the bytes that a
             rank sends by ring algorithms. Floor: its collectives alone, by latency alpha_s and beta_s_per_byte as measured.
  step       training steps (forward, attack, backward, optimiser) of plain SimCLR and of each attack.cost. Floor: plain's
             time times the forward and backward units that the step needs.
  data       from shards to views, stage by stage and whole, with processes and with threads, beside Pillow's and torchvision's
             SimCLR pipeline and plain WebDataset; how many cores a GPU needs. Floor: a JPEG's entropy decoding alone.
  checkpoint how long a save of 1 GB of state holds up training, beside torch.save and torch's async_save, and how long
             until it is committed. Floor: a copy of the same bytes. Written to the system's temporary folder.
  restart    from kill -9 of one of two ranks to the next training step that is new, by parts.

Each row: case; what ("name: what it is"); median_s; spread (interquartile range over median); ratio_to: {name: this median
over that of another row of the case}; floor_s; added_bytes (peak memory of one call over what was there before) or
wire_bytes, and bytes_ratio_to, the same of these; more: further figures, of which cpu_s, seconds of all cores in the best
repeat, is what other processes disturb the least. OMP_NUM_THREADS sets torch's threads. Progress goes to stderr.
"""


_TRUST = (
    "act on what the run's own config.yaml names (pipe: commands, servers, databases, links out of its folder), although no "
    "`clae train` of yours on this machine used it"
)

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[Parser]


def parser() -> Parser:
    """Return the parser of `clae`; in its namespace, `command` is the subcommand's name and `parser` its parser."""
    top = Parser(
        prog="clae",
        description="Contrastive learning with adversarial examples (CLAE) on a global batch.",
        epilog=_EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=f"clae-dist {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_runs(commands)
    _add_results(commands)
    _add_proofs(commands)
    return top


def _recipe(text: str) -> str:
    return text if "=" in text else str(user_path(text))  # where a recipe may be left out, a setting


def _shards(text: str) -> str:
    from clae_dist.home import expand_home

    try:
        return str(expand_home("data.shards", text, "--shards"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add(commands: _Commands, name: str, summary: str, description: str = "", recipe: str = "") -> Parser:
    """A subcommand with --debug and, where `recipe` is "needed" or "optional", with CONFIG and key=value."""
    sub = commands.add_parser(
        name,
        help=summary,
        description=description or summary,
        epilog=_EXIT_CODES,
    )
    sub.add_argument("--debug", action="store_true", help="show tracebacks and the launcher's own log")
    if recipe == "needed":
        sub.add_argument("config", metavar="CONFIG", type=_recipe, help=_CONFIG_HELP)
    elif recipe == "optional":
        sub.add_argument("config", metavar="CONFIG", type=_recipe, nargs="?", help=f"{_CONFIG_HELP}; may be left out")
    if recipe:
        sub.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=_OVERRIDES_HELP)
    return sub


def _add_runs(commands: _Commands) -> None:
    train = _add(
        commands,
        "train",
        "pretrain an encoder; on a run that was interrupted, go on where its newest checkpoint is",
        recipe="needed",
    )
    train.add_argument("--launcher", choices=("ray", "torchrun", "local"), help="who starts the ranks (over launch.launcher)")
    train.add_argument("--quiet", action="store_true", help="print errors and the end alone; RUN/console.log keeps all lines")
    _add(commands, "config", "print the resolved settings, and where each comes from", recipe="needed")
    dry_run = _add(
        commands,
        "dry-run",
        "build ranks, data, model and optimiser of a recipe and run one tiny step; no tracking, no evaluation",
        recipe="needed",
    )
    dry_run.add_argument("--launcher", choices=("ray", "local"), help="who starts the ranks (default: launch.launcher)")
    for sub in (train, dry_run):
        sub.add_argument("--trust", action="store_true", help=_TRUST)


def _add_results(commands: _Commands) -> None:
    evaluate = _add(commands, "evaluate", "kNN and linear probe of a run's encoder, before and after pretraining")
    report = _add(commands, "report", "write a run's report (HTML, PNGs) and summary.json, and print the table")
    export = _add(commands, "export", "write the encoder as safetensors that timm or torchvision load without this package")
    checkpoints = _add(commands, "checkpoints", "list, verify and export a run's checkpoints; exit code 1 where one is damaged")
    for sub in (evaluate, report, export, checkpoints):
        sub.add_argument("run", metavar="RUN", type=user_path, help="the folder of a run, such as runs/clae")
    for sub in (evaluate, report):
        sub.add_argument("--shards", default="", type=_shards, metavar="SHARDS", help=_SHARDS_HELP)
    report.add_argument(
        "--compare",
        type=user_path,
        metavar="RUN",
        action="append",
        default=[],
        help="another run that has a report, for a further column of the table; may be given several times",
    )
    replay = _add(
        commands, "replay", "take a step again whose loss or gradient was not finite, and say where that begins", _REPLAY
    )
    replay.add_argument("step", metavar="STEP", type=user_path, help="what the run wrote down: RUN/nonfinite/step-00000123")
    replay.add_argument("--shards", default="", type=_shards, metavar="SHARDS", help=_SHARDS_HELP)
    for sub in (evaluate, report, export, checkpoints, replay):
        sub.add_argument("--trust", action="store_true", help=_TRUST)
    export.add_argument("--to", type=user_path, metavar="DIR", help="where to (default: RUN/export)")
    checkpoints.add_argument("--verify", action="store_true", help="read every byte, and say what is damaged")
    checkpoints.add_argument("--json", action="store_true", help="print one JSON array, newest first")
    checkpoints.add_argument(
        "--export", type=int, nargs="?", const=-1, metavar="STEP", help="write all of its tensors, whole (default: the newest)"
    )
    checkpoints.add_argument("--to", type=user_path, metavar="FILE", help="where --export writes a safetensors file")


def _add_proofs(commands: _Commands) -> None:
    parity = _add(commands, "parity", "prove on this machine that W processes compute what one would", _PARITY, "optional")
    parity.add_argument("--world-size", type=int, default=2, metavar="W", help="ranks on this machine (default 2)")
    parity.add_argument("--backend", choices=("ddp", "fsdp2", "deepspeed"), help="over parallel.backend")
    parity.add_argument("--steps", type=int, default=3, metavar="K", help="optimiser steps to compare after (default 3)")
    parity.add_argument(
        "--rows", type=int, default=4, metavar="B", help="images a rank (default 4); one process holds W times as many"
    )
    parity.add_argument("--json", action="store_true", help="print one JSON object")
    bench = _add(commands, "bench", "measure loss, gather, step, data, checkpoints or restarts on this machine", _BENCH)
    bench.add_argument("bench", choices=("contrast", "step", "gather", "data", "checkpoint", "restart"), help="what to measure")
    bench.add_argument(
        "shards", metavar="SHARDS", nargs="?", default="", help="data: a set, as data.shards names it (default: made-up images)"
    )
    bench.add_argument("--split", default="", help="data: of the set (default: train)")
    bench.add_argument(
        "--images-per-s", type=float, default=0.0, metavar="RATE", help="data: say how many cores feed a GPU that takes so many"
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object: versions, machine, notes, rows")
    bench.add_argument("--quick", action="store_true", help="only small sizes, few repeats: a minute")
    doctor = _add(
        commands,
        "doctor",
        "check versions, devices, collectives, shards, disk, shared memory, MLflow; with CONFIG also what that recipe needs",
        recipe="optional",
    )
    doctor.add_argument("--trust", action="store_true", help=_TRUST)
