"""The parts of a run that the training step works with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from clae_dist.config import Augment, Config
from clae_dist.contrast.distributed import Contrast
from clae_dist.contrast.encoding import TrainingEncoding
from clae_dist.contrast.step import Pretraining
from clae_dist.data.augment_views import augment_views
from clae_dist.data.draws import hashed
from clae_dist.data.loader import LoadedBatch
from clae_dist.data.noise import uniform_noise
from clae_dist.methods import make_method
from clae_dist.models.norms import routes_are_one_function
from clae_dist.parallel import Backend
from clae_dist.training.clock import Clock
from clae_dist.world import World


def make_pretraining(
    config: Config,
    world: World,
    backend: Backend,
    clock: Clock,
    pseudo_labels: torch.Tensor | None = None,
    beside: Callable[[], None] = lambda: None,
) -> Pretraining:
    """Collect the parts of a run that a training step works with.

    Args:
        pseudo_labels: of all images, for a method that has classifiers; by default made up, for rehearsals without images.
        beside: called once a step, when the device has its forwards and backwards to do.
    """
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32
    flips_alone = config.augment.weakened(0.0)

    def settings_of(number: int, strength: float) -> Augment | None:
        strong = config.augment.weakened(strength)
        weak = config.method.weak_second_view if number == 1 else config.method.third_view == "weak"
        return flips_alone if number and weak else strong if number < 2 else None

    def augmented(batch: LoadedBatch) -> tuple[torch.Tensor, ...]:
        num_views = len(batch.views)
        settings = [settings_of(number, batch.strength) for number in range(num_views)]
        views = augment_views(batch.views, batch.draws[:num_views], settings, world.device, dtype)
        if batch.local is None:
            return tuple(views)
        settings = [config.augment.weakened(batch.strength)] * len(batch.local)
        return (*views, *augment_views(batch.local, batch.draws[num_views:], settings, world.device, dtype))

    def noise(batch: LoadedBatch, number: int) -> torch.Tensor:
        return uniform_noise(batch.draws[number], batch.views.shape[2:], world.device).to(dtype)

    return Pretraining(
        world=world,
        method=make_method(config.method),
        attack=config.attack,
        contrast=Contrast(config.objective, world),
        encoding=TrainingEncoding(backend, config.batch.micro_size),
        pixel_std=backend.model.std,
        shared_norms=routes_are_one_function(backend.model),
        augment=augmented,
        noise=noise,
        state=backend.method_state,
        pseudo_labels=made_up_labels(config) if pseudo_labels is None else pseudo_labels,
        timed=clock.timed,
        beside=beside,
    )


def made_up_labels(config: Config) -> torch.Tensor:
    """Pseudo-labels of as many images as a global batch has, of which the first was not clustered."""
    ids, counts = torch.arange(config.batch.global_size), config.method.cluster_counts
    labels = torch.stack([ids % count for count in counts], 1) if counts else ids[:, None]
    return torch.where(ids[:, None] == 0, -1, labels)


def seed_step(config: Config, step: int, rank: int) -> None:
    """Seed dropout and the like by step: a resumed run draws what an undisturbed one would have drawn."""
    torch.manual_seed(int(hashed(config.seed, step, rank)[0] >> np.uint64(1)))
