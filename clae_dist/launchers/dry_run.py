"""`clae dry-run`: a run of one step with few rows, in a folder that is removed."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from clae_dist.data.shard_set import open_shards
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.data.urls import redact_list
from clae_dist.launchers import start
from clae_dist.launchers.checks import check_run
from clae_dist.launchers.local import default_workers
from clae_dist.launchers.rank import Ending
from clae_dist.recipe import Recipe
from clae_dist.training.plan import Plan
from clae_dist.wording import count_of

_ROWS = 4  # a rank


def dry_run(recipe: Recipe, *, debug: bool = False) -> Ending:
    """Run one step of a recipe on its own launcher, encoder and shards, with 4 rows a rank, in a folder that is removed.

    Without data.shards, the images are noise. Raises ConfigError and DataError.
    """
    config = recipe.config
    workers = config.launch.workers or default_workers(config.launch.device)
    check_run(config, with_images=bool(config.data.shards))
    with tempfile.TemporaryDirectory(prefix="clae-dry-run-") as folder:
        size = _ROWS * workers
        if config.data.shards:
            manifest, images = open_shards(config.data), f"images of {redact_list(config.data.shards)}"
            if not config.data.mixture:  # a mixture's images are counted together, by check_run
                Plan.of(config, manifest.num_samples(config.data.train_split))
        else:
            config = replace(config, data=replace(config.data, shards=str(Path(folder) / "shards")))
            manifest = write_synthetic_set(Path(folder) / "shards", 2 * size, config.data.image_size)
            images = "images of noise (data.shards is empty)"
        total = manifest.num_samples(config.data.train_split)
        few_rows = config.with_few_rows(_ROWS, workers)
        tiny = replace(
            few_rows,
            run_dir=str(Path(folder) / "run"),
            data=replace(few_rows.data, verify="size", mixture={}),
            optim=replace(config.optim, warmup_epochs=0.0),
            train=replace(config.train, epochs=1 / max(1, total // size), knn_every=0.0, log_every=1, parent=""),
            launch=replace(config.launch, max_failures=0),
            tracking=replace(config.tracking, name="none"),
        )
        ending = start(recipe._replace(config=tiny), debug=debug)
    alone = ", without the other sets of data.mixture" if config.data.mixture else ""
    what = f"one step of {size} {images}{alone}"
    message = f"{config.model.encoder} on {count_of(workers, 'rank')}, {what}; tracking and evaluation were skipped"
    return replace(ending, message=ending.message if ending.code else message)
