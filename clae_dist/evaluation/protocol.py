"""Interface of an evaluation protocol: scores of an encoder, in a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from clae_dist.config import Evaluation
from clae_dist.config.rules import Section
from clae_dist.evaluation.features import Features
from clae_dist.keys import flatten as flatten_settings

if TYPE_CHECKING:
    from clae_dist.evaluation.linear import LinearHead
    from clae_dist.evaluation.place import Place
    from clae_dist.models import PretrainModel

FORMAT = 2  # of evaluation.json
WHEN = ("before", "after")  # pretraining
Results = Mapping[str, Mapping[str, Mapping[str, float]]]  # protocol → metric → before or after → value


@dataclass(frozen=True)
class Subject:
    """One encoder and its features of the labelled images, with labels numbered from 0.

    `bank` are the features of the train split, `queries` those of the test split. The fields from `model` on are for protocols
    that need more than features; without `place` they cannot run.
    """

    bank: Features
    queries: Features
    settings: Evaluation
    seed: int
    device: torch.device
    when: str = "after"
    model: PretrainModel | None = None
    place: Place | None = None
    head: LinearHead | None = None  # a linear classifier of `bank`, for protocols that ask for one
    details: dict[str, list[float]] = field(default_factory=dict)  # filled by a protocol on rank 0: figures for the report

    def parts(self) -> tuple[PretrainModel, Place]:
        """The model and the place, for protocols that need more than features."""
        assert self.model is not None
        assert self.place is not None
        return self.model, self.place

    @property
    def num_classes(self) -> int:
        return 1 + int(max(self.bank.labels_N.max(), self.queries.labels_N.max()))


@dataclass(frozen=True)
class NoSettings(Section):
    """For a protocol without keys of its own."""


class EvaluationProtocol(ABC):
    """One protocol with its settings. Tables, report and trackers loop over the results and know no protocol by name.

    Results must not depend on the number of ranks, and must be a pure function of subject and settings.
    """

    name: ClassVar[str]  # in evaluation.json, in names of metrics and settings, on the command line
    title: ClassVar[str]  # in tables
    unit: ClassVar[str] = "%"  # of the headline; "" for a plain number
    Settings: ClassVar[type[Section]] = NoSettings  # keys NAME.…: a frozen dataclass whose fields are made by `setting`
    collective: ClassVar[bool] = False  # every rank calls `run`; otherwise rank 0 alone, and the others wait
    uses_labels: ClassVar[bool] = True
    uses_head: ClassVar[bool] = False  # Subject.head is there

    def __init__(self, own: Section | None = None) -> None:
        self.own: Any = self.Settings() if own is None else own

    @abstractmethod
    def run(self, subject: Subject) -> dict[str, float]:
        """The metrics by name. The first is the headline; `…_low` and `…_high` are its 95 % interval."""

    def settings(self, subject: Subject) -> dict[str, Any]:
        """The settings in effect."""
        return flatten_settings(self.own)

    @abstractmethod
    def describe(self, settings: Mapping[str, Any]) -> str:
        """A clause for the report, given the settings in effect."""

    def about(self, subject: Subject) -> dict[str, Any]:
        """Title, description and settings, for evaluation.json: its readers need no list of protocols."""
        settings = self.settings(subject)
        return {"title": self.title, "unit": self.unit, "description": self.describe(settings), "settings": settings}

    def skipped(self, subject: Subject) -> str:
        """The reason if the protocol cannot run on this subject, or ""."""
        return ""

    def note(self, subject: Subject) -> str:
        """A sentence about a setting that could not be used as requested, or ""."""
        return ""


@dataclass(frozen=True)
class Headline:
    """The first metric of a protocol, before or after pretraining, with its 95 % interval if there is one."""

    name: str
    value: float
    interval: tuple[float, float] | None
    unit: str = "%"

    def text(self, digits: int = 1) -> str:
        """ "43.2 %", or "17.3" for a plain number."""
        return f"{self.value:.{digits}f} %" if self.unit == "%" else f"{self.value:.4g} {self.unit}".rstrip()


def headlines(results: Results, protocol: str, unit: str = "%") -> dict[str, Headline]:
    """The headline of a protocol before and after pretraining; empty if the protocol has no results."""
    metrics = results.get(protocol) or {}
    if not metrics:
        return {}
    name, values = next(iter(metrics.items()))
    low, high = (metrics.get(f"{name}_{end}", {}) for end in ("low", "high"))
    return {
        when: Headline(name, value, (low[when], high[when]) if when in low and when in high else None, unit)
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
