"""`clae …`: parse, call, print, exit code; nothing else."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clae_dist import __version__

if TYPE_CHECKING:
    from clae_dist.config import Config

_EXIT_CODES = """\
exit codes: 0 done; 1 unexpected; 2 a setting or an argument; 3 data; 4 a rank failed; 5 storage;
            75 stopped on request with everything saved (start the same command again); 130 ended at once by Ctrl-C;
            doctor: 1 where it found a problem
"""

_CONFIG_HELP = "a recipe, such as configs/cifar10/clae.yaml"
_OVERRIDES_HELP = (
    "settings over the recipe's, such as batch.global_size=512 attack.epsilon=8/255; `clae config CONFIG` lists all"
)
_PARITY = """\
Runs a recipe's model, attack and optimiser in W processes and in one, on the same global batch of made-up images, and compares
loss, every parameter gradient, the input gradient, the signs of delta, and the parameters after some steps. In float64 (float32
under DeepSpeed) differences are rounding or a mistake. Run it on your cluster before you spend money on it:

  clae parity configs/cifar10/clae.yaml --world-size 4 --backend fsdp2
  torchrun --nnodes 2 --nproc-per-node 8 … -m clae_dist parity configs/imagenet/clae.yaml     (torchrun's ranks are the W)

exit code 0: the same; 1: not, and the first tensor that differs is named with what usually causes it.
"""
_BENCH = """\
Measures this machine. What is compared is first found equal (loss and gradients against float64; steps bit for bit), then
timed in turns, so that what disturbs the machine disturbs all of it. With `pip install clae-dist[bench]`, lightly's and
open_clip's losses are among it.

  contrast   one rank's loss, forward and backward: 512 rows (both views) against 8,192 and 1,024 against 32,768, then 512
             against up to a million. Floor: four matrix products, rows x all rows x width, timed in turns with the rest.
  gather     the loss on 2 and 4 processes (under torchrun: on its ranks, your network): collectives, and the bytes that a
             rank sends by ring algorithms. Floor: its collectives alone, by latency alpha_s and beta_s_per_byte as measured.
  step       training steps (forward, attack, backward, optimiser) of plain SimCLR and of each attack.cost. Floor: plain's
             time times the forward and backward units that the step needs.

Each row: case; what ("name: what it is"); median_s; spread (interquartile range over median); ratio_to: {name: this median
over that of another row of the case}; floor_s; added_bytes (peak memory of one call over what was there before) or
wire_bytes, and bytes_ratio_to, the same of these; more: further figures, of which cpu_s, seconds of all cores in the best
repeat, is what other processes disturb the least. OMP_NUM_THREADS sets torch's threads. Progress goes to stderr.
"""
_RUN_HELP = "the folder of a run, such as runs/clae"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clae",
        description="Contrastive learning with adversarial examples (CLAE) on a global batch.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clae-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, *, recipe: bool = False, run: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=_EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("--debug", action="store_true", help="show tracebacks and the launcher's own log")
        if recipe:
            sub.add_argument("config", metavar="CONFIG", help=_CONFIG_HELP)
            sub.add_argument("overrides", metavar="key=value", nargs="*", help=_OVERRIDES_HELP)
        if run:
            sub.add_argument("run", metavar="RUN", type=Path, help=_RUN_HELP)
        return sub

    train = command(
        "train", "pretrain an encoder; on a run that was interrupted, go on where its newest checkpoint is", recipe=True
    )
    train.add_argument("--launcher", choices=("ray", "torchrun", "local"), help="who starts the ranks (over launch.launcher)")
    command("config", "print the resolved settings, and where each comes from", recipe=True)
    dry_run = command(
        "dry-run",
        "build ranks, data, model and optimiser of a recipe and run one tiny step; no tracking, no evaluation",
        recipe=True,
    )
    dry_run.add_argument("--launcher", choices=("ray", "local"), help="who starts the ranks (default: launch.launcher)")
    command("evaluate", "kNN and linear probe of a run's encoder, before and after pretraining", run=True)
    report = command("report", "write a run's report (HTML, PNGs) and summary.json, and print the table", run=True)
    report.add_argument(
        "--compare", type=Path, metavar="RUN", help="another run that has a report, for the table's second column"
    )
    export = command("export", "write the encoder as safetensors that timm or torchvision load without this package", run=True)
    export.add_argument("--to", type=Path, metavar="DIR", help="where to (default: RUN/export)")
    parity = commands.add_parser(
        "parity",
        help="prove on this machine that W processes compute what one would",
        description=_PARITY,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parity.add_argument("config", metavar="CONFIG", nargs="?", help=f"{_CONFIG_HELP} (default: a small network)")
    parity.add_argument("overrides", metavar="key=value", nargs="*", help=_OVERRIDES_HELP)
    parity.add_argument("--world-size", type=int, default=2, metavar="W", help="ranks on this machine (default 2)")
    parity.add_argument("--backend", choices=("ddp", "fsdp2", "deepspeed"), help="over parallel.backend")
    parity.add_argument("--steps", type=int, default=3, metavar="K", help="optimiser steps to compare after (default 3)")
    parity.add_argument(
        "--rows", type=int, default=4, metavar="B", help="images a rank (default 4); one process holds W times as many"
    )
    parity.add_argument("--json", action="store_true", help="print one JSON object")
    parity.add_argument("--debug", action="store_true", help="show tracebacks")
    bench = commands.add_parser(
        "bench",
        help="measure the loss, the gather or the training step on this machine, beside others'",
        description=_BENCH,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("bench", choices=("contrast", "step", "gather"), help="what to measure")
    bench.add_argument("--json", action="store_true", help="print one JSON object: versions, machine, notes, rows")
    bench.add_argument("--quick", action="store_true", help="only small sizes, few repeats: a minute")
    bench.add_argument("--debug", action="store_true", help="show tracebacks")
    doctor = commands.add_parser("doctor", help="check versions, devices, collectives, shards, disk, shared memory, MLflow")
    doctor.add_argument("--debug", action="store_true", help="show tracebacks")
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help="check what this recipe needs, too")
    doctor.add_argument("overrides", metavar="key=value", nargs="*", help=_OVERRIDES_HELP)
    return parser


def _resolve(arguments: argparse.Namespace) -> tuple[Config, dict[str, str]]:
    """The settings of recipe, command line and environment."""
    from clae_dist.recipe import resolve

    config, origins = resolve(arguments.config, arguments.overrides)
    store = os.environ.get("MLFLOW_TRACKING_URI", "")
    if store and not config.tracking.uri:
        config = replace(config, tracking=replace(config.tracking, uri=store))
        origins["tracking.uri"] = "MLFLOW_TRACKING_URI"
    return config, origins


def _train(arguments: argparse.Namespace) -> int:
    from clae_dist.launchers import start

    config, origins = _resolve(arguments)
    if arguments.launcher:
        config = replace(config, launch=replace(config.launch, launcher=arguments.launcher))
        origins["launch.launcher"] = "command line"
    ending = start(config, origins, arguments.debug)
    if ending.message:
        print(f"clae: {ending.message}", file=sys.stderr)
    return ending.code


def _config(arguments: argparse.Namespace) -> int:
    from clae_dist.recipe import to_yaml

    config, origins = _resolve(arguments)
    print(to_yaml(config, origins), end="")
    return 0


def _dry_run(arguments: argparse.Namespace) -> int:
    from clae_dist.launchers.dry_run import dry_run

    config, origins = _resolve(arguments)
    if arguments.launcher:
        config = replace(config, launch=replace(config.launch, launcher=arguments.launcher))
    ending = dry_run(config, origins, arguments.debug)
    print(
        f"clae: {ending.message}" if ending.code else f"dry run passed: {ending.message}",
        file=sys.stderr if ending.code else sys.stdout,
    )
    return ending.code


def _evaluate(arguments: argparse.Namespace) -> int:
    from clae_dist.training.finish import evaluate

    evaluate(arguments.run)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from clae_dist.training.finish import report

    report(arguments.run, arguments.compare)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from clae_dist.training.finish import export

    export(arguments.run, arguments.to)
    return 0


def _parity(arguments: argparse.Namespace) -> int:
    from clae_dist.config import ConfigError
    from clae_dist.parity.run import DEMO, parity

    for flag in ("world_size", "steps", "rows"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}; use at least 1.")
    if arguments.config and "=" in arguments.config and not os.path.exists(arguments.config):
        arguments.overrides.insert(0, arguments.config)
        arguments.config = None
    if not arguments.config:
        arguments.overrides = [*DEMO, *arguments.overrides]
    if arguments.backend:
        arguments.overrides.append(f"parallel.backend={arguments.backend}")
    config, origins = _resolve(arguments)
    ending = parity(config, origins, arguments.world_size, arguments.rows, arguments.steps, arguments.json)
    if ending.message:
        print(ending.message, file=sys.stderr if ending.message.startswith("clae: ") else sys.stdout)
    return ending.code


def _bench(arguments: argparse.Namespace) -> int:
    from clae_dist.bench import run_bench

    return run_bench(
        arguments.bench, arguments.quick, arguments.json, print, lambda text: print(text, file=sys.stderr, flush=True)
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from clae_dist.doctor import run_doctor

    config = _resolve(arguments)[0] if arguments.config else None
    return run_doctor(config, print)


_COMMANDS = {
    "train": _train,
    "config": _config,
    "dry-run": _dry_run,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
    "parity": _parity,
    "bench": _bench,
    "doctor": _doctor,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code. A user's mistake is one readable line, with --debug its traceback, too."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes no settings after an option
        if not hasattr(arguments, "overrides") or any(text.startswith("-") or "=" not in text for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    try:
        return _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        print("clae: ended by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        from clae_dist.launchers.rank import UNEXPECTED, exit_code

        code = exit_code(error)
        if arguments.debug:
            traceback.print_exc()
        hint = "" if code != UNEXPECTED or arguments.debug else " (--debug shows where)"
        name = f"{type(error).__name__}: " if code == UNEXPECTED else ""
        print(f"clae: {name}{error}{hint}", file=sys.stderr)
        return code
