"""The length of a run in steps, and the lines that describe a run before it starts."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from clae_dist.config import Config
from clae_dist.contrast.step import Moment
from clae_dist.cores import usable_cores
from clae_dist.data.loader import num_workers
from clae_dist.errors import DataError
from clae_dist.parallel import Backend
from clae_dist.parallel.optim import learning_rate_at
from clae_dist.wording import count_of
from clae_dist.world import World


@dataclass(frozen=True)
class Plan:
    """The length of a run, in steps."""

    config: Config
    num_samples: int
    steps_per_epoch: int
    total: int
    warmup: int
    knn_every: int  # 0: never

    @staticmethod
    def of(config: Config, num_samples: int) -> Plan:
        """The plan for a split of `num_samples` images. Raises DataError if there are fewer than one global batch."""
        size = config.batch.global_size
        steps = num_samples // size
        if not steps:
            raise DataError(
                f"the {config.data.train_split} split has {num_samples} images, fewer than batch.global_size {size}; "
                f"use batch.global_size={1 << max(1, num_samples.bit_length() - 1)} or more images."
            )

        def in_steps(epochs: float, at_least: int = 0) -> int:
            return max(at_least, round(epochs * steps)) if epochs else 0

        return Plan(
            config,
            num_samples,
            steps,
            total=in_steps(config.train.epochs, at_least=1),
            warmup=in_steps(config.optim.warmup_epochs),
            knn_every=in_steps(config.train.knn_every, at_least=1),
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        config = self.config
        factors = {int(epoch) * self.steps_per_epoch: factor for epoch, factor in config.optim.factors.items()}
        return learning_rate_at(step, self.total, self.warmup, config.learning_rate(), config.optim.schedule, factors)

    def moment(self, step: int) -> Moment:
        """A step as the method sees it."""
        return Moment(step, self.steps_per_epoch, self.config.train.epochs)

    def images_seen(self, step: int) -> int:
        return step * self.config.batch.global_size


def describe(plan: Plan, world: World, backend: Backend) -> Iterator[str]:
    """Yield the lines that the console prints before the first step: what was chosen, and why. Collective: exhaust it."""
    config = plan.config
    size, rows = config.batch.global_size, config.rows_per_rank(world.size)
    micro = f", {config.batch.micro_size} at a time with all negatives" if config.batch.micro_size else ""
    projector = "with" if config.method.embeds == "projections" else "without"
    group = config.model.norm_group
    of_group = "" if group == "all" else " of each node" if group == "node" else f" of each {group} ranks"
    streams = f"{1 + len(config.data.mixture)} sets" if config.data.mixture else f"{config.num_streams} canonical streams"
    hosts = sorted(set(world.gather_objects(platform.node())))
    yield (
        f"ranks: {world.size} on {count_of(len(hosts), 'host')}, {world.device.type}, "
        f"{count_of(torch.get_num_threads(), 'torch thread')} each; {backend.describe()}"
    )
    products = "in TF32 (train.tf32)" if config.train.tf32 else "without TF32"
    rounding = f"; float32 products {products}" if world.device.type == "cuda" else ""
    yield f"precision: {backend.precision} ({backend.precision_reason}){rounding}"
    yield (
        f"model: {config.model.encoder} {projector} projector, {backend.num_parameters:,} parameters, "
        f"{config.model.norm} batch statistics{of_group}"
    )
    yield (
        f"batch: {size} images = {world.size} x {rows}{micro}; {streams}; "
        f"{count_of(num_workers(config, world.local_size), 'loader process', 'loader processes')} a rank "
        f"({count_of(usable_cores(), 'core')} for {count_of(world.local_size, 'rank')})"
    )
    skipped = 0 if config.data.mixture else plan.num_samples - plan.steps_per_epoch * size
    rest = f"; {skipped:,} are skipped, different ones each epoch" if skipped else ""
    yield f"epoch: {plan.num_samples:,} images = {count_of(plan.steps_per_epoch, 'step')}{rest}"
    yield (
        f"length: {count_of(plan.total, 'step')}, {count_of(config.train.epochs, 'epoch')}; "
        f"peak learning rate {config.learning_rate():.4g} ({config.optim.name}, {config.optim.scaling} scaling)"
    )
    yield config.method.describe(config.attack)
