"""`clae rollback`."""

from __future__ import annotations

import argparse
import os

from clae_dist.errors import OK, ConfigError
from clae_dist.options import Parser

SUMMARY = "give the alias `champion` of a model back to the version before the last promotion"
DESCRIPTION = """\
Gives `champion` to the version that `previous` names. The version that loses it gets the tag clae.rolled_back with the time and
the reason. Nothing happens if `previous` is the champion already.
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="MODEL", help="the model in MLflow's registry")
    parser.add_argument("--reason", default="", metavar="TEXT", help="for the tag of the version that loses the alias")
    parser.add_argument("--uri", metavar="URI", help="MLflow (default: $MLFLOW_TRACKING_URI)")


def run(arguments: argparse.Namespace) -> int:
    uri = arguments.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ConfigError("--uri is missing: the address of MLflow, such as http://host:5000; or set MLFLOW_TRACKING_URI.")
    from clae_dist.deploy.promotion import roll_back
    from clae_dist.escape import say
    from clae_dist.tracking.mlflow_registry import Registry

    roll_back(Registry(uri, arguments.name), arguments.reason, say)
    return OK
