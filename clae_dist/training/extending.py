"""The start of a run that continues a finished one, its parent (`clae train RUN --extend epochs=N`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clae_dist.config import Config
from clae_dist.data.manifest import Manifest
from clae_dist.errors import ConfigError
from clae_dist.files import file_sha256
from clae_dist.runs.checkpoint import Checkpoint, load_checkpoint
from clae_dist.runs.checkpoint.index import INDEX
from clae_dist.runs.folder import Identity, RunFolder, step_of
from clae_dist.runs.parent import check_extension, check_new_folder, take_over
from clae_dist.training.plan import Plan
from clae_dist.wording import count_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class Parent:
    """A finished run, and its checkpoint from which another run continues."""

    folder: RunFolder
    identity: Identity
    checkpoint: Checkpoint
    plan: Plan

    @property
    def record(self) -> dict[str, str]:
        """Its entry in run.json of the run that continues it."""
        return {
            "run": str(self.folder.path),
            "run_key": self.identity.run_key,
            "step": str(self.checkpoint.step),
            "checkpoint": file_sha256(self.checkpoint.path / INDEX),
        }

    def begin(self, folder: RunFolder) -> None:
        """Give the new run in `folder` the state of this one."""
        take_over(self.folder, self.checkpoint, folder)

    def describe(self, plan: Plan) -> str:
        """The line that a run with `plan` prints when it begins."""
        step, more = self.checkpoint.step, plan.total - self.checkpoint.step
        last, here = self.plan.learning_rate(step - 1), plan.learning_rate(step)
        schedule = f"the {plan.config.optim.schedule} schedule of {count_of(plan.config.train.epochs, 'epoch')}"
        rate = f"the learning rate stays {here:.4g}"
        if abs(here - last) > 0.01 * last:
            rate = f"the learning rate ended at {last:.4g} there and is {here:.4g} here, by {schedule}: a warm restart"
        return f"continuing {self.folder.path} after its {count_of(step, 'step')}, {more:,} more follow; {rate}"


def check_parent(config: Config, manifest: Manifest | None) -> None:
    """Check a new run's parent without reading its tensors, before ranks start. Raises ConfigError.

    Args:
        manifest: the training images, or None if they are not known yet.
    """
    folder = RunFolder(Path(config.train.parent))
    before = _read_config(folder)
    check_extension(config, before)
    check_new_folder(RunFolder(config.folder))
    if manifest is not None:
        newest = next(iter(folder.find_checkpoints()), None)
        _finished_plan(folder, before, manifest, step_of(newest) if newest else 0)


def open_parent(config: Config, manifest: Manifest, say: Say) -> Parent:
    """The parent of a new run, with every byte of its newest checkpoint verified. Raises ConfigError."""
    check_parent(config, manifest)
    folder = RunFolder(Path(config.train.parent))
    identity = folder.read_identity()
    if identity.manifest_digest != manifest.digest:
        raise ConfigError(
            f"train.parent is {config.train.parent!r}, which was trained on the images {identity.manifest_digest[:12]}, but "
            f"data.shards has {manifest.digest[:12]} (digest of the manifest); name the images of the parent."
        )
    checkpoint = load_checkpoint(folder.path, say)
    assert checkpoint is not None, "check_parent has seen one"
    return Parent(folder, identity, checkpoint, _finished_plan(folder, _read_config(folder), manifest, checkpoint.step))


def _read_config(folder: RunFolder) -> Config:
    if not folder.config_file.is_file():
        raise ConfigError(
            f"train.parent is {str(folder.path)!r}, which holds no run; name the folder of a finished run, or restore it."
        )
    return folder.read_config()


def _finished_plan(folder: RunFolder, config: Config, manifest: Manifest, step: int) -> Plan:
    plan = Plan.of(config, manifest.num_samples(config.data.train_split))
    if step < plan.total:
        raise ConfigError(
            f"train.parent is {str(folder.path)!r}, which has not finished: its newest complete checkpoint is of step {step:,} "
            f"of {plan.total:,}; finish it first with `clae train {folder.config_file}`."
        )
    return plan
