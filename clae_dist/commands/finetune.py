"""`clae finetune`."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clae_dist.commands.arguments import add_launcher, add_shards, add_trust
from clae_dist.commands.train import add_quiet
from clae_dist.errors import ConfigError, DataError
from clae_dist.escape import say
from clae_dist.options import Parser, run_or_name, user_path
from clae_dist.reading import ReadError, read_object
from clae_dist.staging import url_of
from clae_dist.wording import count_of

if TYPE_CHECKING:
    from clae_dist.recipe import Recipe

SUMMARY = "train a pretrained encoder for a task: classify, adversarial, domain, noisy, retrieve"
DESCRIPTION = (
    "Train a pretrained encoder for a task. The run is one like those of `clae train`: the same loop, launchers, checkpoints "
    "and resuming; its folder is runs/SOURCE-TASK unless name= or run_dir= says otherwise. What TASK does not set about the "
    "encoder and the images is SOURCE's."
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=run_or_name,
        help="a run or an exported encoder (a folder or s3://…), or timm/NAME for the published weights of that encoder",
    )
    parser.add_argument(
        "config",
        metavar="TASK",
        type=lambda text: str(user_path(text)),
        help="a recipe whose method.name is a task: a YAML file, or one of finetune/classify, adversarial, domain, longtail, "
        "noisy and retrieve",
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings that take precedence over TASK's and SOURCE's"
    )
    add_shards(parser)
    parser.add_argument(
        "--target",
        default="",
        metavar="SHARDS",
        help="for the task domain: the images of the target, whose labels are not used",
    )
    parser.add_argument(
        "--write",
        metavar="FILE",
        type=user_path,
        help="write the settings as a recipe and train nothing: launch/torchrun.sh, the Slurm and the Ray scripts take it",
    )
    add_launcher(parser, "ray", "torchrun", "local")
    add_quiet(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.commands.settings import set_option
    from clae_dist.commands.train import exit_at_signals, train
    from clae_dist.launchers.output import lasting_output

    with lasting_output(), exit_at_signals() as exit_if_asked:
        set_option(arguments, "launcher", "launch.launcher")
        recipe = settings_of(arguments)
        if arguments.write:
            return write(recipe, arguments.write)
        return train(recipe, arguments, exit_if_asked)


def write(recipe: Recipe, path: Path) -> int:
    """Write the settings as a recipe, with the origin of each.

    Raises StorageError, and ConfigError for an encoder or classes with which a start would end.
    """
    import torch

    from clae_dist.config.sharing import shareable
    from clae_dist.files import write_atomically
    from clae_dist.models import build_model
    from clae_dist.recipe import to_yaml
    from clae_dist.storage import writing
    from clae_dist.training.sets import check_method_sets

    with torch.device("meta"):
        build_model(recipe.config)
    with suppress(DataError):  # its images may be on the hosts that will train
        check_method_sets(recipe.config)
    with writing(path):
        write_atomically(path, to_yaml(shareable(recipe.config), recipe.origins).encode())
    say(f"wrote {path}; start it with clae train {path}, or a script of launch/")
    return 0


def settings_of(arguments: argparse.Namespace) -> Recipe:
    """The settings of SOURCE, over them those of TASK and of the command line. Raises ConfigError, DataError."""
    from clae_dist.commands.settings import resolved, set_option
    from clae_dist.downstream.source import as_overrides
    from clae_dist.recipe import find_recipe, read_recipe
    from clae_dist.training.sets import check_method_sets

    task = find_recipe(arguments.config, "TASK", "finetune/")
    own = read_recipe(task)
    arguments.shards = arguments.shards or None
    set_option(arguments, "shards", "data.shards")
    if arguments.target:
        arguments.overrides.append("data.mixture=" + json.dumps({arguments.target: 0.5}))
    shards_named = "data.shards" in own or any(text.startswith("data.shards=") for text in arguments.overrides)
    of_source = _of_source(arguments, shards_named=shards_named)
    settings = {key: value for key, value in of_source.items() if key not in own or key == "name"}
    settings["name"] += task.stem
    of_set = _of_set(arguments, settings)
    recipe = resolved(arguments, as_overrides(settings | of_set))
    if of_set:  # its images are here: what its training would refuse is not written either
        check_method_sets(recipe.config)
    return recipe


def _of_source(arguments: argparse.Namespace, *, shards_named: bool) -> dict[str, Any]:
    """The settings that SOURCE decides. Raises ConfigError, also if images of an untrusted run would run a command."""
    from clae_dist.commands.settings import permission
    from clae_dist.downstream import source
    from clae_dist.keys import flatten
    from clae_dist.runs.copies import fetch
    from clae_dist.runs.folder import RunFolder
    from clae_dist.runs.trust import open_run

    text = arguments.source
    path = Path(os.path.abspath(user_path(text)))
    if text.startswith("timm/") and not path.exists():
        return source.of_timm(text)
    fetch(path)
    if os.path.lexists(RunFolder(path).config_file):
        config = open_run(path, permission(arguments)).to_read_images("named" if shards_named else "")
        return source.of_run(config, flatten(config), path)
    try:
        return source.of_export(read_object(path / "config.json"), path)
    except (ReadError, OSError) as error:
        raise ConfigError(
            f"SOURCE is {url_of(path) or text!r}, which is no run (config.yaml), no exported encoder (config.json: {error}) "
            "and no timm/NAME; name one of them."
        ) from None


def _of_set(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Classes, images and images a class of the training set, where the task asks for them and the command line names none."""
    from clae_dist.commands.settings import resolved
    from clae_dist.downstream.source import as_overrides
    from clae_dist.methods import TASKS
    from clae_dist.training.sets import as_training_set, training_set

    recipe = resolved(arguments, as_overrides(settings))
    method = recipe.config.method
    if method.name not in TASKS and not method.num_classes:
        raise ConfigError(
            f"method.name is {method.name!r}, which is no task; name one, such as finetune/classify, or use clae train."
        )
    if arguments.target and not method.pairs_sets:
        raise ConfigError(
            f"--target is {arguments.target!r}, but method.name is {method.name!r}, which has no target; use finetune/domain, "
            "or omit --target."
        )
    asked = [key for key in ("classes", "images", "class_counts") if recipe.origins.get(f"method.{key}") == "default"]
    if not getattr(method, "balanced", False) and "class_counts" in asked:
        asked.remove("class_counts")
    if not asked:
        return {}
    train = training_set(recipe.config)
    if train is None:
        names = " and ".join(f"method.{key}" for key in asked)
        raise ConfigError(
            f"{names} cannot be taken from plain or remote shards before they are indexed; name the "
            "value, or write a manifest with `python -m data_prep index`."
        )
    known = as_training_set(recipe.config, train)
    if "classes" in asked and len(known.classes) < 2:
        raise DataError(
            f"{known.where} has {count_of(len(known.classes), 'class', 'classes')}; a head needs two or more: prepare one "
            "folder a class."
        )
    found = {"classes": len(known.classes), "images": known.images, "class_counts": list(known.class_counts)}
    return {f"method.{key}": found[key] for key in asked}
