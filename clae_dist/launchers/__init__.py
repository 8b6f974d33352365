"""Who starts the ranks: this process (local), torchrun or Ray Train. No training logic."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from clae_dist.data.urls import absolute, redact_list
from clae_dist.errors import ConfigError
from clae_dist.recipe import Recipe
from clae_dist.redact import redact_word
from clae_dist.staging import is_url, normal_url

if TYPE_CHECKING:
    from clae_dist.config import Config
    from clae_dist.launchers.rank import Ending


def _with_absolute_paths(config: Config) -> Config:
    """Ranks may run in other folders than this process (Ray's do), and a run is evaluated from anywhere.

    Raises ConfigError for a set that a mixture names twice, and for a URL in the place of a folder.
    """
    for key, folder in (("train.parent", config.train.parent), ("data.cache", config.data.cache)):
        if is_url(folder):
            raise ConfigError(f"{key} is {redact_word(folder)!r}, which is a URL; name a folder that this machine sees.")
    cache = os.path.abspath(config.data.cache) if config.data.cache else ""
    mixture: dict[str, float] = {}
    for name, share in config.data.mixture.items():
        where = absolute(name)
        if where in mixture or where == absolute(config.data.shards):
            raise ConfigError(
                f"data.mixture names {redact_list(where)!r} twice, or beside data.shards; name each set once, with its "
                "whole share."
            )
        mixture[where] = share
    uri = config.tracking.uri
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{os.path.abspath(uri.removeprefix('sqlite:///'))}"
    return replace(
        config,
        run_dir=normal_url(config.run_dir, "run_dir") if is_url(config.run_dir) else str(config.folder.absolute()),
        train=replace(config.train, parent=config.train.parent and os.path.abspath(config.train.parent)),
        data=replace(config.data, shards=absolute(config.data.shards), mixture=mixture, cache=cache),
        tracking=replace(config.tracking, uri=uri),
    )


def claim(config: Config, *, trust: bool = False) -> str:
    """Checks a run folder that exists already, and notes that this user trains in it, for the commands that open it later.

    Returns "" or why it could not be noted. Raises ConfigError for a folder of somebody else's whose entries lead elsewhere.
    """
    from clae_dist.runs.trust import Permission, check_folder, remember

    config = _with_absolute_paths(config)
    check_folder(config.folder, Permission(trust))
    try:
        remember(config)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def start(recipe: Recipe, *, debug: bool = False, before_ranks: Callable[[], None] = lambda: None) -> Ending:
    """Train under the launcher that `launch.launcher` names; `before_ranks` is called when all checks have passed.

    Raises ConfigError and DataError.
    """
    import importlib

    from clae_dist.launchers.checks import check_run
    from clae_dist.object_store import check_store
    from clae_dist.runs.claim import make_folder, refuse_second_run
    from clae_dist.runs.folder import RunFolder
    from clae_dist.runs.mirror import forget_stop, prepare, send_rest

    config = _with_absolute_paths(recipe.config)
    if config.launch.min_workers and config.launch.launcher != "ray":
        raise ConfigError(
            f"launch.min_workers is {config.launch.min_workers}, but launch.launcher is {config.launch.launcher!r}; it is "
            "Ray's: use --launcher ray, or launch.min_workers=0 (torchrun: launch/torchrun.sh --nodes MIN:MAX)."
        )
    if config.launch.launcher != "torchrun":  # whose ranks are there already
        prepare(config.folder)
        check_run(config)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        check_store(config.folder)
    make_folder(config.folder)
    if config.launch.launcher != "torchrun":  # whose ranks all come here; rank 0 says it to all of them
        refuse_second_run(config.folder)
    # A request that a killed launcher left behind, here and in a bucket.
    if config.launch.launcher != "torchrun" or os.environ.get("RANK", "0") == "0":
        forget_stop(config.folder)
    else:
        RunFolder(config.folder).stop_file.unlink(missing_ok=True)
    launcher = importlib.import_module(f"clae_dist.launchers.{config.launch.launcher}")
    before_ranks()
    try:
        ending: Ending = launcher.launch(Recipe(config, recipe.origins), debug=debug)
    finally:
        if config.launch.launcher == "local":
            with suppress(OSError):  # reported by rank 0 as well; the next start sends it
                send_rest(config.folder)
    return ending
