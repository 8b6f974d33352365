"""The score by which a study selects settings: kNN within the train split, so that no test image takes part."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from clae_dist.data.draws import permutation
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.shard_set import open_shards
from clae_dist.devices import local_device
from clae_dist.errors import ConfigError
from clae_dist.evaluation.features import extract
from clae_dist.evaluation.knn import knn_accuracy, usable_k
from clae_dist.evaluation.scored import scored
from clae_dist.files import write_atomically
from clae_dist.runs.checkpoint import load_model
from clae_dist.runs.trust import open_run

_DRAW = 0x5E1EC7  # seed of the held-out tenth: the same for every run


def held_out_accuracy(run_dir: Path) -> float:
    """kNN accuracy in percent of a held-out tenth of the labelled train images, with the other nine tenths as bank.

    The encoder has seen the held-out images without their labels. At most evaluation.train_images images take part.
    Raises ConfigError for a set without labels.
    """
    config = open_run(run_dir).to_read_images()
    _, model, _ = load_model(run_dir)
    settings, split = config.evaluation, config.data.train_split
    device = local_device()
    images = EvaluationSet(open_shards(config.data), split, config.data.image_size, settings.train_images)
    features = extract(model.to(device), images, device, settings.batch_size)
    order = torch.from_numpy(permutation(len(features), _DRAW))
    held_out = max(1, len(features) // 10)
    pair = scored(features.rows(order[held_out:]), features.rows(order[:held_out]), split, split)
    if pair.problem:
        raise ConfigError(f"{run_dir} cannot be judged within {split} ({pair.problem}); a study selects on labelled images.")
    k = usable_k(settings.knn_k, len(pair.bank))
    return knn_accuracy(pair.bank, pair.queries, k, settings.knn_temperature, device)


def write_score(run_dir: Path, path: Path) -> float:
    """Measure the held-out accuracy of a run and write it to `path`."""
    accuracy = held_out_accuracy(run_dir)
    write_atomically(path, (json.dumps({"held_out_accuracy": accuracy}) + "\n").encode())
    return accuracy
