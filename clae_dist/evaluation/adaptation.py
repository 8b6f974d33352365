"""Adapt an encoder's norm layers to a stream of unlabelled batches: batch statistics, TENT, optimal-transport codes.

# B images of a batch, C classes, F width of the features, T templates: sets of class centroids
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clae_dist.evaluation.features import Features
from clae_dist.models import PretrainModel
from clae_dist.models.norms import untouched_statistics

Method = Literal["source", "bn", "tent", "ot"]
METHODS: tuple[Method, ...] = ("source", "bn", "tent", "ot")
Marginal = Literal["uniform", "source"]
_SCALES = torch.logspace(0, 2.5, 26, dtype=torch.float64)  # of cosines, among which the bank's labels choose
_WEIGHT_DECAY = 1e-2  # of AdamW, as CLIP-OT has it
_ROWS = 8192


@dataclass(frozen=True)
class Prototypes:
    """Fixed class centroids: logits are `scale` times the cosine of a feature and a centroid, both relative to `centre`."""

    centre_F: torch.Tensor  # noqa: N815 - dimensions
    weight_TCF: torch.Tensor  # noqa: N815 - of length 1
    scale: float

    def logits(self, features_BF: torch.Tensor) -> torch.Tensor:
        """(T, B, C); differentiable."""
        unit_BF = F.normalize(features_BF - self.centre_F.to(features_BF), dim=1)
        return self.scale * (unit_BF @ self.weight_TCF.to(features_BF).mT)

    def classes(self, features_BF: torch.Tensor) -> torch.Tensor:
        """The class (B,) by the mean over templates."""
        return self.logits(features_BF).mean(0).argmax(1)


def class_means(bank: Features, num_classes: int) -> torch.Tensor:
    """(1, C, F) in float64; the mean of all for a class without images."""
    sums_CF = torch.zeros((num_classes, bank.features_NF.shape[1]), dtype=torch.float64)
    for rows_nF, labels_n in zip(bank.features_NF.split(_ROWS), bank.labels_N.split(_ROWS), strict=True):
        sums_CF.index_add_(0, labels_n, rows_nF.double())
    counts_C1 = torch.bincount(bank.labels_N, minlength=num_classes)[:, None]
    means_CF = sums_CF / counts_C1.clamp_min(1)
    return torch.where(counts_C1 > 0, means_CF, (sums_CF.sum(0) / len(bank)))[None]


def prototypes(bank: Features, centroids_TCF: torch.Tensor) -> Prototypes:
    """Centroids relative to the mean of the bank, with the scale that fits the labels of the bank best."""
    centre_F = torch.stack([rows.double().sum(0) for rows in bank.features_NF.split(_ROWS)]).sum(0) / len(bank)
    weight_TCF = F.normalize(centroids_TCF.double() - centre_F, dim=2)
    plain = Prototypes(centre_F.float(), weight_TCF.float(), 1.0)
    loss = torch.zeros_like(_SCALES)
    for rows_nF, labels_n in zip(bank.features_NF.split(_ROWS), bank.labels_N.split(_ROWS), strict=True):
        cosine_nC = plain.logits(rows_nF).mean(0).double()
        loss += torch.stack([F.cross_entropy(scale * cosine_nC, labels_n, reduction="sum") for scale in _SCALES])
    return Prototypes(plain.centre_F, plain.weight_TCF, float(_SCALES[loss.argmin()]))


def transport_codes(logits_BC: torch.Tensor, marginal_C: torch.Tensor, epsilon: float, rounds: int = 3) -> torch.Tensor:
    """Codes (B, C) in float64, without gradient: each row sums to 1, each class has about its share `marginal` of the rows.

    Sinkhorn's algorithm on exp(logits / epsilon), as logarithms: exp itself overflows float32 from 88 on, which the published
    code reaches at cosines of 0.62; it also lets gradients into the codes. Reference: CLIP-OT, after Cuturi 2013.
    """
    log_BC = logits_BC.detach().double() / epsilon
    share_C = marginal_C.detach().double().clamp_min(1e-12).log()
    for _ in range(rounds):
        log_BC = log_BC - log_BC.logsumexp(0, keepdim=True) + share_C
        log_BC = log_BC.log_softmax(1)
    return log_BC.exp()


def transport_loss(logits_BC: torch.Tensor, codes_BC: torch.Tensor) -> torch.Tensor:
    """Cross entropy between codes and predictions, mean of a batch."""
    return -(codes_BC.to(logits_BC) * logits_BC.log_softmax(1)).sum(1).mean()


def entropy(logits_BC: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the predictions. Reference: Wang et al. 2021, TENT."""
    log_BC = logits_BC.log_softmax(1)
    return -(log_BC.exp() * log_BC).sum(1).mean()


