"""`clae evaluate`."""

from __future__ import annotations

import argparse
import sys

from clae_dist.commands.arguments import add_launcher, add_shards, add_trust
from clae_dist.commands.settings import permission
from clae_dist.errors import ConfigError
from clae_dist.options import Parser, run_or_name
from clae_dist.redact import redact_text

SUMMARY = "evaluate an encoder: kNN, linear probe, robust accuracy and more, before and after pretraining"

PROTOCOLS = (  # evaluation/suite.py, which takes seconds to import
    "knn linear robust linear_sgd semi finetune corruptions adapt calibration ood transfer retrieval learnability geometry"
)
_EPILOG = f"""protocols: {PROTOCOLS.replace(" ", ", ")}
`clae config --explain PROTOCOL` lists the settings of one; clae_dist/evaluation/README.md says how to read the results

examples:
  clae evaluate runs/first
  clae evaluate runs/first --suite knn,linear,robust robust.images=500 --workers 2
  clae evaluate runs/unlabelled --shards labelled-shards        pretrained without labels, evaluated with
  clae evaluate timm/resnet18.a1_in1k --shards shards --to results
"""


def add_arguments(parser: Parser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument(
        "subject",
        metavar="SUBJECT",
        type=run_or_name,
        help="the folder of a run or of an export, or published weights: timm/NAME, torchvision/NAME",
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings of protocols, evaluation.* and data.image_size"
    )
    parser.add_argument("--suite", default="knn,linear", metavar="NAMES", help="protocols, such as knn,linear,robust, or all")
    add_shards(parser)
    parser.add_argument("--to", default="", metavar="FOLDER", help="folder for the results (default: the run or the export)")
    parser.add_argument("--workers", type=int, default=0, metavar="W", help="ranks (default: one a GPU)")
    parser.add_argument("--threads", type=int, default=0, metavar="T", help="threads of a rank (default: a share of cores)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the ranks")
    parser.add_argument("--fresh", action="store_true", help="compute everything again instead of continuing")
    add_launcher(parser, "local", "torchrun", "ray")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    for name, default in (("workers", "one a GPU"), ("threads", "a share of the cores")):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name} is {getattr(arguments, name)}; use 1 or more, or 0 for {default}.")
    from clae_dist.launchers.evaluate import evaluate_on
    from clae_dist.training.finish import Request

    request = Request(
        arguments.subject,
        arguments.shards,
        arguments.to,
        tuple(arguments.overrides),
        permission(arguments),
        arguments.suite,
        arguments.fresh,
        arguments.device,
        arguments.threads,
    )
    ending = evaluate_on(request, arguments.launcher or "local", arguments.workers)
    if ending.message:
        print(redact_text(ending.message), file=sys.stderr)
    return ending.code
