"""`clae config`."""

from __future__ import annotations

import argparse

from clae_dist.commands.arguments import add_config
from clae_dist.commands.settings import resolved
from clae_dist.errors import ConfigError
from clae_dist.options import Parser

SUMMARY = "print the resolved settings and the origin of each, or explain settings"


def add_arguments(parser: Parser) -> None:
    add_config(parser, optional=True)
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="print meaning, values, default and use of a setting, of a section or an evaluation protocol, or of all settings",
    )
    parser.add_argument("--markdown", action="store_true", help="with --explain: the table of configs/README.md")


def run(arguments: argparse.Namespace) -> int:
    if arguments.markdown or arguments.explain is not None:
        return _explain(arguments)
    if not arguments.config:
        raise ConfigError("CONFIG is missing; name a recipe, or use --explain for the meaning of settings.")
    from clae_dist.config.sharing import shareable
    from clae_dist.recipe import to_yaml

    config, origins = resolved(arguments)
    print(to_yaml(shareable(config), origins), end="")
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from clae_dist.explain import explain, markdown_table

    if arguments.config:
        raise ConfigError("--explain explains settings of any recipe; omit CONFIG, or omit --explain to print its settings.")
    if arguments.markdown and arguments.explain != "":
        raise ConfigError("--markdown prints the table of all settings; write --explain --markdown.")
    if arguments.markdown:
        print(markdown_table(), end="")
        return 0
    try:
        text = explain(arguments.explain)
    except ConfigError:
        from clae_dist.evaluation.suite import setting_keys  # which takes seconds to import

        text = explain(arguments.explain, setting_keys())
    print(text)
    return 0
