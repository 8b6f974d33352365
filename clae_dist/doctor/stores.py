"""Where a run writes and reads: disk, tracking, shards."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from clae_dist.config import Config, ConfigError
from clae_dist.doctor.finding import GIB, Finding

FREE_DISK_BYTES = 5 * GIB  # a ResNet-50 checkpoint with its optimiser is 0.2 GiB; three are kept, and a run has logs
ROOM_FOR = {
    "run folder": "checkpoints need room for train.checkpoint_keep + 1 of them; free some or choose another run_dir.",
    "cache": "the next environment (after pyproject.toml changes) takes 6 GiB; free some or set CLAE_CACHE to another disk.",
}


def disk(config: Config | None) -> Iterator[Finding]:
    folders = {"run folder": (config or Config()).folder, "cache": Path(sys.prefix).parent}
    if config is not None and config.data.shards:
        folders["shards"] = Path(config.data.shards)
    for what, folder in folders.items():
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        found = f"{free / GIB:.1f} GiB free at {folder}"
        if what == "run folder" and not os.access(existing, os.W_OK):
            yield Finding("problem", what, f"{existing} is not writable", "choose another with run_dir=….")
        elif what != "shards" and free < FREE_DISK_BYTES:
            advice = ROOM_FOR[what]
            yield Finding("problem" if free < GIB // 2 else "warning", what, found, advice)
        else:
            yield Finding("ok", what, found)


def mlflow_store(config: Config | None) -> Iterator[Finding]:
    """Whether runs can be recorded: the server answers, or the database's folder can be written."""
    asked = config is not None  # without a recipe nobody asked for MLflow
    config = config or Config()
    if config.tracking.name == "none":
        yield Finding("ok", "mlflow store", "tracking.name is none")
        return
    from clae_dist.tracking.mlflow import require_mlflow, store_problem, store_uri

    try:
        require_mlflow()
        uri = store_uri(config, config.folder)
    except ConfigError as error:
        yield Finding("problem" if asked else "warning", "mlflow store", "cannot be used", str(error))
        return
    problem = store_problem(uri)
    if problem:
        advice = "a run goes on without it; start the server, correct tracking.uri, or tracking.name=none."
        yield Finding("warning", "mlflow store", f"{uri}: {problem}", advice)
    else:
        yield Finding("ok", "mlflow store", uri)


def shards(config: Config | None) -> Iterator[Finding]:
    if config is None:
        yield Finding("ok", "shards", "not checked: `clae doctor CONFIG data.shards=FOLDER` checks them")
        return
    if not config.data.shards:
        yield Finding("warning", "shards", "data.shards is empty", "name the folder that `python -m data_prep` wrote.")
        return
    from clae_dist.data.manifest import DataError, check_shard, load_manifest

    try:
        manifest = load_manifest(config.data.shards)
        for split in dict.fromkeys((config.data.train_split, config.data.test_split)):
            for shard in manifest.shards(split):
                check_shard(manifest.folder, shard, "size")
        images = manifest.num_samples(config.data.train_split)
        config.rows_per_rank(max(1, config.launch.workers))
    except (DataError, ConfigError) as error:
        yield Finding("problem", "shards", str(error).split("; ")[0], str(error).split("; ", 1)[-1])
        return
    if images < config.batch.global_size:
        advice = f"an epoch needs one batch at least; batch.global_size={images} or fewer."
        yield Finding("problem", "shards", f"{images} images, batch.global_size {config.batch.global_size}", advice)
        return
    found = f"{manifest.name}: {images} images to train on, sizes match, digest {manifest.digest[:12]}"
    yield Finding("ok", "shards", f"{found}; `python -m data_prep verify {manifest.folder}` compares every byte")
