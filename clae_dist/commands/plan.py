"""`clae plan`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clae_dist.commands.arguments import add_config, add_trust
from clae_dist.commands.settings import check_trust, resolved
from clae_dist.errors import OK, ConfigError
from clae_dist.escape import in_json, say
from clae_dist.options import Parser, user_path

if TYPE_CHECKING:
    from clae_dist.config import Config
    from clae_dist.planner.costs import Images
    from clae_dist.planner.plan import Request
    from clae_dist.planner.table import Chip

SUMMARY = "predict time, memory, cost and failures of a run on any number of GPUs, before anything is started"
DESCRIPTION = """\
Predicts a run for each backend that fits: seconds of a step by part, images/s, memory of a rank by part and the largest
micro-batch that fits, cores and storage of a node, checkpoints, failures and goodput, hours, energy and money; then a curve
over ranks with the point where more of them stop paying, what limits the run, and the three changes that would help most.

Nothing is started and no GPU is needed: one real training step runs on tensors without memory, and its operations, bytes,
collectives and live tensors are counted. Chips and networks are a table of data sheets, of which kernels are assumed to reach
a share; --measured replaces it by your own figures. clae_dist/planner/README.md says what is counted, what is assumed and how
close the plan was where it could be compared.
"""
_EPILOG = """\
examples:
  clae plan imagenet/clae --ranks 256 --gpu h100 --network ib-400 --price 2.5
  clae plan imagenet/clae-vit-s batch.global_size=8192 --ranks 64 --gpu a100 --network efa-400 --json
  clae bench step --json > step.json; clae bench gather --json > gather.json
  clae plan quickstart --ranks 2 --gpu cpu --measured step.json gather.json
  clae plan imagenet/clae --gpu h100 --network ib-400 --as-if-world 256    on a machine with one such GPU
"""


def add_arguments(parser: Parser) -> None:
    parser.epilog = _EPILOG + "\n" + (parser.epilog or "")
    add_config(parser)
    parser.add_argument("--ranks", type=int, metavar="W", help="ranks, one a GPU (default: those of --as-if-world)")
    parser.add_argument("--gpu", required=True, metavar="CHIP", help="h100, a100, … (an unknown one prints the list), or cpu")
    parser.add_argument("--network", metavar="NAME", help="network between nodes: ib-400, ethernet-100, …")
    parser.add_argument("--per-node", type=int, default=0, metavar="N", help="ranks of a node (default: as usual for the chip)")
    parser.add_argument(
        "--measured", type=user_path, nargs="+", default=[], metavar="FILE", help="outputs of clae bench --json, or verify.json"
    )
    parser.add_argument(
        "--as-if-world",
        type=int,
        metavar="N",
        help="run steps of one real rank here with the shapes of N ranks, without messages, and plan with their time",
    )
    parser.add_argument("--force", action="store_true", help="use measured files of another machine or version")
    parser.add_argument("--price", type=float, default=0.0, metavar="MONEY", help="price of a rank an hour")
    parser.add_argument(
        "--mtbf",
        type=float,
        metavar="HOURS",
        help="mean hours between failures of a node (default: 6335, of Llama 3's training)",
    )
    parser.add_argument(
        "--images", type=int, default=0, metavar="N", help="images of an epoch (default: those of data.shards, else 1,281,167)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--to", type=user_path, metavar="FILE", help="write the JSON object to this file as well")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    for name in ("ranks", "as_if_world", "price", "mtbf", "images", "per_node"):
        value = getattr(arguments, name)
        least = 1 if name in ("ranks", "as_if_world") else 0
        if value is not None and (not math.isfinite(value) or value < least or (name == "mtbf" and not value)):
            raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; use a number above {max(0, least - 1)}.")
    ranks = arguments.ranks or arguments.as_if_world
    if not ranks:
        raise ConfigError("--ranks is missing: the ranks of the run to plan, such as --ranks 64.")
    recipe = check_trust(arguments, resolved(arguments))
    from clae_dist.bench.outcome import machine, versions
    from clae_dist.devices import local_device
    from clae_dist.planner.costs import NODE_MTBF_H, Prices
    from clae_dist.planner.measured import Here, read_measured
    from clae_dist.planner.page import as_object, lines
    from clae_dist.planner.plan import Request, make_plan
    from clae_dist.planner.table import chip_of, network_of

    here = Here(versions(), machine(local_device("cpu")))
    on_cpu = arguments.gpu == "cpu"
    chip = _this_machine(str(here.machine["cpu"]), arguments.per_node or ranks) if on_cpu else chip_of(arguments.gpu)
    config = recipe.config
    precision: Any = chip.precision(config.train.precision)
    config = replace(config, train=replace(config.train, precision=precision))
    request = Request(
        config,
        ranks,
        chip,
        network_of(arguments.network) if arguments.network else None,
        arguments.per_node or chip.per_node,
        _images(config, arguments.images),
        Prices(arguments.price, arguments.mtbf or NODE_MTBF_H),
        read_measured(arguments.measured, chip, here, force=arguments.force),
        cores=int(here.machine["cores"]) if on_cpu else 0,
        say=lambda text: print(f"plan: {text}", file=sys.stderr, flush=True),
    )
    if arguments.as_if_world:
        _measure(request, arguments.as_if_world)
    plan = make_plan(request)
    text = in_json(json.dumps(as_object(plan), indent=1))
    if arguments.to:
        from clae_dist.files import write_together

        write_together({arguments.to: text.encode()})
    if arguments.json:
        print(text)
        return OK
    for line in lines(plan):
        say(line)
    return OK


def _measure(request: Request, ranks: int) -> None:
    """Add a real step on this machine to what the plan is made from."""
    from clae_dist.bench.real_step import measure_as_one_of
    from clae_dist.devices import local_device
    from clae_dist.planner.page import line_of

    config, chip = request.config, request.chip
    device = local_device("auto" if chip.is_gpu else "cpu")
    if chip.is_gpu and device.type != "cuda":
        raise ConfigError(f"--as-if-world steps on this machine, which has no GPU, but --gpu is {chip.name}; use --gpu cpu.")
    if config.parallel.backend == "deepspeed":
        raise ConfigError(
            "--as-if-world steps under ddp or fsdp2, and parallel.backend is deepspeed; add parallel.backend=ddp."
        )
    request.say(f"steps of one real rank with the shapes of {ranks}")
    step, sample = measure_as_one_of(config, ranks, request.norm_ranks(ranks), device)
    request.measured.samples.append(sample)
    request.measured.real_step = step
    request.say(line_of(step))


def _this_machine(cpu: str, ranks: int) -> Chip:
    """The CPU of this machine as a chip, of which every rank has a part. Its rates are those that were measured."""
    from clae_dist.planner.table import Chip

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    return Chip("cpu", cpu, memory, 0.0, 0.0, "memory", ranks, 0.0, "this machine")


def _images(config: Config, given: int) -> Images:
    """The images of an epoch: as given, else of data.shards if that is a folder here, else as many as ImageNet has."""
    from clae_dist.planner.costs import IMAGE_BYTES, IMAGES, Images

    shards = config.data.shards
    if given:
        return Images(given, IMAGE_BYTES, "--images; ImageNet's mean size")
    if shards and "://" not in shards and Path(shards).is_dir():
        from clae_dist.data.shard_set import open_shards

        manifest = open_shards(config.data)
        split = config.data.train_split
        count = manifest.num_samples(split)
        return Images(count, sum(shard.bytes for shard in manifest.shards(split)) / max(1, count), manifest.name)
    return Images(IMAGES, IMAGE_BYTES, "ImageNet's train split; --images N for another set")
