"""Opening a run: its folder with the weights that it begins from, and the state that earlier starts have saved."""

from __future__ import annotations

from dataclasses import dataclass, field

from clae_dist.data.manifest import Manifest
from clae_dist.deploy.initial import resolve
from clae_dist.errors import ConfigError
from clae_dist.parallel import Backend
from clae_dist.recipe import Recipe
from clae_dist.runs.checkpoint import Shapes, SharedCheckpoint, load_checkpoint, remove_leftovers
from clae_dist.runs.checkpoint.objects import publish_checkpoints
from clae_dist.runs.claim import check_run_folder, open_run_folder
from clae_dist.runs.folder import Identity
from clae_dist.tracking import check_tracking, new_run_key
from clae_dist.training.extending import open_parent
from clae_dist.training.plan import Plan
from clae_dist.training.pseudo_labels import open_source
from clae_dist.training.session import Session


@dataclass(frozen=True)
class Before:
    """The part of the run that earlier starts have done and saved."""

    step: int = 0
    train_s: float = 0.0
    bad_samples: dict[str, str] = field(default_factory=dict)
    skipped_steps: int = 0


def open_folder(recipe: Recipe, session: Session, manifest: Manifest) -> Identity:
    """Create the run folder, with the weights of model.init or the state of train.parent, or check that it belongs to this run.

    On one rank. Pseudo-labels are made afterwards, by all ranks (training/pseudo_labels.py).

    Raises ConfigError and StorageError.
    """
    config, folder = session.config, session.folder
    check_tracking(config, config.folder)
    check_run_folder(config, manifest)
    parent = open_parent(config, manifest, session.say) if config.train.parent and not folder.find_checkpoints() else None
    initial = resolve(config) if config.model.init and not (config.train.parent or folder.initial_file.exists()) else None
    begun_with: dict[str, dict[str, str]] = {}
    if parent:
        before = parent.identity
        begun_with = {"initial": before.initial, "pseudo_labels": before.pseudo_labels, "parent": parent.record}
    elif initial:
        begun_with = {"initial": initial.record}
    source = config.method.clusters_from
    if source and not (parent or folder.identity_file.exists()):
        begun_with["pseudo_labels"] = open_source(source)[1]
    identity = open_run_folder(recipe, manifest, session.world, new_run_key(), **begun_with)
    if parent:
        if identity.parent != parent.record:  # a start that was killed before the copy was complete
            raise ConfigError(
                f"train.parent is {config.train.parent!r}, which has changed since this run was begun; restore it, or give "
                "another run_dir."
            )
        parent.begin(folder)
        publish_checkpoints(folder.path)
        session.say(parent.describe(Plan.of(config, manifest.num_samples(config.data.train_split))))
    if initial:
        if identity.initial != initial.record:  # a start that was killed before the copy was complete
            raise ConfigError(
                f"model.init is {initial.source!r}, whose weights have changed since this run was begun; restore them, or give "
                "another run_dir."
            )
        initial.write(folder)
        session.say(f"model.init: {initial.source}: {initial.match.describe()}; digest {initial.digest[:12]}")
    return identity


def resume(session: Session, backend: Backend, shapes: Shapes) -> Before:
    """Load the newest complete checkpoint, if any. Collective; raises CheckpointError on every rank."""
    folder = session.config.folder
    session.world.run_on_main(lambda: remove_leftovers(folder))
    checkpoint = load_checkpoint(folder, session.say, session.world, shapes)
    if checkpoint is None:
        return Before()
    shared = SharedCheckpoint(checkpoint, session.world)
    try:
        backend.load_state(shared.state())
    finally:  # what one rank could not read explains what others found
        shared.agree()
    info = checkpoint.info
    return Before(checkpoint.step, float(info.get("train_s", 0.0)), info.get("bad_samples", {}), info.get("skipped_steps", 0))
