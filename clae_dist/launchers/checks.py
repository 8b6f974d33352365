"""Checks that every rank would make, made before ranks start: starting those of Ray takes a minute."""

from __future__ import annotations

from clae_dist.config import Config
from clae_dist.launchers.local import default_workers
from clae_dist.models import check_model
from clae_dist.runs.claim import check_run_folder
from clae_dist.tracking import check_tracking
from clae_dist.training.extending import check_parent
from clae_dist.training.sets import check_sets


def check_run(config: Config, *, with_images: bool = True) -> None:
    """Checks settings, images, encoder, tracking and run folder as far as that is possible without ranks.

    `with_images` False: the run has images of its own (a dry run without data.shards). Raises ConfigError and DataError.
    """
    config.rows_per_rank(config.launch.workers or default_workers(config.launch.device))
    train = check_sets(config) if with_images else None
    check_tracking(config, config.folder)
    identity = check_run_folder(config, train)
    if config.train.parent and identity is None:
        check_parent(config, train)
    check_model(config)
