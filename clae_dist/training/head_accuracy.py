"""Accuracy of the head that a task trains, during training and at its end.

# N images of a split, C classes
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from clae_dist.config.method import Route
from clae_dist.data.classes import places_of
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from clae_dist.evaluation.domains import domain_distance
from clae_dist.evaluation.features import Features, extract_each, gather
from clae_dist.evaluation.interval import accuracy_metrics
from clae_dist.models import PretrainModel
from clae_dist.parallel import Backend
from clae_dist.training.session import Session
from clae_dist.training.sets import Sets

_GROUPS = (("many", 101, None), ("medium", 20, 100), ("few", 0, 19))  # by training images of a class (Liu et al. 2019)
_DISTANCE_ROWS = 2000  # of each domain
_FEWEST_ROWS = 20
_NONE = Features(torch.zeros((0, 1)), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


class _Part(nn.Module):
    """A model whose features are those of a route, or the logits of the classes."""

    def __init__(self, model: PretrainModel, route: Route, classes: int) -> None:
        super().__init__()
        self.model, self._route, self._classes = model, route, classes
        self.feature_dim = classes or model.feature_dim

    def features(self, images: torch.Tensor) -> torch.Tensor:
        if not self._classes:
            return self.model.features(images, self._route)
        rows: torch.Tensor = self.model(images, self._route, output="logits")
        return rows[:, : self._classes]


def head_accuracy(session: Session, backend: Backend, sets: Sets, *, limit: int) -> dict[str, float]:
    """Accuracy (percent) of the head on `limit` images of the test split (0: all), with its 95 % interval. Collective.

    With a long tail, that of classes with many (over 100), medium (20 to 100) and few training images as well. With a target,
    its accuracy, unless it shares no class with the source or has no labels, and the proxy A-distance of the domains' features.

    Raises DataError on every rank if one rank cannot read its images.
    """
    config, method = session.config, session.config.method
    split, classes = config.data.test_split, sets.train.classes
    backend.average_local_statistics()
    main_route: Route = "clean" if method.pairs_sets else config.evaluated_route
    found: list[tuple[Features, Features]] = []
    with backend.full_model() as model:
        for manifest, route in ((sets.main, main_route), *((other, config.evaluated_route) for other in sets.others)):
            parts = [_Part(model, route, method.num_classes), *([_Part(model, route, 0)] if sets.others else [])]
            found.append(_outputs(session, parts, manifest, limit) if split in manifest.splits else (_NONE, _NONE))
    metrics: dict[str, float] = {}
    for number, (manifest, (logits, _)) in enumerate(zip((sets.main, *sets.others), found, strict=True)):
        prefix = "target_" if number else ""
        if number and not set(manifest.classes) & set(sets.main.classes):
            session.say("no target_accuracy: source and target share no class")
            continue
        right = _right(logits, manifest.classes, classes)
        if right is None:
            reason = f"no labelled image in {split!r}" if split in manifest.splits else f"no split {split!r}"
            session.say(f"no {prefix}accuracy: {manifest.where} has {reason}")
            continue
        metrics |= {f"{prefix}{name}": value for name, value in accuracy_metrics(100 * float(right.mean()), len(right)).items()}
        if config.data.long_tail and not number:
            metrics |= _groups(right, logits.labels_N[logits.labels_N >= 0], sets.train.class_counts[config.data.train_split])
    if len(found) > 1 and all(len(features) >= _FEWEST_ROWS for _, features in found[:2]):
        pair = [features.choice(_DISTANCE_ROWS, config.seed).features_NF for _, features in found[:2]]
        metrics["domain_distance"] = domain_distance(pair[0], pair[1], config.seed)
    return metrics


def _outputs(session: Session, parts: Sequence[nn.Module], manifest: Manifest, limit: int) -> tuple[Features, Features]:
    """The outputs of the first and of the last part for images of the test split. Collective."""
    config, world = session.config, session.world
    images = EvaluationSet(manifest, config.data.test_split, config.data.image_size, limit)
    shares, problem = None, ""
    try:
        shares = extract_each(parts, images, world.device, config.evaluation.batch_size, world.rank, world.size)
    except DataError as error:
        problem = str(error)
    world.raise_together(DataError, problem)
    assert shares is not None
    whole = [gather(share, world) for share in shares]
    if len(whole[0]) < len(images):
        session.say(f"{len(images) - len(whole[0])} images of {config.data.test_split} cannot be decoded and are skipped")
    return whole[0], whole[-1]


def _right(logits: Features, own: Sequence[str], classes: Sequence[str]) -> torch.Tensor | None:
    """1 for each labelled image that the head gets right, otherwise 0; None without a labelled image.

    Args:
        own: the classes that labels are positions in.
        classes: those of the head.
    """
    labelled = logits.labels_N >= 0
    if not labelled.any():
        return None
    places = places_of(own, classes)
    wanted = torch.tensor([places[name] for name in own])[logits.labels_N[labelled]]
    return (logits.features_NF[labelled].argmax(1) == wanted).double()


def _groups(right: torch.Tensor, labels: torch.Tensor, counts: Sequence[int]) -> dict[str, float]:
    """Accuracy of the test images of classes with many, medium and few training images; {} of a group without any."""
    per_image = torch.tensor(counts)[labels]
    found = {}
    for name, low, high in _GROUPS:
        chosen = (per_image >= low) & (per_image <= (high if high is not None else per_image.max()))
        if chosen.any():
            found[f"accuracy_{name}"] = 100 * float(right[chosen].mean())
    return found
