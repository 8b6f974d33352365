"""The run folder: what a run is, written down before it starts and checked before it goes on."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from clae_dist import __version__
from clae_dist.config import Config, ConfigError
from clae_dist.data.manifest import Manifest
from clae_dist.data.urls import uri_without_secrets, without_secrets
from clae_dist.files import write_together
from clae_dist.reading import Check, MissingError, ReadError, expect, is_count, is_number, is_text, read_object
from clae_dist.recipe import flatten, from_yaml, shapes_result, to_yaml
from clae_dist.redact import redact_text
from clae_dist.runs.checkpoint.places import find_checkpoints
from clae_dist.storage import storage_error
from clae_dist.world import World

IDENTITY_FILE = "run.json"
STOP_FILE = "STOP"  # a launcher that cannot signal its ranks asks them to stop by making this file


@dataclass(frozen=True)
class Identity:
    """What makes a run reproducible, beside its configuration. Kept in run.json."""

    package_version: str
    git_revision: str
    manifest_digest: str
    world_size: int
    backend: str
    collectives: str
    run_key: str
    started: float  # seconds since 1970, of the first start

    @property
    def tags(self) -> dict[str, str]:
        """What trackers and exports call the run."""
        return {
            "package_version": self.package_version,
            "git_revision": self.git_revision,
            "manifest_digest": self.manifest_digest,
        }


def git_revision() -> str:
    """The checkout's commit, with "+changes" where files differ from it; "" outside of a checkout."""
    here = Path(__file__).parents[2]
    try:
        if not (here / ".git").exists():
            return ""
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return revision + ("+changes" if dirty else "")


_FIELDS: dict[str, Check] = {
    **dict.fromkeys(("package_version", "git_revision", "manifest_digest", "backend", "collectives"), is_text),
    "run_key": lambda value: isinstance(value, str) and value.isalnum() and value.isascii(),
    "world_size": lambda value: is_count(value) and value > 0,
    "started": lambda value: is_number(value) and 0 <= value < 1e11,
}


def read_identity(run_dir: Path) -> Identity:
    """The content of run.json. Raises ConfigError when it is missing or damaged."""
    path = run_dir / IDENTITY_FILE
    try:
        content = read_object(path, 1 << 20)
        expect(content, _FIELDS)
    except MissingError:
        raise ConfigError(f"RUN is {str(run_dir)!r}, which holds no run.json; name the folder of a run.") from None
    except ReadError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); put a copy of it back, or delete it: the next `clae train` with the settings of "
            "its config.yaml writes a new one and resumes from the newest checkpoint."
        ) from None
    return Identity(**{key: content[key] for key in _FIELDS})


def shareable(config: Config) -> Config:
    """The configuration without the secrets of the URLs in it: what is written down outlives them, and others read it."""
    mixture = {without_secrets(name): share for name, share in config.data.mixture.items()}
    kept: Config = _redacted(config)
    return replace(
        kept,
        data=replace(kept.data, shards=without_secrets(config.data.shards), mixture=mixture),
        tracking=replace(kept.tracking, uri=uri_without_secrets(config.tracking.uri)),
    )


def _redacted(section: Any) -> Any:
    """A section, and those in it, with every text redacted: a URL may stand where it does not belong."""
    values = {one.name: getattr(section, one.name) for one in fields(section)}
    texts = {name: redact_text(value) for name, value in values.items() if isinstance(value, str)}
    sections = {name: _redacted(value) for name, value in values.items() if is_dataclass(value)}
    return replace(section, **texts, **sections)


def make_folder(folder: Path) -> None:
    """Raises ConfigError when a run's folder cannot be made, StorageError where storage is full, read-only or broken."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null character
        if storage := storage_error(error):
            raise storage from None
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"run_dir is {str(folder)!r}, which cannot be made ({reason}); name another folder.") from None


def check_run_folder(config: Config, manifest: Manifest | None) -> Identity | None:
    """The identity of the run that the folder holds, None for a new run; `manifest` None: its images are not known yet.

    Raises ConfigError when the folder belongs to another configuration or another set of images, naming what differs.
    """
    folder = config.folder
    known = (folder / IDENTITY_FILE).exists()
    if not ((folder / "config.yaml").is_file() and (known or find_checkpoints(folder))):
        return None
    old, identity = from_yaml(folder / "config.yaml"), read_identity(folder) if known else None
    before, now = flatten(old), flatten(shareable(config))
    differ = [f"{key} was {before[key]!r} and is {now[key]!r}" for key in now if shapes_result(key) and before[key] != now[key]]
    if identity and manifest is not None and identity.manifest_digest != manifest.digest:
        was, now_is = identity.manifest_digest[:12], manifest.digest[:12]
        differ.append(f"the images were {was} and are {now_is} (digest of the manifest)")
    if differ:
        raise ConfigError(
            f"run_dir is {str(folder)!r}, which belongs to another configuration: {'; '.join(differ)}. {_OTHER_RUN}"
        )
    return identity


_OTHER_RUN = "Give another run_dir for a run of its own, or the old settings to resume that one."


def open_run_folder(config: Config, origins: dict[str, str], manifest: Manifest, world: World, run_key: str) -> Identity:
    """Makes the run's folder, or checks that it is this run's. To be called on one rank.

    Raises ConfigError when the folder belongs to another configuration or another set of images, naming what differs, and
    StorageError when it cannot be written.
    """
    folder = config.folder
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
        )
    make_folder(folder)
    current: dict[str, Any] = {
        **vars(identity),
        "world_size": world.size,
        "backend": config.parallel.backend,
        "collectives": world.collectives,
    }
    write_together(
        {
            folder / "config.yaml": to_yaml(shareable(config), origins).encode(),
            folder / IDENTITY_FILE: (json.dumps(current, indent=2) + "\n").encode(),
        }
    )
    return Identity(**current)
