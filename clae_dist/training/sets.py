"""The images of a run: opened and checked by all ranks together, and mixed if the run has several sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clae_dist.config import Config
from clae_dist.config.method import TrainingSet
from clae_dist.data import transport
from clae_dist.data.loader import shared_memory_bytes
from clae_dist.data.long_tail import long_tail
from clae_dist.data.manifest import Manifest, check_shard
from clae_dist.data.mixture import mix
from clae_dist.data.prefetch import advice
from clae_dist.data.shard_set import entries_of, open_shards
from clae_dist.data.together import together
from clae_dist.data.urls import is_tar, local_path, scheme
from clae_dist.errors import ConfigError, DataError
from clae_dist.redact import redact_text
from clae_dist.training.plan import Plan
from clae_dist.training.session import Session

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sets:
    """`main` is the set of data.shards, which is evaluated on; `train` is `main`, its long-tailed part, or a mixture, whose
    further sets are `others`.

    `pseudo_labels` are those of the images of `train`, for a method that has any (training/pseudo_labels.py).
    """

    train: Manifest
    main: Manifest
    pseudo_labels: torch.Tensor | None = None
    others: tuple[Manifest, ...] = ()


def check_sets(config: Config) -> Manifest | None:
    """The manifest of the training set, from the manifests of the sets alone, before ranks start.

    None for plain shards, whose samples are unknown before they are indexed. Raises DataError or ConfigError, like open_sets.
    """
    found = _known_sets(config)
    if found is None:
        return None
    _check_split(config, *found)
    return found[0]


def check_method_sets(config: Config) -> None:
    """Raise DataError or ConfigError if the method cannot be trained on these sets, as far as their manifests tell."""
    found = _known_sets(config)
    if found is not None:
        _check_method(config, *found)


def training_set(config: Config) -> Manifest | None:
    """`check_sets`, but whatever the number of its classes and images."""
    found = _known_sets(config)
    return found and found[0]


def _known_sets(config: Config) -> tuple[Manifest, Manifest] | None:
    """The training set and that of data.shards, as far as manifests alone tell."""
    manifests = []
    names = [config.data.shards, *config.data.mixture]
    for name in names:
        entries = entries_of(name)
        if is_tar(entries[0]):
            for path in (Path(local_path(entry)) for entry in entries if not scheme(entry)):
                if not path.is_file():
                    raise DataError(f"{path} is no file; correct data.shards, or data.mixture.")
        else:
            manifests.append(open_shards(replace(config.data, shards=name)))
    if len(manifests) < len(names):
        return None
    if config.data.long_tail and manifests[0].files:  # whose index is fetched when the ranks start
        return None
    return _mixed(config, manifests), manifests[0]


def _check_split(config: Config, train: Manifest, main: Manifest) -> None:
    """Raise DataError if the training split has too few images, or no labels for a method that needs them; ConfigError if the
    method's settings do not suit the set."""
    Plan.of(config, train.num_samples(config.data.train_split))
    _check_method(config, train, main)


def _check_method(config: Config, train: Manifest, main: Manifest) -> None:
    split, method = config.data.train_split, config.method
    if method.pairs_sets and list(config.data.mixture.values()) != [0.5]:
        shares = redact_text(str(config.data.mixture))
        raise ConfigError(
            f"data.mixture is {shares}, but method.name={method.name} takes half of every batch from a source and half from a "
            "target; name one target with the share 0.5: data.mixture={TARGET: 0.5}, or clae finetune … --target TARGET."
        )
    labelled = train if len(main.classes) == len(train.classes) else main  # of a mixture, the source is what needs labels
    counts = labelled.class_counts.get(split, ())
    if method.needs_labels and not (any(counts) if counts else labelled.classes):
        raise DataError(
            f"method.name={method.name} needs labels, but no image of split {split!r} of {labelled.where} has one (label "
            "-1 in its index); prepare the images from one folder a class, or use method.name=simclr."
        )
    method.check_set(as_training_set(config, train))


def as_training_set(config: Config, train: Manifest) -> TrainingSet:
    """The part of a set that a method's settings may depend on."""
    split = config.data.train_split
    return TrainingSet(train.where, train.num_samples(split), train.classes, tuple(train.class_counts.get(split, ())))


def _mixed(config: Config, sets: list[Manifest]) -> Manifest:
    """The first set or its long-tailed part, or the mixture of all sets with the shares of data.mixture."""
    if len(sets) == 1:
        tail, split = config.data.long_tail, config.data.train_split
        return long_tail(sets[0], split, tail, config.seed) if tail else sets[0]
    _check_different(sets)
    shares = [1 - sum(config.data.mixture.values()), *config.data.mixture.values()]
    return mix(sets, shares, config.data.train_split)


def open_sets(session: Session, progress: Callable[[], None] = lambda: None) -> Sets:
    """Open the sets that the configuration names; each rank checks a part of the shards. Collective.

    `progress` is called repeatedly meanwhile.

    Raises the same DataError or ConfigError on every rank.
    """
    config, world, say = session.config, session.world, session.say
    data = config.data
    main = open_shards(data, world, say, progress)
    others = [open_shards(replace(data, shards=name), world, say, progress) for name in data.mixture]
    train: Manifest = world.run_on_main(lambda: _mixed(config, [main, *others]))
    _check_split(config, train, main)
    for manifest in (main, *others):
        _check(manifest, session, progress)
    if config.data.long_tail:
        say(f"data: {train.name}: {train.num_samples(config.data.train_split):,} images")
    if others:
        say(f"data: a mixture of {train.name}; an epoch is as many images as they have together")
    if train.files is not None and train.files.any_remote:
        for line in advice(config, train, world):
            say(line)
    hosts = world.gather_objects(list(transport.advice(shared_memory_bytes(config, world))))
    for line in dict.fromkeys(line for lines in hosts for line in lines):
        say(line)
    return Sets(train, main, others=tuple(others))


def _check_different(sets: Sequence[Manifest]) -> None:
    """Raise DataError for sets with the same images by the SHA-256 of their shards."""
    seen: dict[str, Manifest] = {}
    for manifest in sets:
        if not all(shard.sha256 for shards in manifest.splits.values() for shard in shards):
            continue  # plain shards of this machine, whose bytes nobody has read
        other = seen.setdefault(manifest.digest, manifest)
        if other is not manifest:
            raise DataError(
                f"{other.where} and {manifest.where} are the same images (digest {manifest.digest[:12]}); name each set of a "
                "mixture once, with its whole share."
            )


def _check(manifest: Manifest, session: Session, progress: Callable[[], None]) -> None:
    """Check local shards; remote shards are checked when they are fetched."""
    world, verify = session.world, session.config.data.verify
    shards = [shard for split in manifest.splits.values() for shard in split]
    if manifest.files is not None:
        session.say(f"data: {manifest.name}, {len(shards)} shards at {manifest.where}; {manifest.files.describe()}")
        return

    def check() -> str:
        for shard in shards[world.rank :: world.size]:
            try:
                check_shard(manifest.folder, shard, verify)
            except DataError as error:
                return str(error)
            progress()
        return ""

    started = time.perf_counter()
    world.raise_together(DataError, together(world, check, progress))
    seconds = time.perf_counter() - started
    session.say(f"data: {manifest.name}, {len(shards)} shards checked ({verify}) in {seconds:.1f} s")
