"""The results of a study's finished cells: means over seeds, and differences to the baseline paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clae_dist.errors import ConfigError
from clae_dist.evaluation.interval import Mean, mean_of
from clae_dist.evaluation.metrics import Metrics, read_metrics
from clae_dist.evaluation.protocol import headlines
from clae_dist.runs.folder import RunFolder
from clae_dist.studies.budget import Cost
from clae_dist.studies.cells import Cell, StudyPlan


@dataclass(frozen=True)
class CellResult:
    """A finished cell: `results` and `titles` as in evaluation.json, `curve` is kNN accuracy over encoder passes or images."""

    cell: Cell
    results: Mapping[str, Mapping[str, Mapping[str, float]]]
    titles: Mapping[str, str]  # with the unit of the headline
    curve: tuple[tuple[float, ...], tuple[float, ...]]
    images_seen: int
    train_s: float | None

    def headline(self, protocol: str) -> float | None:
        """The first metric of a protocol after pretraining."""
        headline = headlines(self.results, protocol).get("after")
        return headline.value if headline else None


@dataclass(frozen=True)
class Row:
    """A method under one protocol. `difference` is to the baseline, over the seeds that both have; None for the baseline."""

    method: str
    mean: Mean
    difference: Mean | None

    @property
    def verdict(self) -> str:
        """ "higher" or "lower" than the baseline where the interval of the difference excludes 0, else ""."""
        ends = self.difference.interval if self.difference else None
        return "" if ends is None or ends[0] <= 0 <= ends[1] else "higher" if ends[0] > 0 else "lower"


@dataclass(frozen=True)
class Table:
    """The methods under one protocol, in the order of the study file."""

    protocol: str
    title: str
    rows: tuple[Row, ...]


def read_results(plan: StudyPlan) -> list[CellResult]:
    """The finished cells of the comparison. Raises ConfigError if one was evaluated on other images than the study's."""
    results = []
    for cell in plan.of("compare"):
        evaluation = cell.evaluation()
        if evaluation is None:
            continue
        identity = RunFolder(cell.folder).read_identity()
        if identity.manifest_digest != plan.manifest.digest or evaluation["manifest_digest"] != plan.manifest.digest:
            raise ConfigError(
                f"{cell.folder} was trained on {identity.manifest_digest[:12]} and evaluated on "
                f"{evaluation['manifest_digest'][:12]}, the study has {plan.manifest.digest[:12]} (digest of the manifest): "
                "cells of a study share one set: use another --folder, or delete that run."
            )
        metrics, _ = read_metrics(RunFolder(cell.folder).metrics_file)
        titles = {name: _title(about) for name, about in evaluation["protocols"].items()}
        curve = _curve(cell, metrics, plan.passes is not None)
        results.append(CellResult(cell, evaluation["results"], titles, curve, evaluation["images_seen"], metrics.train_s))
    return results


def _title(about: Mapping[str, Any]) -> str:
    unit = about.get("unit", "%")
    return f"{about['title']}, {unit}" if unit else str(about["title"])


def _curve(cell: Cell, metrics: Metrics, in_passes: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """kNN accuracy while training, over encoder passes or images seen."""
    images, accuracies = metrics.series("knn_accuracy")
    if not in_passes:
        return tuple(images), tuple(accuracies)
    assert cell.recipe is not None
    config = cell.recipe.config
    cost = Cost.of(config)
    size = config.batch.global_size
    return tuple(cost.passes(round(seen / size), cell.steps_per_epoch) for seen in images), tuple(accuracies)


def protocols_of(results: Sequence[CellResult]) -> dict[str, str]:
    """The protocols that any cell has results of, with their titles."""
    return {name: result.titles.get(name, name) for result in results for name in result.results}


def tabulate(plan: StudyPlan, results: Sequence[CellResult]) -> list[Table]:
    """A table for each protocol."""
    tables = []
    for protocol, title in protocols_of(results).items():
        by_method = {method.name: _by_seed(results, method.name, protocol) for method in plan.study.methods}
        baseline = by_method[plan.study.baseline]
        rows = [
            Row(name, mean_of(list(values.values())), _difference(name, values, plan.study.baseline, baseline))
            for name, values in by_method.items()
            if values
        ]
        tables.append(Table(protocol, title, tuple(rows)))
    return tables


def _by_seed(results: Sequence[CellResult], method: str, protocol: str) -> dict[int, float]:
    own = [result for result in results if result.cell.method == method]
    return {result.cell.seed: value for result in own if (value := result.headline(protocol)) is not None}


def _difference(name: str, values: Mapping[int, float], baseline_name: str, baseline: Mapping[int, float]) -> Mean | None:
    pairs = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    return mean_of(pairs) if pairs and name != baseline_name else None


def flat_results(tables: Sequence[Table]) -> dict[str, float]:
    """Means and their intervals as metrics of a tracker."""
    metrics: dict[str, Any] = {}
    for table in tables:
        for row in table.rows:
            name = f"{row.method}/{table.protocol}"
            metrics[f"{name}_mean"] = row.mean.value
            metrics[f"{name}_half_interval"] = row.mean.half
            metrics[f"{name}_difference"] = row.difference.value if row.difference else None
    return {key: value for key, value in metrics.items() if value is not None}
