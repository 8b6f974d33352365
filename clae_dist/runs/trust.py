"""Trust in a run folder: how far commands that open a run act on what the folder says.

A run folder made by others is data. Its config.yaml may name commands (`pipe:`), servers, databases and folders, and its
entries may be symbolic links that lead elsewhere. None of that is executed, contacted, written or followed unless

- the user says so (`--trust`), or names the images or the server in this command or environment, or
- this user's own `clae train` used the same settings in the same folder. `remember` notes that outside of the run folder, in
  the user's state folder (mode 700), which whoever can write to the run folder cannot change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from clae_dist.config import Config
from clae_dist.config.sharing import shareable
from clae_dist.data.urls import redact_list, uri_without_secrets
from clae_dist.errors import ConfigError
from clae_dist.files import write_atomically
from clae_dist.plugins import AnyPlugin, is_plugin
from clae_dist.reading import ReadError, read_object
from clae_dist.recipe import from_yaml
from clae_dist.runs.folder import FILES, FOLDERS, PREFIXES, RunFolder
from clae_dist.staging import shown_path, url_of
from clae_dist.world import state_home

_MAX_BYTES = 1 << 16  # of a note
_MAX_SETTINGS = 20  # that a note holds, the newest


@dataclass(frozen=True)
class Permission:
    """Permissions beyond reading: `trust` is --trust, `store` the tracking server named in the environment."""

    trust: bool = False
    store: str = ""


NOTHING = Permission()


@dataclass(frozen=True)
class OpenedRun:
    """The settings of a run folder. Act on `config` (config.yaml) only through `to_read_images` and `to_track`."""

    run_dir: Path
    config: Config
    trusted: bool
    store: str = ""

    def to_read_images(self, shards: str = "", mixture: bool = False) -> Config:
        """Settings with which the run's images may be opened.

        Args:
            shards: the location that the user gives, if any.
            mixture: include the sets of data.mixture.

        Raises: ConfigError if an untrusted run would run a command or contact a server for them.
        """
        data = self.config.data
        if shards:
            data = replace(data, shards=shards)
        if self.trusted:
            return replace(self.config, data=data)
        named = ([] if shards else [data.shards]) + ([*data.mixture] if mixture else [])
        _refuse_acting(named, RunFolder(self.run_dir).config_file, "name the images with --shards")
        return replace(self.config, data=replace(data, cache=""))  # the user's own cache

    def to_track(self) -> tuple[Config, str]:
        """Settings with which results may be sent to the run's tracking store, and the reason if nothing may be sent, or ""."""
        tracking = self.config.tracking
        if not tracking.uses("mlflow"):
            return self.config, ""
        if self.store and uri_without_secrets(self.store) == uri_without_secrets(tracking.uri):
            return replace(self.config, tracking=replace(tracking, uri=self.store)), ""  # with the user's own login
        if self.trusted:
            return self.config, ""
        named = f"tracking.uri {uri_without_secrets(tracking.uri)!r}" if tracking.uri else "mlflow.db beside the run folder"
        return self.config, f"nothing was sent to MLflow ({named}): {_NOT_YOURS}. --trust sends it."


_NOT_YOURS = "no `clae train` of yours on this machine used these settings in this folder"


def open_run(run_dir: Path, permission: Permission = NOTHING) -> OpenedRun:
    """Read the settings of a run folder, and check its entries unless it is trusted.

    Raises: ConfigError without a run, and for an entry that leads out of the folder or is not a plain file or folder.
    """
    folder = RunFolder(run_dir)
    path = folder.config_file
    if not os.path.lexists(path):
        raise folder.missing()
    if permission.trust:
        return OpenedRun(run_dir, from_yaml(path, AnyPlugin()), trusted=True, store=permission.store)
    strange = next(strange_entries(run_dir), "")
    if strange and path.is_symlink():
        raise _strange(run_dir, strange)
    opened = OpenedRun(run_dir, config := from_yaml(path, _plugins(run_dir)), is_remembered(run_dir, config), permission.store)
    if strange and not opened.trusted:
        raise _strange(run_dir, strange)
    return opened


def check_folder(run_dir: Path, permission: Permission = NOTHING) -> None:
    """Raise ConfigError for a folder that `open_run` would refuse; a missing one is reported by the caller."""
    if os.path.lexists(RunFolder(run_dir).config_file):
        open_run(run_dir, permission)


