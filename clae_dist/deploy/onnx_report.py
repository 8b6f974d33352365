"""Measurements of an int8 graph beside the float32 graph that it was made of: size, latency, features, accuracies.

# n images of a batch, N images of the bank, Q queries, F width of the features
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.deploy.encoder import Encoder
from clae_dist.deploy.onnx_graph import Graph
from clae_dist.deploy.run_images import RunImages
from clae_dist.evaluation.attack import attack
from clae_dist.evaluation.calibration import reliability
from clae_dist.evaluation.features import Features
from clae_dist.evaluation.interval import wilson_interval
from clae_dist.evaluation.knn import classify, usable_k
from clae_dist.evaluation.linear import LinearHead, fit_head
from clae_dist.evaluation.place import evenly
from clae_dist.evaluation.scored import scored

Say = Callable[[str], None]
BATCHES = (1, 32)
_THREADS = 1  # of an operation, while latency is measured
_SECONDS, _REPEATS = 4.0, (10, 200)  # of latency for each batch size: as many as fit, within these
_ATTACKED, _STEPS = 100, 20
_EPSILONS = (2 / 255, 8 / 255)
_BATCH = 100


def compare(encoder: Encoder, float32: Path, int8: Path, images: RunImages, say: Say) -> dict[str, Any]:
    """Measure both graphs on the run's images; the content of onnx-int8.json without its calibration.

    Accuracies need labels; without them, `no_accuracies` is the reason. `linear` and `ece` have the int8 graph with the head of
    float32 features ("old_head") and with one fitted again ("new_head"). `robust` are images of PGD on the float32 encoder.
    """
    graphs = {"float32": Graph(float32), "int8": Graph(int8)}
    data, settings = images.config.data, images.config.evaluation
    test_split = data.test_split if data.test_split in images.manifest.splits else data.train_split
    bank_set = images.split(data.train_split, settings.knn_bank)
    query_set = images.split(test_split, settings.knn_queries)
    say(f"int8: features of {len(bank_set):,} and {len(query_set):,} images by both graphs")
    banks, queries = _features(graphs, bank_set), _features(graphs, query_set)
    found: dict[str, Any] = {
        "bytes": {"float32": float32.stat().st_size, "int8": int8.stat().st_size},
        "latency": latency({"float32": float32, "int8": int8}, encoder.image_size),
        "cosine": _cosine(queries["float32"], queries["int8"]),
        "images": {"bank": len(banks["int8"]), "test": len(queries["int8"]), "test_split": test_split},
    }
    pairs = {name: scored(banks[name], queries[name], data.train_split, test_split) for name in graphs}
    problem = pairs["int8"].problem
    if problem or test_split == data.train_split:
        return {**found, "no_accuracies": problem or f"the set has no {data.test_split!r} split"}
    bank, query = pairs["float32"], pairs["int8"]
    k = usable_k(settings.knn_k, len(bank.bank))
    labels = query.queries.labels_N
    classes = {name: classify(pair.bank, pair.queries.features_NF, k, settings.knn_temperature) for name, pair in pairs.items()}
    say("int8: linear classifiers of both")
    heads: dict[str, LinearHead] = {}
    penalty = settings.linear_penalty
    for name in ("float32", "int8"):  # with the same penalty: another choice would be a difference of its own
        pair = pairs[name]
        heads[name] = fit_head(pair.bank, pair.num_classes, settings.linear_iterations, penalty, images.config.seed)
        penalty = heads[name].penalty
    logits = {
        "float32": heads["float32"].logits(bank.queries.features_NF),
        "old_head": heads["float32"].logits(query.queries.features_NF),
        "new_head": heads["int8"].logits(query.queries.features_NF),
    }
    return {
        **found,
        "knn": {name: _share(found_Q == labels) for name, found_Q in classes.items()},
        "knn_agreement": _share(classes["float32"] == classes["int8"]),
        "linear": {name: _share(values.argmax(1) == labels) for name, values in logits.items()},
        "ece": {name: _ece(values, labels) for name, values in logits.items()},
        "robust": _robust(encoder, graphs["int8"], heads["float32"], query_set, bank.queries, say),
    }


def _features(graphs: Mapping[str, Graph], images: EvaluationSet) -> dict[str, Features]:
    """The features of both graphs, of the same decoded images."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in graphs}
    labels, ids = [], []
    for views in images.batches(_BATCH):
        for name, graph in graphs.items():
            parts[name].append(graph.features(views.views))
        labels.append(views.labels)
        ids.append(views.positions)
    return {name: Features(torch.cat(parts[name]), torch.cat(labels), torch.cat(ids)) for name in graphs}


