"""`clae search`."""

from __future__ import annotations

import argparse
import json

from clae_dist.commands.arguments import add_trust
from clae_dist.errors import OK, ConfigError
from clae_dist.options import Parser, run_path, user_path

SUMMARY = "find the embedded images that are nearest to an image, and show them on a page"
_EPILOG = """\
examples:
  clae embed RUN /data/plants --to plants.parquet
  clae search plants.parquet leaf.jpg --encoder RUN --images /data/plants --to found.html
"""


def add_arguments(parser: Parser) -> None:
    parser.epilog = _EPILOG + "\n" + (parser.epilog or "")
    parser.add_argument("index", metavar="INDEX", type=user_path, help="a .npy or .parquet file of `clae embed`")
    parser.add_argument("queries", metavar="IMAGE", type=user_path, nargs="+", help="image files")
    parser.add_argument(
        "--encoder", required=True, metavar="RUN_OR_EXPORT", type=run_path, help="the encoder that embedded INDEX"
    )
    parser.add_argument("-k", type=int, default=10, metavar="K", help="images for each query (default: 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: {IMAGE: [{id, cosine}, …]}")
    parser.add_argument("--to", type=user_path, metavar="FILE.html", help="write a page")
    parser.add_argument("--images", metavar="IMAGES_OR_SHARDS", help="the images of INDEX, for pictures on the page")
    parser.add_argument("--split", default="train", help="the split of --images, if they are shards (default: train)")
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.k < 1:
        raise ConfigError(f"-k is {arguments.k}; use at least 1.")
    if arguments.images and not arguments.to:
        raise ConfigError("--images is for the page; add --to FILE.html.")
    from clae_dist.deploy.encoder import load_encoder
    from clae_dist.deploy.search import page, search
    from clae_dist.deploy.window import read_window
    from clae_dist.escape import in_json, say
    from clae_dist.files import check_writable, write_atomically

    if arguments.to:
        check_writable(arguments.to.absolute().parent)
    index = read_window(arguments.index)
    hits = search(index, load_encoder(arguments.encoder, trust=arguments.trust), arguments.queries, arguments.k)
    if arguments.to:
        write_atomically(arguments.to, page(index, arguments.queries, hits, arguments.images, arguments.split).encode())
    if arguments.json:
        found = {str(path): [vars(hit) for hit in row] for path, row in zip(arguments.queries, hits, strict=True)}
        print(in_json(json.dumps(found, indent=1)))
        return OK
    for path, row in zip(arguments.queries, hits, strict=True):
        say(f"{path}:")
        for hit in row:
            say(f"  {hit.cosine:.4f}  {hit.id}")
    return OK