def _strange(run_dir: Path, what: str) -> ConfigError:
    return ConfigError(
        f"RUN is {shown_path(run_dir)!r}, whose {what}; {_NOT_YOURS}, so it is not opened. Remove that entry, or use --trust."
    )


def check_settings(path: Path, config: Config, named: set[str], store: str) -> Config:
    """The settings of a config.yaml for a command that only looks. `named` are the keys that the command line names, `store`
    is the tracking server that the environment names.

    Raises ConfigError where the file, unless it is that of a trusted run, names a command or a server.
    """
    try:
        if is_remembered(path.resolve().parent, from_yaml(path, _plugins(path.resolve().parent))):
            return config
    except ConfigError:  # no run's: it extends another, say
        pass
    data, tracking = config.data, config.tracking
    images = ([] if "data.shards" in named else [data.shards]) + ([] if "data.mixture" in named else [*data.mixture])
    _refuse_acting(images, path, "name the images with data.shards=… here")
    if "tracking.uri" not in named and tracking.name != "none" and tracking.uri != store:
        _refuse_acting([uri_without_secrets(tracking.uri)], path, "name it with tracking.uri=… here, or add tracking.name=none")
    return config if "data.cache" in named else replace(config, data=replace(data, cache=""))


def _refuse_acting(values: list[str], path: Path, way_out: str) -> None:
    for text in filter(acts, values):
        raise ConfigError(
            f"{redact_list(text)!r} in {path} may run a command or contact a server, and {_NOT_YOURS}; {way_out}, or use "
            "--trust if you trust these settings."
        )


def acts(text: str) -> bool:
    """True if opening `data.shards` may run a command or contact a server.

    Braces are not expanded, which could take any amount of memory: no entry has a scheme without a colon of its own.
    """
    return any(":" in re.sub(r"^(file:(//)?|sqlite:///)", "", entry) for entry in text.split("::"))


def strange_entries(run_dir: Path) -> Iterator[str]:
    """Descriptions of entries that lead out of the run folder, or are neither files nor folders (a pipe, a device)."""
    root = os.path.realpath(run_dir)
    folders = [root]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if folder == root and entry.name not in FOLDERS | FILES and not entry.name.startswith(PREFIXES):
                    continue  # nothing opens it
                name = os.path.relpath(entry.path, root)
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if os.path.commonpath([root, target]) != root:
                        yield f"{name} is a symbolic link to {target!r}, outside of it"
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    yield f"{name} is neither a file nor a folder"


# ---- settings that this user's own `clae train` used ----


def remember(config: Config) -> None:
    """Note that this user's command trains with these settings in `config.folder`. Raises OSError."""
    note = _note(config.folder)
    note.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    if not _is_private(note.parent):
        note.parent.chmod(0o700)  # fails where it is another user's
    settings = [*(one for one in _remembered(note) if one != _digest(config)), _digest(config)][-_MAX_SETTINGS:]
    plugins = sorted({*_plugins(config.folder), *filter(is_plugin, (config.method.name, config.objective.name))})
    content = {"run_dir": url_of(config.folder) or os.path.realpath(config.folder), "settings": settings, "plugins": plugins}
    write_atomically(note, (json.dumps(content) + "\n").encode())


def is_remembered(run_dir: Path, config: Config) -> bool:
    """True if this user's own `clae train` used the same acting settings in this folder."""
    note = _note(run_dir)
    return _is_private(note.parent) and _digest(config) in _remembered(note)


def _note(run_dir: Path) -> Path:
    path = url_of(run_dir) or os.path.realpath(run_dir)
    return state_home() / "runs" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def _plugins(run_dir: Path) -> list[str]:
    """Methods and objectives from outside that this user's own `clae train` used in this folder."""
    note = _note(run_dir)
    return _remembered(note, "plugins") if _is_private(note.parent) else []


def _remembered(note: Path, key: str = "settings") -> list[str]:
    try:
        settings = read_object(note, _MAX_BYTES).get(key)
    except ReadError:  # no note, or a damaged one: nothing is trusted
        return []
    return [one for one in settings if isinstance(one, str)] if isinstance(settings, list) else []


def _is_private(folder: Path) -> bool:
    """True if nobody but this user can have written the notes."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _digest(config: Config) -> str:
    """sha256 of the settings that make a command run, contact or write something, as written in config.yaml."""
    kept = shareable(config)
    acting = [kept.data.shards, kept.data.mixture, kept.data.cache, kept.tracking.name, kept.tracking.uri]
    return hashlib.sha256(json.dumps(acting, sort_keys=True).encode()).hexdigest()
