"""Claiming a run folder before writing to it: the folder's identity, and one writing process at a time.

Rank 0 holds training.lease while it trains, `clae evaluate` holds evaluation.lease.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from clae_dist import __version__
from clae_dist.config import Config
from clae_dist.config.sharing import shareable
from clae_dist.data.manifest import Manifest
from clae_dist.errors import ConfigError
from clae_dist.files import make_folders, write_together
from clae_dist.keys import flatten, shapes_result
from clae_dist.lease import WAIT_S, hold, refuse_if_held
from clae_dist.plugins import source_digests
from clae_dist.recipe import Recipe, from_yaml, to_yaml
from clae_dist.runs.folder import Identity, RunFolder
from clae_dist.storage import storage_error, writing
from clae_dist.versions import git_revision
from clae_dist.world import World

_WAY_OUT = "wait until it has ended or end it, or give another run_dir."
_RESTART_WAIT_S = 60.0  # the rank 0 of an abandoned attempt may run on another host, and end after this one starts


def make_folder(folder: Path) -> None:
    """Create a run folder. Raises ConfigError for an unusable path, StorageError if storage is full, read-only or broken."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null character
        if storage := storage_error(error):
            raise storage from None
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"run_dir is {str(folder)!r}, which cannot be created ({reason}); name another folder.") from None


def check_run_folder(config: Config, manifest: Manifest | None) -> Identity | None:
    """Check that config.folder is new or belongs to this run.

    Args:
        manifest: the training images, or None if they are not known yet.

    Returns: the identity of the run in the folder, None for a new run.
    Raises: ConfigError if the folder belongs to another configuration or other images; the message lists the differences.
    """
    folder = RunFolder(config.folder)
    has_identity = folder.identity_file.exists()
    if not (folder.config_file.is_file() and (has_identity or folder.find_checkpoints())):
        return None
    own = {config.method.name, config.objective.name}  # this command imports them anyway
    old, identity = from_yaml(folder.config_file, own), folder.read_identity() if has_identity else None
    before, now = flatten(old), flatten(shareable(config))
    differ = [
        f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in now.items()
        if shapes_result(key, config) and before.get(key) != value
    ]
    if identity and manifest is not None and identity.manifest_digest != manifest.digest:
        old_digest, new_digest = identity.manifest_digest[:12], manifest.digest[:12]
        differ.append(f"the images were {old_digest} and are {new_digest} (digest of the manifest)")
    digests = source_digests(own)
    if identity and identity.plugins != digests:
        changed = sorted(name for name in {*identity.plugins, *digests} if identity.plugins.get(name) != digests.get(name))
        differ.append(f"the source of {', '.join(changed)} has changed")
    if differ:
        raise ConfigError(
            f"run_dir is {str(folder.path)!r}, which belongs to another configuration: {'; '.join(differ)}. {_OTHER_RUN}"
        )
    return identity


_OTHER_RUN = "Give another run_dir for a run of its own, or the old settings to resume that one."


def open_run_folder(
    recipe: Recipe, manifest: Manifest, world: World, run_key: str, **begun_with: Mapping[str, str]
) -> Identity:
    """Create the run folder, or check that it belongs to this run; write config.yaml and run.json. Called on one rank.

    Args:
        begun_with: `initial` and `parent` of the Identity of a new run.

    Raises: ConfigError if the folder belongs to another configuration or other images, StorageError if it cannot be written.
    """
    config = recipe.config
    folder = RunFolder(config.folder)
    identity = check_run_folder(config, manifest)
    if identity is None:
        identity = Identity(
            package_version=__version__,
            git_revision=git_revision(),
            manifest_digest=manifest.digest,
            world_size=world.size,
            backend=config.parallel.backend,
            collectives=world.collectives,
            run_key=run_key,
            started=time.time(),
            plugins=source_digests((config.method.name, config.objective.name)),
            **{name: dict(record) for name, record in begun_with.items()},
        )
    make_folder(folder.path)
    current: dict[str, Any] = {
        **vars(identity),
        "world_size": world.size,
        "backend": config.parallel.backend,
        "collectives": world.collectives,
    }
    write_together(
        {
            folder.config_file: to_yaml(shareable(config), recipe.origins).encode(),
            folder.identity_file: (json.dumps(current, indent=2) + "\n").encode(),
        }
    )
    return Identity(**current)


def refuse_second_run(folder: Path) -> None:
    """Raise ConfigError if another `clae train` is using this folder; called before anything is started or written."""
    with writing(folder):
        refuse_if_held(RunFolder(folder).training_lease, ConfigError, _WAY_OUT)


@contextmanager
def only_run(folder: Path, world: World, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the training lease of the folder. Collective. Raises ConfigError or StorageError on every rank."""
    with ExitStack() as stack:

        def take() -> None:
            make_folder(folder)
            wait_s = WAIT_S if world.size == world.local_size else _RESTART_WAIT_S
            with writing(folder):
                stack.enter_context(
                    hold(RunFolder(folder).training_lease, "clae train", ConfigError, _WAY_OUT, wait_s=wait_s, say=say)
                )

        world.run_on_main(take)
        yield


@contextmanager
def only_evaluation(folder: Path, world: World, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the evaluation lease of the folder, which is created. Collective.

    Raises ConfigError if it is held, StorageError if it cannot be written.
    """
    way_out = "wait until it has ended or end it."
    with ExitStack() as stack:

        def take() -> None:
            make_folders(folder)
            with writing(folder):
                stack.enter_context(hold(RunFolder(folder).evaluation_lease, "clae evaluate", ConfigError, way_out, say=say))

        world.run_on_main(take)
        yield
