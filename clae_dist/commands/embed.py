"""`clae embed`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clae_dist.commands.arguments import add_trust
from clae_dist.errors import ClaeError
from clae_dist.options import Parser, run_path, user_path

if TYPE_CHECKING:
    from clae_dist.world import World

SUMMARY = "write the features of images, by a run's encoder or an exported one, to a .npy or .parquet file"
DESCRIPTION = """\
Writes one row per image that can be decoded, in the order of the images: positions in the split of a set of shards, paths in a
folder of images. Rows have the features that evaluation uses, before the projector.

  FILE.npy       float32 (images, features), and FILE.ids.json: {"ids": […], "labels": […], "encoder": …, "brightness": […], …}
  FILE.parquet   columns id, label (a class name or null), embedding, brightness, contrast and sharpness; takes pyarrow

The files appear complete at the end; an existing FILE is replaced then. After an interruption, the same command continues from
the parts in .FILE.parts-…, and the result has the same bytes. Meanwhile, a second command for FILE is refused. Ranks of
torchrun share the images:
`torchrun --nproc-per-node=4 -m clae_dist embed RUN_OR_EXPORT IMAGES --to FILE`; all see the same files.
"""
_TIMEOUT_S = 7 * 86_400.0  # the first rank to finish waits for the last; a lost rank ends them through torchrun


def add_arguments(parser: Parser) -> None:
    parser.add_argument("encoder", metavar="RUN_OR_EXPORT", type=run_path, help="the folder of a run, or of an export")
    parser.add_argument("images", metavar="IMAGES_OR_SHARDS", help="a folder of images, or shards as data.shards names them")
    parser.add_argument("--to", type=user_path, required=True, metavar="FILE", help="FILE.npy or FILE.parquet")
    parser.add_argument("--split", default="train", help="the split of a set of shards (default: train)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="B", help="images a batch (default: 256)")
    parser.add_argument("--workers", type=int, default=-1, metavar="N", help="processes that decode; 0: none; default: chosen")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    parser.add_argument(
        "--route", choices=("clean", "adversarial"), help="the norm layers of a run (default: those of its evaluation)"
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.escape import shown
    from clae_dist.launchers.rank import Ending
    from clae_dist.launchers.torchrun import num_ranks, say_once
    from clae_dist.redact import redact_text
    from clae_dist.world import connect

    try:
        with connect(_TIMEOUT_S, arguments.device) as world:
            _embed(arguments, world)
    except ClaeError as error:
        if not num_ranks() or not error.on_all_ranks:
            raise
        ending = say_once(Ending(error.exit_code, shown(f"clae: {error}")))
        if ending.message:
            print(redact_text(ending.message), file=sys.stderr)
        return ending.code
    return 0


def _embed(arguments: argparse.Namespace, world: World) -> None:
    from clae_dist.data.images import open_dataset
    from clae_dist.deploy.embedding_file import check_target, write_embeddings
    from clae_dist.deploy.encoder import load_encoder
    from clae_dist.escape import say

    target: Path = arguments.to
    world.run_on_main(lambda: check_target(target))
    encoder = load_encoder(arguments.encoder, route=arguments.route, trust=arguments.trust).to(world.device)
    images = world.run_on_main(lambda: open_dataset(arguments.images, arguments.split, say=say))
    num_rows = write_embeddings(images, encoder, target, arguments.batch_size, arguments.workers, world=world)
    if world.is_main:
        say(f"wrote {target}: {num_rows:,} rows of {encoder.num_features:,} features")
