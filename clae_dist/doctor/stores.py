"""Check the places that a run writes to and reads from: disk, tracking store, shards."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

from clae_dist.config import Config, Data
from clae_dist.doctor.finding import GIB, Finding
from clae_dist.errors import ConfigError
from clae_dist.redact import redact_text
from clae_dist.staging import is_url, url_of

FREE_DISK_BYTES = 5 * GIB  # a ResNet-50 checkpoint with its optimiser is 0.2 GiB; three are kept, and a run has logs
ROOM_FOR = {
    "run folder": "it must hold checkpoint.keep + 1 checkpoints; free some space or choose another run_dir.",
    "shard cache": "remote shards are cached there; free some space or choose another folder with data.cache=….",
    "cache": "the next environment (after a change of pyproject.toml) takes 6 GiB; free some space or set CLAE_CACHE.",
}
WRITTEN = {"run folder": "run_dir", "shard cache": "data.cache"}  # and their settings


def disk(config: Config | None) -> Iterator[Finding]:
    config = config or Config()
    folders = {"run folder": config.folder, "cache": Path(sys.prefix).parent}
    if config.data.shards:
        folders |= _shard_folders(config.data)
    for what, folder in folders.items():
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        found = f"{free / GIB:.1f} GiB free at {folder}"
        if what in WRITTEN and not os.access(existing, os.W_OK):
            yield Finding("problem", what, f"{existing} is not writable", f"choose another with {WRITTEN[what]}=….")
        elif what == "shard cache" and free < config.data.cache_bytes:
            advice = "free some space, lower data.cache_bytes, or choose another folder with data.cache=…."
            found += f", data.cache_bytes is {config.data.cache_bytes / GIB:.1f} GiB"
            yield Finding("warning", what, found, advice)
        elif what != "shards" and free < FREE_DISK_BYTES:
            advice = ROOM_FOR[what]
            yield Finding("problem" if free < GIB // 2 else "warning", what, found, advice)
        else:
            yield Finding("ok", what, found)


def run_bucket(config: Config | None) -> Iterator[Finding]:
    """Check that the bucket of a run on object storage can be written to."""
    if config is None or not is_url(config.run_dir):
        return
    from clae_dist.object_store import StoreError, check_store

    try:
        check_store(config.folder)
        yield Finding("ok", "bucket", f"{url_of(config.folder)} can be written, listed and read")
    except (ConfigError, StoreError) as error:
        text = redact_text(str(error))
        yield Finding("problem", "bucket", text.split("; ")[0], text.split("; ", 1)[-1])


def _shard_folders(data: Data) -> dict[str, Path]:
    """The folder of local shards, or that of the cache of remote ones."""
    from clae_dist.data.remote import Fetching
    from clae_dist.data.shard_set import entries_of
    from clae_dist.data.urls import local_path, scheme

    try:
        first = entries_of(data.shards)[0]
    except ConfigError:  # reported by `shards`
        return {}
    return {"shard cache": Fetching.of(data).cache.folder} if scheme(first) else {"shards": Path(local_path(first))}


def mlflow_store(config: Config | None) -> Iterator[Finding]:
    """Check that runs can be recorded: the server responds, or the database's folder is writable."""
    asked = config is not None  # without a recipe, MLflow was not requested
    config = config or Config()
    if not config.tracking.uses("mlflow"):
        yield Finding("ok", "mlflow store", f"tracking.name is {config.tracking.name}")
        return
    from clae_dist.data.urls import uri_without_secrets
    from clae_dist.tracking.mlflow import require_mlflow, store_problem, store_uri

    try:
        require_mlflow()
        uri = store_uri(config, config.folder)
    except ConfigError as error:
        yield Finding("problem" if asked else "warning", "mlflow store", "cannot be used", str(error))
        return
    problem = store_problem(uri)
    if problem:
        advice = "a run continues without it; start the server, correct tracking.uri, or tracking.name=none."
        yield Finding("warning", "mlflow store", f"{uri_without_secrets(uri)}: {problem}", advice)
    else:
        yield Finding("ok", "mlflow store", uri_without_secrets(uri))


def shards(config: Config | None) -> Iterator[Finding]:
    if config is None:
        yield Finding("ok", "shards", "not checked: `clae doctor CONFIG data.shards=FOLDER` checks them")
        return
    if not config.data.shards:
        yield Finding("warning", "shards", "data.shards is empty", "name the folder that `python -m data_prep` wrote.")
        return
    from clae_dist.data.manifest import check_shard
    from clae_dist.data.shard_set import entries_of, open_shards
    from clae_dist.data.urls import is_tar
    from clae_dist.errors import DataError

    try:
        entries = entries_of(config.data.shards)
        if is_tar(entries[0]):
            yield from _plain_shards(entries)
            return
        manifest = open_shards(replace(config.data, retries=min(1, config.data.retries)))  # do not wait for minutes
        for split in dict.fromkeys((config.data.train_split, config.data.test_split)):
            for shard in manifest.shards(split) if manifest.files is None else ():
                check_shard(manifest.folder, shard, "size")
        if manifest.files is not None:
            manifest.files.open_index(manifest.shards(config.data.train_split)[0]).close()
        images = manifest.num_samples(config.data.train_split)
        config.rows_per_rank(max(1, config.launch.workers))
    except (DataError, ConfigError) as error:
        yield _unusable(error)
        return
    if images < config.batch.global_size:
        advice = f"an epoch needs at least one batch; use batch.global_size={images} or less."
        yield Finding("problem", "shards", f"{images} images, batch.global_size {config.batch.global_size}", advice)
        return
    if manifest.files is None:
        state, checks = "sizes match", f"`python -m data_prep verify {manifest.folder}` compares every byte"
    else:
        state, checks = f"{manifest.where} answers", "shards are checked when they are fetched"
    yield Finding(
        "ok", "shards", f"{manifest.name}: {images} images to train on, {state}, digest {manifest.digest[:12]}; {checks}"
    )
    for name, share in config.data.mixture.items():
        try:
            other = open_shards(replace(config.data, shards=name, retries=min(1, config.data.retries)))
            other.shards(config.data.train_split)
            yield Finding("ok", "shards", f"{other.name}: {share:.3g} of every batch, at {other.where}")
        except (DataError, ConfigError) as error:
            yield _unusable(error)


def _unusable(error: Exception) -> Finding:
    return Finding("problem", "shards", str(error).split("; ")[0], str(error).split("; ", 1)[-1])


def _plain_shards(entries: list[str]) -> Iterator[Finding]:
    """Check that the first plain shard can be read; none is indexed, which would fetch them all."""
    from clae_dist.data.byte_streams import open_stream
    from clae_dist.data.urls import local_path, redact, scheme

    first, what = entries[0], f"{len(entries)} plain shards"
    try:
        if scheme(first):
            with closing(open_stream(first, 0, "", timeout_s=10.0)) as stream:
                first_bytes = stream.read()
        else:
            with Path(local_path(first)).open("rb") as file:
                first_bytes = file.read(1)
    except (OSError, HTTPException) as error:
        reason = redact_text(str(error)) or type(error).__name__
        yield Finding("problem", "shards", f"{what}: {redact(first)}: {reason}", "correct data.shards.")
        return
    if not first_bytes:
        yield Finding("problem", "shards", f"{what}: {redact(first)} is empty", "correct data.shards.")
        return
    advice = "neither files nor images are checked; `python -m data_prep index` adds a manifest."
    yield Finding("warning", "shards", f"{what} without a manifest; the first, {redact(first)}, can be read", advice)
