"""Arguments that several commands share."""

from __future__ import annotations

import argparse

from clae_dist.options import Parser, run_path, user_path

_CONFIG = "a recipe: a YAML file, or the name of one in the package, such as quickstart or cifar10/clae"
_OVERRIDES = (
    "settings that take precedence over the recipe's, such as batch.global_size=512 data.image_size=64; "
    "`clae config --explain` lists all"
)
_TRUST = (
    "act on settings of the run's config.yaml (pipe: commands, servers, databases, links that lead out of its folder), "
    "although no `clae train` of yours on this machine used it"
)


def _recipe(text: str) -> str:
    return text if "=" in text else str(user_path(text))  # a setting, where the recipe is optional and was omitted


def _shards(text: str) -> str:
    from clae_dist.home import expand_home

    try:
        return str(expand_home("data.shards", text, "--shards"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_config(parser: Parser, *, optional: bool = False) -> None:
    """Add CONFIG and key=value arguments."""
    help_text = f"{_CONFIG}; optional" if optional else _CONFIG
    parser.add_argument("config", metavar="CONFIG", type=_recipe, nargs="?" if optional else None, help=help_text)
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=_OVERRIDES)


def add_run(parser: Parser) -> None:
    """Add the argument RUN."""
    help_text = "the folder of a run, such as runs/clae or s3://bucket/runs/clae"
    parser.add_argument("run", metavar="RUN", type=run_path, help=help_text)


def add_shards(parser: Parser) -> None:
    """Add --shards."""
    help_text = "folder or URL of the run's images (default: as in the run's config.yaml)"
    parser.add_argument("--shards", default="", type=_shards, metavar="SHARDS", help=help_text)


def add_trust(parser: Parser) -> None:
    """Add --trust."""
    parser.add_argument("--trust", action="store_true", help=_TRUST)


def add_launcher(parser: Parser, *names: str) -> None:
    """Add --launcher."""
    parser.add_argument("--launcher", choices=names, help="the launcher of the ranks (overrides launch.launcher)")
