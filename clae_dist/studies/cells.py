"""The cells of a study: one run for each method and seed, and before them one for each choice to select from.

STUDY/METHOD/seed-S is the run of a cell; STUDY/select/METHOD/C with select_seed are those of the choices. Cells of the
comparison come seed by seed, so that an unfinished study compares the same seeds of every method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clae_dist.config import Config
from clae_dist.data.manifest import Manifest
from clae_dist.errors import ConfigError
from clae_dist.evaluation.stored import read_evaluation
from clae_dist.reading import MissingError, ReadError, is_number, read_object
from clae_dist.recipe import Recipe, resolve
from clae_dist.runs.folder import RunFolder
from clae_dist.studies.budget import Cost, steps_for_images, steps_for_seconds
from clae_dist.studies.study import Study, StudyMethod
from clae_dist.training.plan import Plan
from clae_dist.training.sets import check_sets

CURVE_POINTS = 8  # kNN evaluations during a run, unless train.knn_every is set
Stage = Literal["select", "compare"]


@dataclass(frozen=True)
class Cell:
    """One run of a study. `recipe` is None while the settings of its method are still to be selected."""

    index: int
    stage: Stage
    method: str
    seed: int
    folder: Path
    chosen: Mapping[str, str]  # the settings of the choice
    recipe: Recipe | None = None
    steps: int = 0
    steps_per_epoch: int = 1
    passes: float | None = None  # encoder passes, where they are counted
    protocols: frozenset[str] = frozenset()  # of its evaluation

    @property
    def title(self) -> str:
        setting = "".join(f" {key}={value}" for key, value in self.chosen.items())
        return f"{self.method}{setting}, seed {self.seed}" + (" (selection)" if self.stage == "select" else "")

    @property
    def score_file(self) -> Path:
        """The held-out accuracy of a cell of the selection, beside its run folder."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def score(self) -> float | None:
        """Held-out accuracy in percent; None if this cell of the selection is unfinished."""
        try:
            value = read_object(self.score_file).get("held_out_accuracy")
        except MissingError:
            return None
        except ReadError as error:
            raise ConfigError(
                f"{self.score_file} is damaged ({error}); delete it, and the same command writes it again."
            ) from None
        return float(value) if value is not None and is_number(value) else None

    @property
    def done(self) -> bool:
        """True if the cell is trained to its end and evaluated."""
        if self.stage == "select":
            return self.score() is not None
        evaluation = self.evaluation()
        return evaluation is not None and bool(
            self.protocols <= set(evaluation["protocols"]) or evaluation.get("no_accuracies")
        )

    def evaluation(self) -> dict[str, Any] | None:
        """The content of evaluation.json, if it is of the end of the run."""
        evaluation, _ = read_evaluation(RunFolder(self.folder).evaluation_file)
        return evaluation if self.recipe and evaluation and evaluation.get("step") == self.steps else None


@dataclass(frozen=True)
class StudyPlan:
    """All cells of a study, and the set that they share."""

    study: Study
    cells: tuple[Cell, ...]
    manifest: Manifest
    passes: float | None  # the budget in encoder passes, if that is its kind

    def of(self, stage: Stage) -> list[Cell]:
        return [cell for cell in self.cells if cell.stage == stage]


def count_cells(study: Study) -> int:
    """The number of cells, known without opening the images."""
    return sum(len(method.choices) for method in study.methods) + len(study.seeds) * len(study.methods)


def refreshed(plan: StudyPlan, speeds: Mapping[str, float] | None) -> StudyPlan:
    """The plan, with the settings that were selected since it was made."""
    return plan if all(cell.recipe for cell in plan.cells) else plan_cells(plan.study, speeds)


def plan_cells(study: Study, speeds: Mapping[str, float] | None = None) -> StudyPlan:
    """Resolve every cell of a study.

    Args:
        speeds: images per second of each method by its name, for budget.seconds.

    Raises: ConfigError for settings that cannot be used and for methods of different sets, DataError for an unusable set.
    """
    bases = {method.name: base_recipe(study, method) for method in study.methods}
    manifest = _shared_set(study, bases)
    lengths = _Lengths(study, bases, manifest, speeds)
    cells: list[Cell] = []
    for method in study.methods:
        for number, chosen in enumerate(method.choices):
            folder = study.folder / "select" / method.name / str(number)
            cells.append(lengths.cell(len(cells), "select", method, study.select_seed, folder, chosen))
    selected = {method.name: _selected(method, tuple(cells)) for method in study.methods}
    for seed in study.seeds:
        for method in study.methods:
            folder = study.folder / method.name / f"seed-{seed}"
            best = selected[method.name]
            if best is None:
                cells.append(Cell(len(cells), "compare", method.name, seed, folder, {}))
            else:
                cells.append(lengths.cell(len(cells), "compare", method, seed, folder, best))
    return StudyPlan(study, tuple(cells), manifest, lengths.passes)


