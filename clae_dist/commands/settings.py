"""Settings of a command: the recipe, the command line and the environment, and how far they are trusted."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clae_dist.errors import ConfigError
from clae_dist.recipe import Recipe, resolve
from clae_dist.redact import redact_word, uri_without_secrets
from clae_dist.staging import is_url

if TYPE_CHECKING:
    from clae_dist.runs.trust import Permission

_CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_AUTH")


def resolved(arguments: argparse.Namespace, defaults: Sequence[str] = ()) -> Recipe:
    """The settings of recipe, command line and environment; the command line takes precedence over `defaults`."""
    return with_tracking_server(resolve(arguments.config, arguments.overrides, defaults))


def extended(arguments: argparse.Namespace) -> Recipe:
    """The settings of the run that continues the finished run `arguments.config` until `arguments.extend` epochs.

    Its name and folder are the parent's with "-epochsN" unless the command line names others. Raises ConfigError for a folder
    that is no run or is not trusted, and for settings that an extended run may not change.
    """
    from clae_dist.runs.folder import RunFolder
    from clae_dist.runs.parent import check_extension
    from clae_dist.runs.trust import open_run

    if is_url(arguments.config):
        raise ConfigError(
            f"--extend is given {redact_word(arguments.config)!r}, which is a URL; copy that run to a folder of this machine, "
            "and name the folder (run_dir may be a URL)."
        )
    parent = RunFolder(Path(os.path.abspath(arguments.config)))
    before = open_run(parent.path, permission(arguments)).config
    set_option(arguments, "extend", "train.epochs")
    given = dict(text.split("=", 1) for text in arguments.overrides if "=" in text)
    folder = given.get("name") or _extended_name(parent.path.name, arguments.extend)
    defaults = [
        f"name={_extended_name(before.name, arguments.extend)}",
        f"run_dir={parent.path.parent / folder}",
        f"train.parent={parent.path}",
    ]
    arguments.config = str(parent.config_file)
    recipe = check_trust(arguments, resolved(arguments, defaults))
    check_extension(recipe.config, before)
    return recipe


def _extended_name(name: str, epochs: str) -> str:
    return f"{re.sub(r'-epochs[0-9.]+$', '', name)}-epochs{epochs}"


def with_tracking_server(recipe: Recipe) -> Recipe:
    """The settings, with the tracking server of the environment unless they name one."""
    store = tracking_server()
    config = recipe.config
    if not store or config.tracking.uri:
        return recipe
    config = replace(config, tracking=replace(config.tracking, uri=store))
    return Recipe(config, {**recipe.origins, "tracking.uri": "MLFLOW_TRACKING_URI"})


def set_option(arguments: argparse.Namespace, option: str, key: str) -> None:
    """Turn an option that stands for a setting into an override. Raises ConfigError if both are given."""
    value = getattr(arguments, option)
    if value is None:
        return
    if any(text.startswith(f"{key}=") for text in arguments.overrides):
        raise ConfigError(f"--{option} and {key}= are the same setting, and both are given; keep one of them.")
    arguments.overrides.append(f"{key}={value}")


def permission(arguments: argparse.Namespace) -> Permission:
    """The user's permission to act on settings of a run folder."""
    from clae_dist.runs.trust import Permission

    return Permission(arguments.trust, tracking_server())


def check_trust(arguments: argparse.Namespace, recipe: Recipe) -> Recipe:
    """Return the settings that may be acted on by a command that only checks a recipe.

    A run folder's config.yaml is data there, as for every command that opens a run, except for values on the command line.
    """
    from clae_dist.runs.folder import RunFolder

    path = Path(arguments.config)
    file_name = RunFolder(path.parent).config_file.name
    if arguments.trust or file_name not in (path.name, path.resolve().name):
        return recipe
    from clae_dist.runs.trust import check_settings

    named = {key for key, origin in recipe.origins.items() if origin == "command line"}
    return recipe._replace(config=check_settings(path, recipe.config, named, tracking_server()))


def check_credentials(recipe: Recipe) -> None:
    """Raise ConfigError if MLflow's client would send the environment's credentials to a server that only a recipe names."""
    config = recipe.config
    store, uri, origin = tracking_server(), config.tracking.uri, recipe.origins["tracking.uri"]
    credentials = [name for name in _CREDENTIALS if os.environ.get(name)]
    named_by_user = origin in ("command line", "MLFLOW_TRACKING_URI") or not uri.startswith(("http:", "https:"))
    shown, of_environment = uri_without_secrets(uri), uri_without_secrets(store)
    if store and credentials and not named_by_user and shown != of_environment and config.tracking.name != "none":
        raise ConfigError(
            f"tracking.uri is {shown!r} ({origin}), but {credentials[0]} in the environment is for MLFLOW_TRACKING_URI, "
            f"{of_environment!r}, and would be sent; unset one of them, or name the server on the command line "
            f"(tracking.uri={shown})."
        )


def tracking_server() -> str:
    """The tracking server that the environment names, or ""."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")
