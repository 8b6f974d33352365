"""The images, the ranks and the files that the protocols of one evaluation share.

# N images of a set, F width of the features, S side of an image
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from clae_dist import escape
from clae_dist.config import Config
from clae_dist.data.evaluation_set import EvaluationSet, Views
from clae_dist.data.loader import num_workers
from clae_dist.data.manifest import Manifest
from clae_dist.data.shard_set import open_shards
from clae_dist.errors import ConfigError
from clae_dist.evaluation.features import Features, frozen
from clae_dist.evaluation.journal import Journal
from clae_dist.files import make_folders, write_atomically
from clae_dist.models import PretrainModel
from clae_dist.progress import Progress
from clae_dist.runs.checkpoint.safetensors_file import weights_digest
from clae_dist.storage import writing
from clae_dist.world import World

Say = Callable[[str], None]
_FORMAT = 1  # of what is kept; another one is computed again
_SMALL = 64  # pixels a side, up to which decoding is cheaper than starting processes


@dataclass(frozen=True)
class Place:
    """One evaluation: its set of images, its ranks, and the folder that lets an interrupted one continue.

    All ranks see the same `folder`, as they do a run folder.
    """

    world: World
    folder: Path
    config: Config
    manifest: Manifest
    say: Say = escape.say
    fresh: bool = False  # compute again what is kept

    def further(self, shards: str) -> Place:
        """The same evaluation on another set, resized to the same side. Collective. Raises ConfigError or DataError."""
        config = replace(self.config, data=replace(self.config.data, shards=shards, mixture={}))
        return replace(self, config=config, manifest=open_shards(config.data, self.world, self.say))

    def images(self, split: str, limit: int = 0) -> EvaluationSet:
        """The images of a split, or a choice of `limit` of them that is the same for every run."""
        if split not in self.manifest.splits:
            raise ConfigError(f"{self.manifest.where} has no {split!r} split, only {', '.join(self.manifest.splits)}.")
        size = self.config.data.image_size
        workers = num_workers(self.config, self.world.local_size) if size > _SMALL else 0
        return EvaluationSet(self.manifest, split, size, limit, workers=workers)

    # ---- what is kept between starts ----

    def journal(self, key: Mapping[str, Any]) -> Journal:
        """The finished units of the work that `key` describes."""
        return Journal(self.folder / "journals" / digest_of(key))

    def kept(
        self, kind: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The tensors that `make` computes, from disk if they were kept under the same key before. On one rank."""
        path = self.folder / kind / f"{digest_of(key)}.safetensors"
        if not self.fresh and (found := read_kept(path)) is not None:
            return found
        made = {name: value.contiguous().cpu() for name, value in make().items()}
        make_folders(path.parent)
        write_atomically(path, save(made))
        return made

    # ---- work that ranks share ----

    def shared(
        self,
        key: Mapping[str, Any],
        units: int,
        work: Callable[[Sequence[int]], Iterable[Mapping[str, torch.Tensor]]],
        label: str,
        size: int = 1,
        total: int = 0,
        name: str = "images",
        costs: Callable[[Sequence[int]], Mapping[int, float]] | None = None,
    ) -> Journal:
        """The results of `units` units of work, in the journal that this returns. Collective.

        `work(numbers)` yields the result of each of these units. Each unit that is not finished yet is given to some rank: by
        turns, or with `costs`, a collective guess at what each unit takes, the dearest that is left to the first rank that is
        free. So a result must not depend on the rank. For progress, a unit has `size` things called `name`, of `total`
        in all.
        """
        world = self.world
        finished = world.run_on_main(lambda: self._finished(key))
        missing = [number for number in range(units) if number not in finished]
        if costs:
            guess = costs(missing) if missing and world.size > 1 else {}
            missing.sort(key=lambda number: -guess.get(number, 0.0))
        journal = self.journal(key)
        total = total or units * size
        done = min((units - len(missing)) * size, total)
        progress = Progress(total, done=done, name=name, label=f"{label}: ", say=self.say if world.is_main else _silent)
        mine = missing[world.rank :: world.size]
        shares = ([missing[turn]] for turn in world.take(len(missing))) if costs else [mine] if mine else []
        try:
            for number, tensors in ((number, one) for share in shares for number, one in zip(share, work(share), strict=True)):
                journal.add(number, tensors)
                more = min(size * world.size, total - done)
                done += more
                progress.add(more)
        finally:
            journal.close()
        world.gather_objects(None)  # every rank has written its share
        progress.close()
        return self.journal(key)

    def _finished(self, key: Mapping[str, Any]) -> frozenset[int]:
        if self.fresh:
            self.journal(key).remove()
        return self.journal(key).finished

    def features(self, models: Mapping[str, PretrainModel], images: EvaluationSet, label: str) -> dict[str, Features]:
        """The features of each model, in order of the images; undecodable images are skipped. Collective.

        All models see the same decoded pixels. The features are on disk, and are read from it when they are used. Their batches
        do not depend on the number of ranks.
        """
        batch_size = self.config.evaluation.batch_size
        places = {name: self._features_at(model, images) for name, model in models.items()}
        missing = [name for name, at in places.items() if not self.world.run_on_main(lambda at=at: self._has(at))]
        if missing:
            key = {"features": [places[name].name for name in missing], "batch": batch_size}

            def work(numbers: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
                ids = [images.ids[number * batch_size : (number + 1) * batch_size] for number in numbers]
                for views in images.lists(ids):
                    found = self._embed({name: models[name] for name in missing}, views)
                    yield {"labels": views.labels, "ids": views.positions, **found}

            journal = self.shared(key, -(-len(images) // batch_size), work, label, batch_size, len(images))
            self.world.run_on_main(lambda: _write_features(journal, {name: places[name] for name in missing}))
        return {name: _read_features(at) for name, at in places.items()}

    def _embed(self, models: Mapping[str, PretrainModel], views: Views) -> dict[str, torch.Tensor]:
        found = {}
        with ExitStack() as stack:
            for model in models.values():
                stack.enter_context(frozen(model))
            for name, model in models.items():
                with self.autocast():
                    found[f"features {name}"] = model.features(self.pixels(views.views, model)).float()
        return found

    @property
    def bfloat16(self) -> bool:
        """True on GPUs, unless the run itself was trained in a higher precision."""
        return self.world.device.type == "cuda" and self.config.train.precision in ("auto", "bfloat16")

    def autocast(self) -> torch.autocast:
        """The precision of forwards whose gradient nobody needs."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bfloat16)

    def pixels(self, images: torch.Tensor, model: PretrainModel) -> torch.Tensor:
        """uint8 images as pixels in [0, 1] on the device and in the precision of the model."""
        return images.to(self.world.device).to(model.mean.dtype) / 255

    def _features_at(self, model: PretrainModel, images: EvaluationSet) -> Path:
        key = {
            "weights": weights_digest(model.state_dict()),
            "route": model.evaluated_route,
            "images": self.manifest.digest,
            "ids": hashlib.sha256(images.ids.tobytes()).hexdigest(),
            "split": images.split,
            "side": self.config.data.image_size,
            "bfloat16": self.bfloat16,
        }
        return self.folder / "features" / digest_of(key)

    def _has(self, path: Path) -> bool:
        if self.fresh and path.exists():
            shutil.rmtree(path)
        return path.exists()


def _silent(_: str) -> None: ...


def read_kept(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a file, or None if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def digest_of(key: Mapping[str, Any]) -> str:
    """A name for what `key` describes: 24 hexadecimal digits."""
    return hashlib.sha256(json.dumps([_FORMAT, dict(key)], sort_keys=True).encode()).hexdigest()[:24]


def _write_features(journal: Journal, places: Mapping[str, Path]) -> None:
    """Join the batches into one file a model, one batch in memory at a time, and delete the journal."""
    rows = [len(tensors["ids"]) for _, tensors in journal]
    for name, at in places.items():
        if at.exists():  # another of these models has the same weights
            continue
        with writing(at):
            partial = at.with_name(f".{at.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            written: np.ndarray | None = None
            first, labels, ids = 0, [], []
            for (_, tensors), count in zip(journal, rows, strict=True):
                features = tensors[f"features {name}"].numpy()
                if written is None:
                    shape = (sum(rows), features.shape[1])
                    written = np.lib.format.open_memmap(partial / "features.npy", "w+", np.float32, shape)
                written[first : first + count] = features
                first += count
                labels.append(tensors["labels"].numpy())
                ids.append(tensors["ids"].numpy())
            assert isinstance(written, np.memmap)
            written.flush()
            np.save(partial / "labels.npy", np.concatenate(labels))
            np.save(partial / "ids.npy", np.concatenate(ids))
            partial.rename(at)
    journal.remove()


def _read_features(at: Path) -> Features:
    """Features whose rows are read from disk when they are used; changes to them are not written back."""
    mapped = np.load(at / "features.npy", mmap_mode="c")
    labels, ids = (torch.from_numpy(np.load(at / f"{name}.npy")) for name in ("labels", "ids"))
    return Features(torch.from_numpy(mapped), labels, ids)


def evenly(labels: Sequence[int] | torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Rows of a choice of `count` images with equally many of each class, as far as there are; sorted, a function of the seed.

    A smaller choice is part of a larger one with the same seed.
    """
    labels = torch.as_tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    turn = torch.empty(len(labels), dtype=torch.int64)
    for label in labels.unique().tolist():
        rows = order[labels[order] == label]
        turn[rows] = torch.arange(len(rows))
    place_in_order = torch.empty(len(labels), dtype=torch.int64)
    place_in_order[order] = torch.arange(len(labels))
    ranked = sorted(range(len(labels)), key=lambda row: (int(turn[row]), int(place_in_order[row])))
    return torch.tensor(sorted(ranked[:count]), dtype=torch.int64)
