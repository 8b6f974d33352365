"""A run's length, checkpoints, failures, energy and money, from the seconds of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from clae_dist.config import Config
from clae_dist.planner.measured import Measured
from clae_dist.planner.table import Chip
from clae_dist.planner.trace import Traced

# What is assumed where nothing was measured.
IMAGES = 1_281_167  # ImageNet's train split
IMAGE_BYTES = 115_000  # the mean of its JPEGs
IMAGES_PER_CORE_S = 200.0  # a JPEG of ImageNet to two crops of 224 pixels
WRITTEN_BYTES_PER_S = 1e9  # a node's, to shared storage
COPIED_BYTES_PER_S = 20e9  # from a GPU to its host
RESTART_S = 120.0
# Hours between failures of a node with 8 GPUs: 419 interruptions of 16,384 GPUs in 54 days.
# Reference: Grattafiori et al. 2024, The Llama 3 Herd of Models, section 3.3.4.
NODE_MTBF_H = 2048 * 54 * 24 / 419


@dataclass(frozen=True)
class Images:
    """The images of an epoch, their mean size, and where the numbers are from."""

    count: int
    mean_bytes: float
    source: str


@dataclass(frozen=True)
class Prices:
    """Dollars (or any unit) an hour of a rank, and hours between failures of a node; 0: unknown."""

    rank_hour: float = 0.0
    node_mtbf_h: float = NODE_MTBF_H


@dataclass(frozen=True)
class Costs:
    """The costs of a run. `goodput`: share of the time in steps whose result is kept, with checkpoints and failures."""

    steps: int
    images_per_s: float
    checkpoint_bytes: float
    checkpoint_blocks_s: float
    checkpoint_committed_s: float
    checkpoint_every_s: float
    failures: float
    goodput: float
    hours: float
    energy_kwh: float
    money: float
    node_cores: float
    node_read_bytes_per_s: float

    def as_dict(self) -> Mapping[str, float]:
        return dict(vars(self))


def costs_of(
    config: Config, traced: Traced, step_s: float, chip: Chip, per_node: int, images: Images, prices: Prices, measured: Measured
) -> Costs:
    """Raises no error for a set of less than one batch: it is one step an epoch."""
    size, ranks = config.batch.global_size, traced.ranks
    steps = max(1, round(config.train.epochs * max(1, images.count // size)))
    nodes = -(-ranks // per_node)
    images_per_s = size / step_s
    saved = traced.checkpoint_bytes
    share = saved / ranks  # ranks write their own pieces
    blocks_s = share * measured.blocked_s_per_byte if measured.blocked_s_per_byte else share / COPIED_BYTES_PER_S
    committed_s = saved / nodes / (measured.written_bytes_per_s or WRITTEN_BYTES_PER_S)
    every_s = checkpoint_interval_s(config, step_s)
    goodput = goodput_of(every_s, blocks_s, prices.node_mtbf_h / nodes * 3600)
    hours = steps * step_s / goodput / 3600
    node_rate = images_per_s / nodes
    return Costs(
        steps=steps,
        images_per_s=images_per_s,
        checkpoint_bytes=saved,
        checkpoint_blocks_s=blocks_s,
        checkpoint_committed_s=committed_s,
        checkpoint_every_s=every_s,
        failures=hours * nodes / prices.node_mtbf_h,
        goodput=goodput,
        hours=hours,
        energy_kwh=hours * ranks * chip.watts / 1000,
        money=hours * ranks * prices.rank_hour,
        node_cores=node_rate / (measured.images_per_core_s or IMAGES_PER_CORE_S),
        node_read_bytes_per_s=node_rate * images.mean_bytes,
    )


def checkpoint_interval_s(config: Config, step_s: float) -> float:
    """Seconds between checkpoints; infinite: none but at the end."""
    steps, minutes = config.checkpoint.every_steps, config.checkpoint.every_minutes
    return min([steps * step_s] * bool(steps) + [60 * minutes] * bool(minutes), default=math.inf)


def goodput_of(every_s: float, blocks_s: float, mtbf_s: float) -> float:
    """Share of the time in steps that count: a failure costs a restart and, on average, half of the steps since a checkpoint.

    Without checkpoints, all of what was done is lost: half of the mean time between failures.
    """
    overhead = blocks_s / every_s
    lost = (RESTART_S + min(every_s, mtbf_s) / 2) / mtbf_s
    return 1 / (1 + overhead + lost)


def best_interval_s(blocks_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints with the least loss. Reference: Young 1974; Daly 2006, equation 1."""
    return math.sqrt(2 * blocks_s * mtbf_s)
