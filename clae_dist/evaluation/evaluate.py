"""`clae evaluate`: the encoder before and after pretraining under every evaluation protocol."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from clae_dist import escape
from clae_dist.config import Config
from clae_dist.data.draws import permutation
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.loader import num_workers
from clae_dist.data.manifest import Manifest
from clae_dist.data.shard_set import open_shards
from clae_dist.devices import local_device
from clae_dist.errors import ConfigError
from clae_dist.evaluation.features import Features, extract_each
from clae_dist.evaluation.interval import interval_text
from clae_dist.evaluation.knn import nearest
from clae_dist.evaluation.protocol import FORMAT, WHEN, Subject, headlines
from clae_dist.evaluation.protocols import PROTOCOLS
from clae_dist.evaluation.scored import scored
from clae_dist.files import check_writable, write_atomically
from clae_dist.models import PretrainModel, build_model
from clae_dist.progress import Progress
from clae_dist.runs.checkpoint import load_model
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.initial import load_initial
from clae_dist.runs.trust import NOTHING, Permission, open_run

NUM_QUERIES, NUM_NEIGHBOURS = 8, 8  # in the report

Say = Callable[[str], None]


def evaluate_run(run_dir: Path, say: Say = escape.say, shards: str = "", permission: Permission = NOTHING) -> dict[str, Any]:
    """Run every protocol on the encoder before and after pretraining; write and return evaluation.json.

    "Before" is the encoder as `build_model` initialises it from the run's seed, "after" that of the newest checkpoint; both
    see the same decoded pixels in the same pass, with the same settings. The bank is the train split, or a subset of
    evaluation.train_images images that is the same for every run; the queries are the whole test split. Images without a
    label are skipped; "results" is empty for sets without labels or with a single class.

    Args:
        shards: the location of the images, if they have moved.

    Raises: ConfigError without a checkpoint, and for settings of the run that `permission` does not cover (runs/trust.py),
        DataError for unusable shards, StorageError if the result cannot be written.
    """
    started = time.perf_counter()
    config = open_run(run_dir, permission).to_read_images(shards)
    _, trained, info = load_model(run_dir)
    check_writable(run_dir)  # before hours of work
    if not config.data.shards:
        raise ConfigError("data.shards is ''; name the folder of shards that the run was trained on.")
    manifest = open_shards(config.data, say=say)
    device = local_device()
    say(f"evaluating {run_dir} after {info['images_seen']:,} images, on {device.type}; {manifest.name} {manifest.digest[:12]}")
    result: dict[str, Any] = {
        "format": FORMAT,
        "results": {},
        "protocols": {},
        "train_images": manifest.num_samples(config.data.train_split),
        "bank_images": 0,  # of those, the bank
        "test_images": manifest.num_samples(config.data.test_split) if config.data.test_split in manifest.splits else 0,
        "num_classes": len(manifest.classes),
        "images_seen": info["images_seen"],
        "step": info["step"],
        "manifest_digest": manifest.digest,
        "device": device.type,
        "neighbours": [],
    }
    if config.data.test_split in manifest.splits:
        untrained = build_model(config)
        load_initial(config.model, run_dir, untrained.encoder)
        result.update(_compare(config, untrained, trained, manifest, device, say))
    else:
        say(f"{manifest.where} has no {config.data.test_split!r} split: no accuracies. Prepare the set with one to get them.")
    result["wall_s"] = round(time.perf_counter() - started, 2)
    path = RunFolder(run_dir).evaluation_file
    write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
    say(f"wrote {path} after {result['wall_s']:.0f} s")
    return result


def _compare(
    config: Config, untrained: PretrainModel, trained: PretrainModel, manifest: Manifest, device: torch.device, say: Say
) -> dict[str, Any]:
    """The part of evaluation.json that needs features of both encoders."""
    for model in (untrained, trained):
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    # Small images decode at 10,000 per second and core, so starting worker processes would cost more than it saves.
    workers = num_workers(config, 1) if config.data.image_size > 64 else 0

    undecodable: dict[str, int] = {}

    def features(split: str, limit: int = 0) -> list[Features]:
        images = EvaluationSet(manifest, split, config.data.image_size, limit, workers=workers)
        part = f" ({len(images):,} of {manifest.num_samples(split):,})" if limit else ""
        progress = Progress(len(images), label=f"features, {split}{part}: ", say=say)
        features_of_each = extract_each(
            [untrained, trained], images, device, config.evaluation.batch_size, progress=progress.add
        )
        progress.close()
        for name, one in zip(("untrained", "trained"), features_of_each, strict=True):
            if not one.features_NF.isfinite().all():
                raise ConfigError(
                    f"the {name} encoder's features of {split} are NaN or infinite: no accuracy of them means anything. Train "
                    "with optim.clip_norm=1 or a lower optim.learning_rate."
                )
        if len(features_of_each[0]) < len(images):
            undecodable[split] = len(images) - len(features_of_each[0])
            say(f"{undecodable[split]} of {len(images):,} images of {split} cannot be decoded and were skipped.")
        return features_of_each

    bank_before, bank = features(config.data.train_split, config.evaluation.train_images)
    test_before, test = features(config.data.test_split)
    result: dict[str, Any] = {
        "bank_images": len(bank),
        "undecodable": undecodable,
        "neighbours": _neighbours(bank, test, config.seed),
    }
    splits = (config.data.train_split, config.data.test_split)
    pairs = [scored(*pair, *splits) for pair in ((bank_before, test_before), (bank, test))]
    result["unlabelled"] = dict(zip(splits, pairs[1].unlabelled, strict=True))
    for line in pairs[1].notes:
        say(line)
    result["no_accuracies"] = pairs[1].problem
    if pairs[1].problem:
        say(f"no accuracies: {pairs[1].problem}. Images get labels from class folders: python -m data_prep prepare")
        return result
    subjects = [Subject(pair.bank, pair.queries, config.evaluation, config.seed, device) for pair in pairs]
    result["num_classes"] = pairs[1].num_classes
    result["protocols"] = {name: protocol.about(subjects[1]) for name, protocol in PROTOCOLS.items()}
    result["notes"] = [note for protocol in PROTOCOLS.values() if (note := protocol.note(subjects[1]))]
    for note in result["notes"]:
        say(note)
    result["results"] = _results(subjects, say)
    return result


def _results(subjects: Sequence[Subject], say: Say) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of all protocols: {protocol: {metric: {"before": …, "after": …}}}."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for when, subject in zip(WHEN, subjects, strict=True):
        for name, protocol in PROTOCOLS.items():
            started = time.perf_counter()
            for metric, value in protocol.run(subject).items():
                results.setdefault(name, {}).setdefault(metric, {})[when] = value
            headline, wall_s = headlines(results, name)[when], time.perf_counter() - started
            interval = interval_text(headline.interval)
            say(f"{protocol.title} {when} pretraining: {headline.percent:.2f} % (95 % interval {interval}; {wall_s:.1f} s)")
    return results


def _neighbours(bank: Features, test: Features, seed: int) -> list[dict[str, Any]]:
    """Ids and labels of a few test images and their nearest neighbours in the train split.

    The test images are drawn in a seeded order, the first image of each class before the second of any.
    """
    order = permutation(len(test), seed)
    seen: dict[int, int] = {}
    turns = []
    for row in order.tolist():
        label = int(test.labels_N[row])
        seen[label] = seen.get(label, 0) + 1
        turns.append(seen[label])
    chosen = [row for _, _, row in sorted(zip(turns, range(len(order)), order.tolist(), strict=True))][:NUM_QUERIES]
    near = nearest(test.features_NF[chosen], bank.features_NF, NUM_NEIGHBOURS)
    return [
        {
            "id": int(test.ids_N[row]),
            "label": int(test.labels_N[row]),
            "neighbour_ids": bank.ids_N[near.rows[q]].tolist(),
            "neighbour_labels": bank.labels_N[near.rows[q]].tolist(),
            "cosines": [round(cosine, 4) for cosine in near.cosines[q].tolist()],
        }
        for q, row in enumerate(chosen)
    ]
