"""All settings of a run: typed, frozen, with help and bounds. recipe.py builds a Config from YAML and overrides."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from clae_dist.config.images import Augment, Batch, Data, Views
from clae_dist.config.method import Attack, MethodSettings
from clae_dist.config.model import Model, Optim
from clae_dist.config.objective import Objective
from clae_dist.config.rules import Section, setting
from clae_dist.config.running import Checkpointing, Evaluation, Guard, Launch, Parallel, Tracking, Train
from clae_dist.errors import ConfigError
from clae_dist.staging import is_url, normal_url, staging_folder

__all__ = [
    "Attack",
    "Augment",
    "Batch",
    "Checkpointing",
    "Config",
    "Data",
    "Evaluation",
    "Guard",
    "Launch",
    "MethodSettings",
    "Model",
    "Objective",
    "Optim",
    "Parallel",
    "Tracking",
    "Train",
    "Views",
]


def _default_method() -> MethodSettings:
    """The settings of `clae`, found by name: methods/ is above this layer."""
    settings: MethodSettings = importlib.import_module("clae_dist.methods.clae").Clae.Settings()
    return settings


@dataclass(frozen=True)
class Config(Section):
    """All settings of a run."""

    name: str = setting("run", help="Name of the run and of its folder.")
    run_dir: str = setting(
        "",
        no_effect=True,
        help="Folder of the run, or one on object storage: s3://BUCKET/PATH, gs://BUCKET/PATH. Empty: runs/NAME.",
    )
    seed: int = setting(0, ge=0, lt=2**63, help="Seed of weights, order of samples and augmentations.")
    data: Data = Data()
    augment: Augment = Augment()
    views: Views = Views()
    batch: Batch = Batch()
    model: Model = Model()
    objective: Objective = Objective()
    method: MethodSettings = field(default_factory=_default_method)
    attack: Attack = Attack()
    optim: Optim = Optim()
    train: Train = Train()
    checkpoint: Checkpointing = Checkpointing()
    parallel: Parallel = Parallel()
    launch: Launch = Launch()
    guard: Guard = Guard()
    tracking: Tracking = Tracking()
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.name.strip(" .") != "" and "/" not in self.name
        self.require(plain, "name", "use a plain word; the run's folder gets this name.")
        streams, size = self.data.streams, self.batch.global_size
        if streams and size % streams:
            near = _nearest_divisor(size, streams)
            raise ConfigError(f"data.streams is {streams}, which does not divide batch.global_size {size}; try {near}.")
        if self.evaluation.route == "adversarial" and not self.method.two_routes:
            raise ConfigError(
                f"evaluation.route is 'adversarial', but method.name={self.method.name} has one route of norm layers; use auto."
            )
        self._check_local_crops()
        if is_url(self.run_dir):
            normal_url(self.run_dir, "run_dir")
        self.method.check(self.attack)
        self.method.check_run(self)
        if self.optim.warmup_epochs >= self.train.epochs and self.optim.warmup_epochs > 0:
            raise ConfigError(
                f"optim.warmup_epochs is {self.optim.warmup_epochs:g}, but train.epochs is {self.train.epochs:g}; "
                f"warm up for a part of the run, usually a tenth."
            )

    @property
    def folder(self) -> Path:
        """The run folder; of one on object storage, the folder that stages it on this node."""
        if is_url(self.run_dir):
            return staging_folder(self.run_dir)
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def num_streams(self) -> int:
        """Canonical streams: a property of the run, the same at every world size."""
        return self.data.streams or max(d for d in range(1, 257) if self.batch.global_size % d == 0)

    def rows_per_rank(self, world_size: int) -> int:
        """B, the rows of the global batch on each of `world_size` ranks. Raises ConfigError when they cannot be equal."""
        size, streams = self.batch.global_size, self.num_streams
        if size % world_size:
            below, above = size // world_size * world_size, -(-size // world_size) * world_size
            choice = f"{above}" if below < 2 else f"{below} or {above}"
            raise ConfigError(f"batch.global_size is {size}, but {world_size} ranks need equal rows; try {choice}.")
        if streams % world_size:
            suitable = streams * world_size // math.gcd(streams, world_size)
            way_out = f"try data.streams={suitable}" if size % suitable == 0 else "use another number of ranks"
            raise ConfigError(f"data.streams is {streams}, which {world_size} ranks cannot share equally; {way_out}.")
        rows, micro = size // world_size, self.batch.micro_size
        if micro and rows % micro:
            near = _nearest_divisor(rows, micro)
            raise ConfigError(f"batch.micro_size is {micro}, which does not divide the {rows} rows of a rank; try {near}.")
        self.method.check_rows(rows, micro)
        return rows

    def works_on(self, world_size: int) -> bool:
        """True if `world_size` ranks can share the global batch."""
        try:
            self.rows_per_rank(world_size)
        except ConfigError:
            return False
        return True

    def with_few_rows(self, rows: int, world_size: int) -> Config:
        """These settings with `rows` rows a rank and every term of the loss from the first step, for a trial of a few steps."""
        micro = max(1, rows // 2) if self.batch.micro_size else 0
        return replace(
            self,
            data=replace(self.data, streams=0),
            batch=replace(self.batch, global_size=rows * world_size, micro_size=micro),
            method=self.method.for_few_rows(rows * world_size),
        )

    def _check_local_crops(self) -> None:
        if self.views.local_crops and not self.method.takes_local_crops:
            raise ConfigError(
                f"views.local_crops is {self.views.local_crops}, for which method.name={self.method.name} has no term; remove "
                "it, or use method.name=simclr or clae."
            )
        if self.views.local_crops and self.objective.name != "nt_xent":
            raise ConfigError(
                f"views.local_crops is {self.views.local_crops}, but objective.name is {self.objective.name!r}, which has no "
                "form for more than two views; use objective.name=nt_xent."
            )

    @property
    def local_size(self) -> int:
        """Side of the small crops in pixels."""
        return self.views.local_size or self.data.image_size // 2

    @property
    def evaluated_route(self) -> Literal["clean", "adversarial"]:
        """The norm layers of evaluation, exports and embeddings."""
        return self.method.evaluated_route if self.evaluation.route == "auto" else self.evaluation.route

    def learning_rate(self) -> float:
        """The peak learning rate at this global batch (Goyal et al. 2017 for linear, Chen et al. 2020 B.1 for sqrt)."""
        ratio = self.batch.global_size / self.optim.reference_batch
        return self.optim.learning_rate * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.optim.scaling]


def _nearest_divisor(size: int, target: int) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - target))
