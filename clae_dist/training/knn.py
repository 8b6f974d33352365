"""kNN accuracy and a linear probe during training, on parts of the splits."""

from __future__ import annotations

import torch
from torch import nn

from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from clae_dist.evaluation.features import Features, extract, gather
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.evaluation.knn import knn_accuracy, usable_k
from clae_dist.evaluation.linear import linear_probe
from clae_dist.evaluation.scored import scored
from clae_dist.models import PretrainModel
from clae_dist.parallel import Backend
from clae_dist.training.session import Session

_PENALTY = 1e-3  # of the linear probe, where none is set: no search while training


class _Projected(nn.Module):
    """A model whose features are the embeddings that are contrasted."""

    def __init__(self, model: PretrainModel) -> None:
        super().__init__()
        self.model, self.feature_dim = model, model.embedding_dim

    def features(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.model(images, self.model.evaluated_route)
        return embeddings


def knn_while_training(session: Session, backend: Backend, manifest: Manifest) -> dict[str, float]:
    """kNN accuracy (percent) with its 95 % interval, of labelled images of parts of the train and test split.

    With train.linear_probe, the accuracy of a linear classifier on the same features, too.

    Returns {} without labels or a test split, and for a set of one class.

    Collective. Raises DataError on every rank if one rank cannot read its images.
    """
    config, world, say = session.config, session.world, session.say
    if not manifest.classes or config.data.test_split not in manifest.splits:
        return {}
    backend.average_local_statistics()
    settings = config.evaluation

    def features(split: str, limit: int) -> Features:
        images = EvaluationSet(manifest, split, config.data.image_size, limit)
        share, problem = None, ""
        try:
            share = extract(model, images, world.device, settings.batch_size, world.rank, world.size)
        except DataError as error:
            problem = str(error)
        world.raise_together(DataError, problem)
        assert share is not None
        found = gather(share, world)
        if len(found) < len(images):
            say(f"{len(images) - len(found)} images of {split} cannot be decoded and are skipped in the kNN")
        return found

    with backend.full_model() as whole:
        model = _Projected(whole) if config.train.knn_features == "projection" else whole
        bank = features(config.data.train_split, settings.knn_bank)
        queries = features(config.data.test_split, settings.knn_queries)
    pair = scored(bank, queries, config.data.train_split, config.data.test_split)
    for line in pair.notes:
        say(f"kNN: {line}")
    if pair.problem:
        say(f"no kNN accuracy: {pair.problem}")
        return {}
    k = usable_k(settings.knn_k, len(pair.bank))
    accuracy = knn_accuracy(pair.bank, pair.queries, k, settings.knn_temperature, world.device)
    found = accuracy_metrics(accuracy, len(pair.queries))
    metrics = {f"knn_{name}": value for name, value in found.items()}
    if config.train.linear_probe:
        penalty = settings.linear_penalty or _PENALTY
        probe = linear_probe(pair.bank, pair.queries, settings.linear_iterations, penalty, device=world.device)
        found = accuracy_metrics(probe.accuracy, len(pair.queries))
        metrics |= {f"linear_{name}": value for name, value in found.items()}
    return metrics
