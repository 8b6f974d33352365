"""The images of a run, for checks and measurements of its export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from clae_dist.config import Config
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.manifest import Manifest
from clae_dist.data.shard_set import open_shards
from clae_dist.errors import ConfigError, DataError
from clae_dist.runs.trust import NOTHING, Permission, open_run


@dataclass(frozen=True)
class RunImages:
    """An opened set of images with the settings of a run."""

    config: Config
    manifest: Manifest

    def split(self, name: str, limit: int = 0) -> EvaluationSet:
        """Centre views of a split, or of a choice of `limit` images that is the same for every run."""
        return EvaluationSet(self.manifest, name, self.config.data.image_size, limit)

    def views(self, name: str, limit: int) -> torch.Tensor:
        """uint8 (n, 3, S, S): such a choice of a split, without undecodable images. Raises DataError if none is left."""
        images = self.split(name, limit)
        views = images.images(images.ids).views
        if not len(views):
            raise DataError(f"no image of {self.manifest.where}, split {name!r}, can be decoded; prepare the set again.")
        return views


def open_images(run_dir: Path, shards: str = "", permission: Permission = NOTHING) -> RunImages:
    """The run's images, or those at `shards`. Raises ConfigError or DataError if they cannot be opened."""
    config = open_run(run_dir, permission).to_read_images(shards)
    return RunImages(config, open_shards(config.data))


def some_views(images: RunImages | None, count: int, image_size: int) -> tuple[torch.Tensor, str]:
    """uint8 (n, 3, S, S) with at most `count` images and their origin: the test split, else train, else made-up noise."""
    if images is not None:
        data = images.config.data
        split = data.test_split if data.test_split in images.manifest.splits else data.train_split
        views = images.views(split, count)
        return views, f"{len(views)} images of {split}"
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (count, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
    return views, f"{count} images of noise, because the run's images cannot be opened here"


def images_if_there(run_dir: Path, shards: str = "", permission: Permission = NOTHING) -> RunImages | None:
    """`open_images`, or None where the images of the run cannot be opened; those that `shards` names must."""
    try:
        return open_images(run_dir, shards, permission)
    except (ConfigError, DataError):
        if shards:
            raise
        return None
