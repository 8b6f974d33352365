"""The parent of a run (`train.parent`): a finished run that it continues with a longer schedule.

A new run takes the parent's newest checkpoint and initial weights into its own folder, and needs the parent no more. Nothing is
written to the parent.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from clae_dist.config import Config
from clae_dist.config.sharing import shareable
from clae_dist.errors import ConfigError
from clae_dist.files import sync_folder
from clae_dist.keys import flatten, shapes_result
from clae_dist.runs.checkpoint.index import INDEX
from clae_dist.runs.checkpoint.read import Checkpoint
from clae_dist.runs.folder import FILES, FOLDERS, PREFIXES, RunFolder

# The length and the learning rate. All else decides what the parent's checkpoint means: its tensors, and its step as a position
# in the order of samples.
MAY_CHANGE = ("name", "train.epochs", "train.parent", "optim.learning_rate", "optim.schedule", "optim.factors")


def check_extension(config: Config, parent: Config) -> None:
    """Raise ConfigError unless `config` is `parent` with more epochs, as far as settings shape the result of a run."""
    before, now = flatten(shareable(parent)), flatten(shareable(config))
    differ = [
        f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in now.items()
        if key not in MAY_CHANGE and shapes_result(key, config) and before.get(key) != value
    ]
    if differ:
        raise ConfigError(
            f"train.parent is {config.train.parent!r}, a run with other settings: {'; '.join(differ)}. An extended run may "
            f"change {', '.join(MAY_CHANGE[3:])} and settings without effect on the result; with others, start a new run from "
            f"its weights: model.init={config.train.parent}."
        )
    if config.train.epochs <= parent.train.epochs:
        raise ConfigError(
            f"train.epochs is {config.train.epochs:g}, but the run that it extends has {parent.train.epochs:g} epochs already; "
            "use more."
        )


def check_new_folder(folder: RunFolder) -> None:
    """Raise ConfigError if the folder of a new run holds files of something else."""
    names = [path.name for path in folder.path.iterdir()] if folder.path.is_dir() else []
    strange = sorted(name for name in names if name not in FILES | FOLDERS and not name.startswith(PREFIXES))
    if strange:
        raise ConfigError(
            f"run_dir is {str(folder.path)!r}, which is no run and holds {strange[0]}; give another run_dir or name for the "
            "extended run."
        )


def take_over(parent: RunFolder, checkpoint: Checkpoint, folder: RunFolder) -> None:
    """Copy a checkpoint, the initial weights and the pseudo-labels of the parent into a new run's folder.

    Complete copies alone get their name.
    """
    for source, copy, names in (
        (parent.initial, folder.initial, [parent.initial_weights.name, parent.initial_file.name]),
        (parent.pseudo_labels, folder.pseudo_labels, [parent.pseudo_label_table.name, parent.pseudo_labels_file.name]),
        (checkpoint.path, folder.checkpoint(checkpoint.step), [INDEX, *checkpoint.index.files]),
    ):
        if source.is_dir() and not copy.exists():
            _copy(source, copy, names)


def _copy(source: Path, copy: Path, names: list[str]) -> None:
    partial = copy.with_name(f"{copy.name}.partial-parent")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, partial / name, follow_symlinks=False)
    sync_folder(partial)
    partial.replace(copy)
    sync_folder(copy.parent)