def norm_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Scales and shifts of batch, layer and group norms."""
    norms = [child for child in module.modules() if isinstance(child, (_BatchNorm, nn.LayerNorm, nn.GroupNorm))]
    return [parameter for norm in norms for parameter in norm.parameters(recurse=False)]


def has_batch_norms(module: nn.Module) -> bool:
    return any(isinstance(child, _BatchNorm) for child in module.modules())


@dataclass(frozen=True)
class How:
    """Settings of the adaptation. `steps`: of "ot" for each template and batch; "tent" has one for each batch."""

    learning_rate: float = 1e-3
    steps: int = 1
    epsilon: float = 0.7
    marginal: Marginal = "uniform"


class Adapted:
    """A copy of an encoder that adapts to each batch of a stream and keeps what it has learnt; the encoder itself stays.

    "source" predicts as it is; "bn" normalises with the statistics of the batch; "tent" also takes a step down the entropy of
    its predictions after each batch; "ot" takes steps towards transport codes of the batch and then predicts it. Layers without
    batch statistics (layer norms) are adapted by the steps alone.
    """

    def __init__(self, model: PretrainModel, prototypes: Prototypes, method: Method, how: How) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._prototypes, self._method, self._how = prototypes, method, how
        if method != "source":
            for child in self._model.encoder.modules():
                if isinstance(child, _BatchNorm):
                    child.train()
        if method in ("tent", "ot"):
            parameters = [one.requires_grad_() for one in norm_parameters(self._model.encoder)]
            decay = _WEIGHT_DECAY if method == "ot" else 0.0
            self._optimizer = torch.optim.AdamW(parameters, how.learning_rate, weight_decay=decay)

    def predict(self, pixels_B3SS: torch.Tensor, source_C: torch.Tensor) -> torch.Tensor:
        """The classes (B,). `source` are the mean probabilities of the batch by the encoder that is not adapted."""
        with nullcontext() if self._method == "source" else untouched_statistics(self._model.encoder):
            if self._method == "tent":
                return self._step(pixels_B3SS, 0, entropy)
            if self._method == "ot":
                uniform_C = torch.full_like(source_C, 1 / len(source_C))
                marginal_C = uniform_C if self._how.marginal == "uniform" else source_C
                for template in range(len(self._prototypes.weight_TCF)):
                    for _ in range(self._how.steps):
                        self._step(
                            pixels_B3SS,
                            template,
                            lambda z: transport_loss(z, transport_codes(z, marginal_C, self._how.epsilon)),
                        )
            with torch.no_grad():
                return self._prototypes.classes(self._model.features(pixels_B3SS))

    def probabilities(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        """(B, C), by the mean over templates."""
        with torch.no_grad():
            return self._prototypes.logits(self._model.features(pixels_B3SS)).mean(0).softmax(1)

    def _step(self, pixels_B3SS: torch.Tensor, template: int, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Take a step, and return the classes before it."""
        self._optimizer.zero_grad()
        with torch.enable_grad():
            logits_TBC = self._prototypes.logits(self._model.features(pixels_B3SS))
            loss_of(logits_TBC[template] if self._method == "ot" else logits_TBC.mean(0)).backward()
        self._optimizer.step()
        return logits_TBC.detach().mean(0).argmax(1)
