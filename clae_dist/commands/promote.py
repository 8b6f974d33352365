"""`clae promote`."""

from __future__ import annotations

import argparse
import os

from clae_dist.commands.arguments import add_run, add_trust
from clae_dist.commands.settings import permission
from clae_dist.errors import OK, UNEXPECTED
from clae_dist.options import Parser, user_path

SUMMARY = "make a run's export the champion of a model in MLflow's registry, if it passes a gate"
DESCRIPTION = """\
Compares RUN/evaluation.json with the rules of the gate and with the champion. If all hold, RUN/export becomes a version of
MODEL, which gets the alias `champion`; the old champion gets `previous`. A kill at any point leaves a champion, and the same
command continues. Services find the files by the alias: `mlflow models serve --model-uri models:/MODEL@champion`. ONNX graphs
in the export must be of its encoder.

gate.yaml, with metrics as PROTOCOL/METRIC of evaluation.json; latency_ms, of one image on one thread here; onnx_difference, of
encoder.onnx from torch; and int8/knn_agreement, int8/knn, int8/linear, int8/cosine of onnx-int8.json:
  metrics:
    linear/accuracy: {at_least: 60, falls_by_at_most: 0.5}
    calibration/ece: {at_most: 5, rises_by_at_most: 1}
    latency_ms: {at_most: 20}
    onnx_difference: {at_most: 1e-4}
falls_by_at_most and rises_by_at_most are beside the champion, on the same images with the same settings; without a champion,
they hold. When a rule is broken, nothing is changed and the exit code is 1.
"""


def add_arguments(parser: Parser) -> None:
    add_run(parser)
    parser.add_argument("--name", required=True, metavar="MODEL", help="the model in the registry, made if there is none")
    parser.add_argument("--gate", required=True, type=user_path, metavar="FILE", help="gate.yaml")
    parser.add_argument("--uri", metavar="URI", help="MLflow (default: $MLFLOW_TRACKING_URI, else where the run was tracked)")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.deploy.gate import read_gate
    from clae_dist.deploy.promotion import promote
    from clae_dist.escape import say
    from clae_dist.runs.folder import RunFolder
    from clae_dist.runs.trust import check_folder
    from clae_dist.tracking.mlflow import store_uri
    from clae_dist.tracking.mlflow_registry import Registry

    gate = read_gate(arguments.gate)
    check_folder(arguments.run, permission(arguments))
    config = RunFolder(arguments.run).read_config()
    uri = arguments.uri or os.environ.get("MLFLOW_TRACKING_URI") or store_uri(config, arguments.run)
    broken = promote(arguments.run, config, gate, Registry(uri, arguments.name), say)
    for line in broken:
        say(f"not promoted: {line}")
    return UNEXPECTED if broken else OK