def latency(graphs: Mapping[str, Path], image_size: int) -> dict[str, Any]:
    """Milliseconds of each graph for batches of 1 and 32 on one thread, p50 and p95, the graphs by turns."""
    sessions = {name: Graph(path, _THREADS) for name, path in graphs.items()}
    found: dict[str, Any] = {"threads": _THREADS, **{name: {} for name in graphs}}
    for batch in BATCHES:
        images = torch.zeros(batch, 3, image_size, image_size)
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for session in sessions.values():
            session.features(images)
        began = time.perf_counter()
        while (turn := len(times["int8"])) < _REPEATS[1] and (turn < _REPEATS[0] or time.perf_counter() - began < _SECONDS):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.features(images)
                times[name].append(1000 * (time.perf_counter() - start))
        for name, values in times.items():
            p50, p95 = np.quantile(values, (0.5, 0.95))
            found[name][str(batch)] = {"p50_ms": float(p50), "p95_ms": float(p95), "repeats": len(values)}
    return found


def _cosine(float32: Features, int8: Features) -> dict[str, float]:
    cosine_Q = F.cosine_similarity(float32.features_NF, int8.features_NF)
    return {"mean": float(cosine_Q.mean()), "lowest": float(cosine_Q.min())}


def _share(right_Q: torch.Tensor) -> dict[str, float]:
    """A percentage with its 95 % interval."""
    percent = 100 * float(right_Q.double().mean())
    low, high = wilson_interval(percent, len(right_Q))
    return {"percent": percent, "low": round(low, 3), "high": round(high, 3), "images": len(right_Q)}


def _ece(logits_QC: torch.Tensor, labels_Q: torch.Tensor) -> float:
    confidence_Q, predicted_Q = logits_QC.double().softmax(1).max(1)
    return 100 * reliability(confidence_Q, predicted_Q == labels_Q).error


class _Classifier(nn.Module):
    """Logits of images by the float32 encoder, differentiable."""

    def __init__(self, encoder: Encoder, head: LinearHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head.logits(self.encoder(images))


def _robust(
    encoder: Encoder, int8: Graph, head: LinearHead, images: EvaluationSet, queries: Features, say: Say
) -> dict[str, Any]:
    """Accuracies under PGD on the float32 encoder with its head, of that encoder and of the int8 graph with the same head.

    Quantisation has no gradients, so an attack on the int8 graph itself would find too little.
    """
    classifier = _Classifier(encoder, head)
    for parameter in classifier.parameters():
        parameter.requires_grad_(False)
    rows = evenly(queries.labels_N, _ATTACKED, 0)
    say(f"int8: PGD of {_STEPS} steps on {len(rows)} images, on the float32 encoder")
    right: dict[str, list[torch.Tensor]] = {}
    for number, some in enumerate(rows.split(_BATCH // 4)):
        pixels = images.images(queries.ids_N[some].numpy()).views.float() / 255
        labels = queries.labels_N[some]
        for epsilon in (0.0, *_EPSILONS):
            noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(number))
            moved = attack(classifier, pixels, labels, epsilon, "linf", _STEPS, epsilon / 4, noise)[0] if epsilon else pixels
            with torch.no_grad():
                logits = {"float32": classifier(moved), "int8": head.logits(int8.features(moved))}
            for name, values in logits.items():
                right.setdefault(f"{name} {255 * epsilon:g}/255", []).append(values.argmax(1) == labels)
    return {name: _share(torch.cat(parts)) for name, parts in right.items()}
