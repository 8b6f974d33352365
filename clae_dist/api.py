"""Functions of `import clae_dist` that start the work of a command: settings, training, evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clae_dist.errors import (
    BAD_CONFIG,
    BAD_DATA,
    OK,
    STOPPED,
    STORAGE,
    CheckpointError,
    ClaeError,
    ConfigError,
    DataError,
    RankError,
)
from clae_dist.lifetime import main_module_hidden

if TYPE_CHECKING:
    from clae_dist.config import Config

_ERRORS: dict[int, type[ClaeError]] = {BAD_CONFIG: ConfigError, BAD_DATA: DataError, STORAGE: CheckpointError}


@dataclass(frozen=True)
class TrainResult:
    """A run after `train`: its folder, and False in `finished` if a signal stopped it, with everything saved."""

    run: Path
    finished: bool


def load_config(recipe: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The settings of a recipe, with overrides.

    Args:
        recipe: the path of a YAML file, or the name of a recipe in the package, such as "cifar10/clae"; None: the defaults.
        overrides: settings that take precedence, such as {"data.shards": "shards", "train.epochs": 10}.

    Raises ConfigError for an unknown key or a value that cannot be used, with the key, the value and the way out.
    """
    from clae_dist.recipe import Setting, build, check_key, find_recipe, read_recipe

    settings = read_recipe(find_recipe(os.fspath(recipe))) if recipe is not None else {}
    for key, value in (overrides or {}).items():
        check_key(key, "overrides")
        settings[key] = Setting(os.fspath(value) if isinstance(value, os.PathLike) else value, "overrides")
    return build(settings)


def train(config: Config, *, quiet: bool = False, trust: bool = False) -> TrainResult:
    """Train as `clae train` does, by the launcher that `launch.launcher` names; resume if the run folder has a checkpoint.

    Args:
        config: from `load_config`.
        quiet: print only errors; console.log in the run folder has all lines.
        trust: also continue in a run folder of another user with links that lead out of it.

    Raises ConfigError, DataError, CheckpointError (of storage) or RankError (a rank failed or hung), all of them ClaeError.
    """
    from clae_dist.commands.settings import check_credentials, with_tracking_server
    from clae_dist.config import Config
    from clae_dist.keys import flatten
    from clae_dist.launchers import claim, start
    from clae_dist.recipe import Recipe

    defaults = flatten(Config())
    origins = {key: "default" if value == defaults[key] else "Python" for key, value in flatten(config).items()}
    recipe = with_tracking_server(Recipe(config, origins))
    check_credentials(recipe)
    with _quiet() if quiet else nullcontext(), main_module_hidden():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            claim(recipe.config, trust=trust)
        ending = start(recipe)
    if ending.code not in (OK, STOPPED):
        raise _ERRORS.get(ending.code, RankError)(ending.message)
    return TrainResult(recipe.config.folder, ending.code == OK)


@contextmanager
def _quiet() -> Iterator[None]:
    """Context in which ranks print only errors."""
    from clae_dist.launchers.terminal import QUIET

    before = os.environ.get(QUIET)
    os.environ[QUIET] = "1"  # inherited by the ranks
    try:
        yield
    finally:
        if before is None:
            del os.environ[QUIET]
        else:
            os.environ[QUIET] = before


def evaluate(run: str | os.PathLike[str], *, shards: str = "", trust: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Evaluate a run's encoder before and after pretraining, as `clae evaluate` does; return the content of evaluation.json.

    Args:
        run: the folder of a run.
        shards: the images, if they are no longer where the run's config.yaml says.
        trust: act on what the config.yaml of another user's run names (see `clae evaluate --help`).
        quiet: print nothing.

    Raises ConfigError without a checkpoint, DataError for unusable shards, StorageError if the result cannot be written.
    """
    from clae_dist import escape
    from clae_dist.runs.trust import Permission
    from clae_dist.training import finish

    permission = Permission(trust, os.environ.get("MLFLOW_TRACKING_URI", ""))
    say = (lambda _: None) if quiet else escape.say
    return finish.evaluate(finish.Request(os.fspath(run), shards, permission=permission), say=say)
