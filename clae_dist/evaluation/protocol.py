"""Interface of an evaluation protocol: a score of a frozen encoder's features, in a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clae_dist.config import Evaluation
from clae_dist.evaluation.features import Features

FORMAT = 2  # of evaluation.json
WHEN = ("before", "after")  # pretraining
Results = Mapping[str, Mapping[str, Mapping[str, float]]]  # protocol → metric → before or after → value


@dataclass(frozen=True)
class Subject:
    """The features of one encoder, with labels numbered from 0: `bank` of the train split, `queries` of the test split."""

    bank: Features
    queries: Features
    settings: Evaluation
    seed: int
    device: torch.device


class EvaluationProtocol(ABC):
    """One protocol. Tables, report and trackers loop over the results and know no protocol by name."""

    name: str  # in evaluation.json and in names of metrics
    title: str  # in tables

    @abstractmethod
    def run(self, subject: Subject) -> dict[str, float]:
        """The metrics by name. The first is the headline, in percent; `…_low` and `…_high` are its 95 % interval."""

    @abstractmethod
    def settings(self, subject: Subject) -> dict[str, float]:
        """The settings in effect."""

    @abstractmethod
    def describe(self, settings: Mapping[str, float]) -> str:
        """A clause for the report, given the settings in effect."""

    def about(self, subject: Subject) -> dict[str, Any]:
        """Title, description and settings, for evaluation.json: its readers need no list of protocols."""
        settings = self.settings(subject)
        return {"title": self.title, "description": self.describe(settings), "settings": settings}

    def note(self, subject: Subject) -> str:
        """A sentence about a setting that could not be used as requested, or ""."""
        return ""


@dataclass(frozen=True)
class Headline:
    """The first metric of a protocol, before or after pretraining, with its 95 % interval if there is one."""

    percent: float
    interval: tuple[float, float] | None


def headlines(results: Results, protocol: str) -> dict[str, Headline]:
    """The headline of a protocol before and after pretraining; empty if the protocol has no results."""
    metrics = results.get(protocol) or {}
    if not metrics:
        return {}
    name, values = next(iter(metrics.items()))
    low, high = (metrics.get(f"{name}_{end}", {}) for end in ("low", "high"))
    return {
        when: Headline(value, (low[when], high[when]) if when in low and when in high else None)
        for when, value in values.items()
    }


def flat_metrics(results: Results) -> dict[str, float]:
    """The results as metrics of a tracker, named PROTOCOL_METRIC_before and PROTOCOL_METRIC_after."""
    return {
        f"{protocol}_{metric}_{when}": value
        for protocol, metrics in results.items()
        for metric, values in metrics.items()
        for when, value in values.items()
    }
