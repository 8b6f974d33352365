"""Pseudo-labels of the training images: clusters of their features by another encoder (method.pseudo_labels).

They are made when a run begins and kept in its folder. Later starts read them, on any number of ranks, and need the encoder no
more.

# N images of the training split, K clusterings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from clae_dist.data.manifest import Manifest
from clae_dist.data.together import together
from clae_dist.deploy.encoder import Encoder, load_encoder
from clae_dist.errors import ConfigError, DataError
from clae_dist.evaluation.features import Features, extract_each, gather_on_main
from clae_dist.evaluation.kmeans import kmeans
from clae_dist.evaluation.place import Place
from clae_dist.models import PretrainModel
from clae_dist.runs.checkpoint.safetensors_file import weights_digest
from clae_dist.runs.folder import Identity
from clae_dist.runs.pseudo_labels import read_pseudo_labels, write_pseudo_labels
from clae_dist.storage import writing
from clae_dist.training.session import Session
from clae_dist.training.sets import Sets


def open_source(source: str) -> tuple[Encoder, dict[str, str]]:
    """The encoder of a run or export, and its entry in run.json. Raises ConfigError."""
    try:
        encoder = load_encoder(source)
    except ConfigError as error:
        raise ConfigError(f"method.pseudo_labels is {source!r}, which cannot be used: {error}") from None
    return encoder, {"source": source, "digest": weights_digest(encoder.network.state_dict())}


def with_pseudo_labels(session: Session, sets: Sets, identity: Identity, progress: Callable[[], None]) -> Sets:
    """The sets with the pseudo-labels of the training images, which are made if the run folder has none yet. Collective.

    `progress` is called repeatedly meanwhile. Raises ConfigError and DataError, on every rank the same.
    """
    config, world, folder = session.config, session.world, session.folder
    counts, source = config.method.cluster_counts, config.method.clusters_from
    if not source:
        return sets
    if not world.run_on_main(folder.pseudo_labels_file.exists):
        if world.run_on_main(folder.find_checkpoints):  # k-means on another machine may give other clusters
            raise ConfigError(
                f"{str(folder.pseudo_labels)!r} is missing, with which this run was trained; restore it from a copy, or give "
                "another run_dir."
            )
        encoder, record = world.run_on_main(lambda: open_source(source))
        if record["digest"] != identity.pseudo_labels.get("digest"):
            raise ConfigError(
                f"method.pseudo_labels is {source!r}, whose weights have changed since this run was begun; restore them, or "
                "give another run_dir."
            )
        session.say(f"method.pseudo_labels: {source}: features of the training images, then {len(counts)} clusterings")
        features = _features(session, sets.train, encoder, progress)
        labels_NK = together(world, lambda: _clustered(session, features, progress) if features else None, progress)
        total = sets.train.num_samples(config.data.train_split)

        def write() -> int:
            assert features is not None
            assert labels_NK is not None
            table = torch.full((total, len(counts)), -1)
            table[features.ids_N] = labels_NK
            with writing(folder.path):
                write_pseudo_labels(folder, table, {**record, "clusters": list(counts)})
            return len(features)

        labelled = world.run_on_main(write)
        session.say(f"method.pseudo_labels: {labelled:,} of {total:,} images labelled; digest {record['digest'][:12]}")
    num_images = sets.train.num_samples(config.data.train_split)
    return replace(sets, pseudo_labels=world.run_on_main(lambda: read_pseudo_labels(folder, num_images, counts)))


def _features(session: Session, manifest: Manifest, encoder: Encoder, progress: Callable[[], None]) -> Features | None:
    """Features of all training images that can be decoded, at the encoder's image size, on rank 0. Collective."""
    config, world = session.config, session.world
    mean, std = (tuple(value.flatten().tolist()) for value in (encoder.mean, encoder.std))
    width = encoder.num_features
    model = PretrainModel(encoder.network, width, nn.Sequential(), width, mean, std).to(world.device)
    split, at_its_size = config.data.train_split, replace(config.data, image_size=encoder.image_size)
    images = Place(world, session.folder.evaluation, replace(config, data=at_its_size), manifest).images(split)
    share, problem = None, ""
    try:
        size = config.evaluation.batch_size
        (share,) = extract_each([model], images, world.device, size, world.rank, world.size, lambda _: progress())
        if not share.features_NF.isfinite().all():
            problem = "it has features that are NaN or infinite"
    except DataError as error:
        world.raise_together(DataError, str(error))
    else:
        world.raise_together(DataError, "")
    if problem := next(filter(None, world.gather_objects(problem)), ""):
        raise ConfigError(f"method.pseudo_labels is {config.method.clusters_from!r}, which cannot be used: {problem}.")
    assert share is not None
    features = gather_on_main(share, world)
    if world.broadcast(features is not None and not len(features)):
        raise DataError(f"no image of split {split!r} of {manifest.where} can be decoded.")
    return features


def _clustered(session: Session, features: Features, progress: Callable[[], None]) -> torch.Tensor:
    """(N, K): the cluster of each image in each clustering. On one rank."""
    columns, counts = [], session.config.method.cluster_counts
    for count in counts:
        possible = min(count, len(features))
        columns.append(kmeans(features.features_NF, possible, session.config.seed, progress=progress))
        found = len(columns[-1].unique())
        if found < count:
            session.say(f"method.pseudo_labels: {found} clusters of {len(features):,} images instead of {count}")
    return torch.stack(columns, 1)