def base_recipe(study: Study, method: StudyMethod, more: Mapping[str, str] | None = None) -> Recipe:
    """The settings of a method: its recipe, the study's settings, `more`, and the command line's. Raises ConfigError."""
    more = more or {}
    of_study = {**method.overrides, **more}
    of_user = {key: value for key, value in study.given.items() if key not in more}
    try:
        return resolve(
            method.recipe,
            [f"{key}={value}" for key, value in of_user.items()],
            [f"{key}={value}" for key, value in of_study.items()],
        )
    except ConfigError as error:
        raise ConfigError(f"methods.{method.name} in {study.path}: {error}") from None


def _selected(method: StudyMethod, cells: Sequence[Cell]) -> dict[str, str] | None:
    """The choice with the best held-out accuracy, the first of equals; None while one is unknown."""
    own = [cell for cell in cells if cell.method == method.name]
    scores = [cell.score() for cell in own]
    if any(score is None for score in scores):
        return None
    best = max(own, key=lambda cell: cell.score() or 0.0, default=None)
    return dict(best.chosen) if best else {}


def _shared_set(study: Study, bases: Mapping[str, Recipe]) -> Manifest:
    """The training set that all methods have. Raises ConfigError for several."""
    manifests: dict[str, Manifest] = {}
    for name, base in bases.items():
        if base.config.launch.launcher == "torchrun":
            raise ConfigError(
                f"launch.launcher is 'torchrun' for methods.{name} in {study.path}, but a study starts the ranks of its cells; "
                "use launch.launcher=local or ray."
            )
        manifest = check_sets(base.config)
        if manifest is None:
            raise ConfigError(
                f"methods.{name} in {study.path} trains on shards without a manifest, whose number of images is not known "
                "before a run; prepare the images with `python -m data_prep`."
            )
        manifests[name] = manifest
    first_name, first = next(iter(manifests.items()))
    for name, manifest in manifests.items():
        if manifest.digest != first.digest:
            raise ConfigError(
                f"methods.{name} in {study.path} trains on {manifest.where} ({manifest.digest[:12]}), but methods.{first_name} "
                f"on {first.where} ({first.digest[:12]}); name one set for all of them, such as data.shards=SHARDS here."
            )
    return first


class _Lengths:
    """The length of each cell under the budget."""

    def __init__(
        self, study: Study, bases: Mapping[str, Recipe], manifest: Manifest, speeds: Mapping[str, float] | None
    ) -> None:
        self._study, self._bases, self._manifest, self._speeds = study, bases, manifest, speeds
        kind, amount = study.budget.kind, study.budget.amount
        self.passes = amount if kind == "passes" else None
        if kind == "epochs":
            base = bases[study.baseline].config
            per_epoch = self._steps_per_epoch(base)
            self.passes = Cost.of(base).passes(max(1, round(amount * per_epoch)), per_epoch)

    def cell(self, index: int, stage: Stage, method: StudyMethod, seed: int, folder: Path, chosen: Mapping[str, str]) -> Cell:
        base = base_recipe(self._study, method, chosen)
        per_epoch = self._steps_per_epoch(base.config)
        steps = self._steps(base.config, method.name, per_epoch)
        epochs = steps / per_epoch
        warmup = base.config.optim.warmup_epochs / base.config.train.epochs * epochs  # the recipe's share of the run
        own = {
            "name": f"{self._study.name}-{method.name}-{folder.name}",
            "run_dir": str(folder),
            "seed": str(seed),
            "train.epochs": repr(epochs),
            "optim.warmup_epochs": repr(warmup),
        }
        if base.config.tracking.uses("mlflow") and not base.config.tracking.uri:
            own["tracking.uri"] = self._study.tracking_uri
        if stage == "select":
            own["train.knn_every"] = "0"  # whose queries are of the test split
        elif base.origins.get("train.knn_every") == "default":
            own["train.knn_every"] = repr(epochs / CURVE_POINTS)
        recipe = base_recipe(self._study, method, {**chosen, **own})
        passes = None if self.passes is None and not _is_counted(base.config) else Cost.of(base.config).passes(steps, per_epoch)
        return Cell(
            index, stage, method.name, seed, folder, dict(chosen), recipe, steps, per_epoch, passes, self._study.protocols
        )

    def _steps_per_epoch(self, config: Config) -> int:
        return Plan.of(config, self._manifest.num_samples(config.data.train_split)).steps_per_epoch

    def _steps(self, config: Config, method: str, steps_per_epoch: int) -> int:
        kind, amount = self._study.budget.kind, self._study.budget.amount
        if self.passes is not None:
            return Cost.of(config).steps_for(self.passes, steps_per_epoch)
        if kind == "images":
            return steps_for_images(config, amount)
        if self._speeds is None:
            raise ConfigError(
                f"budget.seconds in {self._study.path} needs the speed of every method, which is not measured yet: run "
                f"`clae study {self._study.path} --measure` once on the machine that trains."
            )
        return steps_for_seconds(config, amount, self._speeds[method])


def _is_counted(config: Config) -> bool:
    return not config.views.local_crops and config.method.units(config.attack) is not None
