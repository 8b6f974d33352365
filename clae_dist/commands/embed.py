"""`clae embed`."""

from __future__ import annotations

import argparse
from pathlib import Path

from clae_dist.commands.arguments import add_trust
from clae_dist.options import Parser, run_path, user_path

SUMMARY = "write the features of images, by a run's encoder or an exported one, to a .npy or .parquet file"
DESCRIPTION = """\
Writes one row per image that can be decoded, in the order of the images: positions in the split of a set of shards, paths in a
folder of images. Rows have the features that evaluation uses, before the projector.

  FILE.npy       float32 (images, features), and FILE.ids.json: {"ids": […], "labels": […], "encoder": …, "brightness": […], …}
  FILE.parquet   columns id, label (a class name or null), embedding, brightness, contrast and sharpness; takes pyarrow

The files appear complete at the end; an existing FILE is replaced then.
"""


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
    from clae_dist.data.images import open_dataset
    from clae_dist.deploy.embedding_file import check_target, write_embeddings
    from clae_dist.deploy.encoder import load_encoder
    from clae_dist.devices import local_device
    from clae_dist.escape import say

    target: Path = arguments.to
    check_target(target)
    device = local_device(arguments.device)
    encoder = load_encoder(arguments.encoder, route=arguments.route, trust=arguments.trust).to(device)
    images = open_dataset(arguments.images, arguments.split, say=say)
    num_rows = write_embeddings(images, encoder, target, arguments.batch_size, arguments.workers)
    say(f"wrote {target}: {num_rows:,} rows of {encoder.num_features:,} features")
    return 0
