"""`clae monitor`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from clae_dist.errors import BAD_DATA, OK, ConfigError
from clae_dist.options import Parser, user_path

if TYPE_CHECKING:
    from clae_dist.tracking.mlflow_registry import Registry

ALARM = BAD_DATA  # 3, for schedulers: the data is not what it was

SUMMARY = "compare embeddings of new images with a reference, and raise an alarm when two windows in a row differ"
DESCRIPTION = """\
REFERENCE and every NEW are files that `clae embed` wrote with the same encoder: a reference of at least 500 rows (better
2,000), and windows in the order of time, of at least 50 rows each (better 300).

Tests of a window: MMD with permutations; a classifier between window and reference; Kolmogorov-Smirnov along 32 principal
components; distances to the nearest neighbours; brightness, contrast and sharpness. A window is suspect when the p-value of MMD
or of the classifier is below --alpha and its effect is larger than any of windows drawn from the reference itself. Two suspect
windows in a row are an alarm: exit code 3, otherwise 0. A single window raises none. --roll-back-on-alarm also moves the alias
`champion` back.

Rows must be independent: frames of one video are not, and p-values of them are too small.
"""
_EPILOG = """\
examples:
  clae embed RUN /data/reference --to reference.parquet; clae embed RUN /data/monday --to monday.parquet
  clae monitor reference.parquet monday.parquet tuesday.parquet --to drift.html --images /data/tuesday
"""


def add_arguments(parser: Parser) -> None:
    parser.epilog = _EPILOG + "\n" + (parser.epilog or "")
    parser.add_argument("reference", metavar="REFERENCE", type=user_path, help="a .npy or .parquet file of `clae embed`")
    parser.add_argument("windows", metavar="NEW", type=user_path, nargs="+", help="such files of new images, oldest first")
    parser.add_argument("--alpha", type=float, default=0.01, metavar="P", help="p-value of a difference (default: 0.01)")
    parser.add_argument("--permutations", type=int, default=500, metavar="N", help="of the MMD test (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of permutations and halves (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--to", type=user_path, metavar="FILE.html", help="write a page with the images that moved most")
    parser.add_argument(
        "--roll-back-on-alarm",
        metavar="MODEL",
        help="on an alarm, do as `clae rollback MODEL --uri URI`",
    )
    parser.add_argument("--uri", metavar="URI", help="MLflow, of --roll-back-on-alarm (default: $MLFLOW_TRACKING_URI)")
    parser.add_argument("--images", metavar="IMAGES_OR_SHARDS", help="the images of the last window, for the page")
    parser.add_argument("--split", default="train", help="the split of --images, if they are shards (default: train)")


def run(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.alpha < 1:
        raise ConfigError(f"--alpha is {arguments.alpha:g}; use a number between 0 and 1.")
    if arguments.permutations * arguments.alpha < 1 or arguments.permutations > 100_000:
        raise ConfigError(
            f"--permutations is {arguments.permutations}; use at least {1 / arguments.alpha:.0f}, for --alpha, and at most "
            "100000."
        )
    if arguments.images and not arguments.to:
        raise ConfigError("--images is for the page; add --to FILE.html.")
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise ConfigError("clae monitor needs scipy, which comes with scikit-learn; pip install 'scikit-learn>=1.4'.") from None
    from clae_dist.deploy.promotion import roll_back
    from clae_dist.deploy.thumbnails import open_images
    from clae_dist.deploy.window import read_window
    from clae_dist.escape import in_json, say
    from clae_dist.files import check_writable, write_atomically
    from clae_dist.monitoring.monitor import Limits, Monitor, alarms, check_different, check_windows
    from clae_dist.monitoring.page import as_object, page
    from clae_dist.tracking.mlflow_registry import RegistryError

    registry = _registry(arguments) if arguments.roll_back_on_alarm else None  # before hours of work
    limits = Limits(arguments.alpha, arguments.permutations, arguments.seed)
    monitor = Monitor(read_window(arguments.reference), limits)
    windows = [read_window(path) for path in arguments.windows]
    check_different(monitor.reference, windows)
    if arguments.to:
        check_writable(arguments.to.absolute().parent)
    if arguments.images:
        open_images(arguments.images, arguments.split, windows[-1])
    verdicts = list(check_windows(monitor, windows, (lambda _: None) if arguments.json else say))
    raised = alarms(verdicts, limits.alpha)
    if arguments.to:
        html = page(monitor, verdicts, windows[-1], raised, arguments.images, arguments.split)
        write_atomically(arguments.to, html.encode())
    if arguments.json:
        print(in_json(json.dumps(as_object(monitor, verdicts, raised), indent=1)))
    else:
        say(f"alarm: {'; '.join(raised)}" if raised else "no alarm")
    if raised and registry is not None:
        try:
            roll_back(registry, f"drift: {raised[-1]}", lambda text: print(text, file=sys.stderr))
        except RegistryError as error:
            say(f"clae: {error}", file=sys.stderr)  # the exit code is the alarm's
    return ALARM if raised else OK


def _registry(arguments: argparse.Namespace) -> Registry:
    from clae_dist.tracking.mlflow_registry import Registry

    uri = arguments.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ConfigError("--roll-back-on-alarm needs --uri, the address of MLflow, such as http://host:5000.")
    return Registry(uri, arguments.roll_back_on_alarm)
