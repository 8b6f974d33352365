"""The commands of `python -m data_prep`, their options and help texts."""

from __future__ import annotations

import argparse

from clae_dist.cores import usable_cores
from clae_dist.options import Parser, user_path

_QUALITY = 90
_EXIT_CODES = """\
exit codes: 0 done; 1 verify found differences; 2 wrong usage or bad input; 3 audit --fail-on found leakage;
5 storage is full, read-only or broken; 130 interrupted"""

_ALL = """\
Images in, WebDataset shards and a manifest out.

  python -m data_prep prepare photos/ shards/photos        # a folder, an archive, ImageNet, CIFAR, Parquet → shards
  python -m data_prep index shards/x-{000..099}.tar        # WebDataset shards that exist get a manifest
  python -m data_prep verify shards/photos                 # is everything as the manifest says?
  python -m data_prep info shards/photos                   # which images, how many, of which classes
  python -m data_prep audit shards/photos shards/eval      # copies within and between sets, odd images, labels
  python -m data_prep quarantine shards/photos --list runs/x/suspects.jsonl --to shards/clean
  python -m data_prep demo shards/demo                     # the images of the quickstart

Training reads DST/manifest.json; name the folder in data.shards. `COMMAND --help` tells the options.
"""

_PREPARE = """\
Writes the images of SRC as WebDataset shards with a manifest into DST. What SRC is, its content tells:

  a folder        one folder of images a class (CLASS/…/image.jpg), or train/ and test/ (or val/, dev/, eval/, Testing/,
                  seg_test/ beside seg_train/, …) that hold class folders, or images without any folders (no labels)
  archives        of such a folder: .zip, .tar, .tar.gz, .tar.bz2, .tar.xz; several that share no file make one set
  ImageNet        ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz for its labels (without:
                  no labels), or all three, or the folder that holds them; val becomes the split test
  CIFAR           cifar-10-binary.tar.gz or cifar-100-binary.tar.gz (fine labels): raw pixels become PNGs
  Parquet         files as on the Hugging Face hub, or their folder: a column of image bytes, one of labels, if any; names
                  such as train-00000-of-00002.parquet give the splits

Nothing is unpacked into small files; a compressed tar alone is decompressed beside DST meanwhile. Without splits of its own
a test split is drawn, the same share of every class. A label is a position in the sorted list of the classes (Parquet: in the
list that the file holds). The files' bytes are kept as they are, unless --resize asks for something else; the manifest says
what was done. Every image is decoded once to check it; those that fail (cut short, empty, no image, too many pixels, …) are
listed with the reason in DST/quarantine.jsonl.

An interrupted run resumes when the same command is run again. The same input and settings give the same bytes.
"""

_INDEX = """\
Writes a manifest and indices for WebDataset shards that exist; the shards stay as they are.

SHARDS are tars of this machine, folders of them, or lists such as x-{000..099}.tar. A sample is KEY.jpg (png, webp, …) with its
label, an integer or a name, in KEY.cls or as "label" in KEY.json; without one it has no label. The files of a sample follow
one another. The classes are the labels that there are. Shards named train, val (dev) or test (eval) are of that split, others
of train. Every image is decoded once to check it; those that fail are skipped and listed with the reason in quarantine.jsonl.
An interrupted run resumes when the same command is run again.
"""

_AUDIT = """\
Decodes every image of the prepared SETs once and prints on a page what a user should know before trusting a figure:

  leakage   images of one split or set that are in another: the same file, the same pixels, or nearly (perceptual hash)
  copies    the same within a split
  labels    one picture under two classes of a set
  sizes, modes, classes: tiny, extreme and one-coloured images; grey, CMYK, 16 bits, transparency; imbalance, empty classes

Near copies are those whose 64-bit hashes differ in at most --near-bits, also when mirrored. Measured on photos of 300 to 500
pixels, 6 bits find 98 % and more of the copies that were re-encoded, resized, squeezed or cut by 2 % of their sides, and 63 %
of those cut by 5 %; larger cuts are mostly missed. Unlike images that look alike when shrunk (a plane in a blue sky) can be
within 6 bits: --report shows the pairs. It writes audit.html (one file, pictures inside), audit.json (the figures) and
images.jsonl (a line for every image with a copy, a conflict or broken bytes, with its shard and row).

With --poison, also patches that recur in more than 20 images of different pictures: a logo, or the trigger of a poisoning.
With an encoder that was trained on such images, a patch is called poison when it moves a fifth of 256 other images into one
cluster, and twice as many as other patches of its size; otherwise it is only recurring. patches.jsonl lists the images.
Patches below 6 pixels of 32 to 64, faint ones and those that are stretched or turned in each image are missed.

Nothing is written into the SETs. Memory: about 0.4 kB an image. For a million images the search takes about 20 s of one core
after decoding them.
"""

_QUARANTINE = """\
Writes a copy of SET into DIR without the images that lists call bad; SET stays as it is. Lists are suspects.jsonl (labels that
`clae finetune … finetune/noisy` doubted) and patches.jsonl (images with a patch that `audit --poison` found, of which those
with the verdict poison are bad). Their lines name the images by digest, shard and row: lines can be removed, and those about
other sets are skipped.

Shards keep their names and order, images their files and bytes. DIR/quarantine.jsonl lists the dropped images with the
reason; the manifest has the digests of SET and of the lists. With --unlabel suspects stay and lose their label: KEY.cls
becomes -1; a label in KEY.json stays in the file, unread. Accuracies skip them, pretraining uses them.

An interrupted run resumes when the same command is run again.
"""

_DEMO = """\
Prepares the images of the quickstart and says which they are: PATH or $CLAE_DATA when given (anything that `prepare` takes;
NAME-train.tar.gz with NAME-test.tar.gz beside it are one set); else CIFAR-10 from ../shared/data, found beside
this checkout; else CIFAR-10 downloaded through torchvision; else, without a network, scikit-learn's embedded digits.
Downloads go to ${CLAE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/clae-dist}.
"""


def _bytes(text: str) -> int:
    units = {"K": 1e3, "M": 1e6, "G": 1e9}
    unit = units.get(text[-1:].upper(), 1)
    return _count(text[:-1] if unit != 1 else text, unit)


def _share(text: str) -> float:
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def _number(text: str) -> int:
    return 0 if text == "0" else _count(text, 1)


def _resize(text: str) -> int:
    side, _, pixels = text.partition("=")
    if side != "short":
        raise ValueError(text)
    return _count(pixels, 1)


def _count(text: str, unit: float) -> int:
    value = float(text) * unit
    if not 1 <= value < 2**62:  # nan and inf are neither
        raise ValueError(text)
    return int(value)


def _workers(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


for _kind, _name in (
    (_bytes, "size (such as 500M)"),
    (_share, "share (such as 1%)"),
    (_number, "number"),
    (_resize, "size (such as short=256)"),
    (_workers, "number"),
):
    _kind.__name__ = _name  # what argparse calls it in "invalid … value"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command and its options. Ends the process with exit code 2 for what it does not understand."""
    args, rest = _parser().parse_known_args(arguments)
    if rest:
        args.parser.refuse(rest)
    if args.command == "prepare" and args.resize and args.quality is None:
        args.quality = _QUALITY
    return args


def _parser() -> Parser:
    parser = Parser("python -m data_prep", description=_ALL, epilog=_EXIT_CODES)
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cores = usable_cores()

    def command(name: str, help: str, description: str) -> Parser:
        return commands.add_parser(name, help=help, description=description, epilog=_EXIT_CODES, parents=[common])

    prepare = command("prepare", "a folder, archives, ImageNet, CIFAR or Parquet → shards", _PREPARE)
    prepare.add_argument(
        "sources", metavar="SRC", type=user_path, nargs="+", help="folder, archives of one set, or Parquet files"
    )
    prepare.add_argument(
        "destination", metavar="DST", type=user_path, help="folder for the shards; new, or of the same command before"
    )
    _add_what_is_said(prepare)
    _add_what_is_done(prepare)
    index = command("index", "WebDataset shards that exist → a manifest for them", _INDEX)
    index.add_argument("shards", metavar="SHARDS", nargs="+", help="tars, folders of them, or lists with braces")
    index.add_argument(
        "--to", metavar="DIR", type=user_path, help="where manifest, indices and links to the shards go (default: beside them)"
    )
    index.add_argument(
        "--classes", metavar="FILE", type=user_path, help="names of the labels from 0 on, a line each (default: the labels)"
    )
    _add_origin(index, "the folder's name")
    _add_max_pixels(index)
    check = command(
        "verify", "compare shards with their manifest", "Reads every shard of DST and names all that differs from the manifest."
    )
    check.add_argument("destination", metavar="DST", type=user_path, help="folder that prepare or demo wrote")
    about = command("info", "what the manifest says", "Prints the manifest of DST: images by split, classes, origin, digest.")
    about.add_argument("destination", metavar="DST", type=user_path, help="folder that prepare or demo wrote")
    about.add_argument("--json", action="store_true", help="as JSON, for scripts")
    audit = command("audit", "copies within and between sets, odd images, labels", _AUDIT)
    _add_audit(audit)
    quarantine = command("quarantine", "a set without the images that lists call bad", _QUARANTINE)
    _add_quarantine(quarantine)
    demo = command("demo", "the images of the quickstart → shards", _DEMO)
    demo.add_argument("destination", metavar="DST", type=user_path, help="folder for the shards")
    demo.add_argument("--data", metavar="PATH", type=user_path, default=None, help="your own images")
    for preparing in (prepare, index, demo):
        preparing.add_argument(
            "--max-bad", type=_share, default=0.01, metavar="X", help="stop above this share of bad images (default 1%%)"
        )
    for parallel in (prepare, index, demo, audit, quarantine):
        parallel.add_argument(
            "--workers", type=_workers, default=cores, metavar="N", help=f"processes; 0: none beside this one (default {cores})"
        )
    return parser


def _add_audit(audit: argparse.ArgumentParser) -> None:
    audit.add_argument("sets", metavar="SET", type=user_path, nargs="+", help="folder that prepare, index or demo wrote")
    audit.add_argument("--near-bits", type=int, default=6, metavar="N", help="distance of near copies, 0 to 12 (default 6)")
    audit.add_argument(
        "--report", type=user_path, default=None, metavar="DIR", help="write a page with pictures, JSON and a list"
    )
    audit.add_argument(
        "--limit-pictures",
        type=_workers,
        default=8,
        metavar="N",
        help="pairs shown of a kind for two splits, and odd images of a kind (default 8)",
    )
    audit.add_argument(
        "--fail-on",
        choices=("pixels", "near"),
        help="exit 3 when an image of one split or set is in another: same pixels, near",
    )
    audit.add_argument("--poison", action="store_true", help="search for patches that recur in images of different pictures")
    audit.add_argument(
        "--encoder",
        type=user_path,
        metavar="RUN",
        help="a run or an export; with --poison: paste each patch on other images, and see where this encoder then puts them",
    )


def _add_quarantine(quarantine: argparse.ArgumentParser) -> None:
    add = quarantine.add_argument
    add("set", metavar="SET", type=user_path, help="folder that prepare, index, demo or quarantine wrote")
    add("--list", dest="lists", metavar="FILE", type=user_path, nargs="+", required=True, help="suspects.jsonl, patches.jsonl")
    add("--to", metavar="DIR", type=user_path, required=True, help="folder for the new set")
    add(
        "--below",
        type=_share,
        default=1.0,
        metavar="P",
        help="suspects whose label is believed with less than this probability (default: all that are listed)",
    )
    add("--unlabel", action="store_true", help="keep suspects without their label, for pretraining, instead of dropping them")
    add("--recurring", action="store_true", help="drop images with a patch that is only recurring, too")
    add(
        "--max-bad",
        type=_share,
        default=0.2,
        metavar="X",
        help="refuse lists that name more than this share of a split (default 20%%)",
    )


def _add_origin(preparing: argparse.ArgumentParser, default: str) -> None:
    add = preparing.add_argument
    add("--name", default="", help=f"of the set, in the manifest (default: {default})")
    add("--licence", default="not stated", metavar="TEXT", help="of the images, in the manifest")
    add("--source", dest="origin", default="", metavar="TEXT", help=f"where they are from (default: {default})")


def _add_max_pixels(preparing: argparse.ArgumentParser) -> None:
    preparing.add_argument(
        "--max-pixels", type=_number, default=100_000_000, metavar="N", help="larger images are bad (default 100e6)"
    )


def _add_what_is_said(prepare: argparse.ArgumentParser) -> None:
    """Options that describe the set."""
    _add_origin(prepare, "SRC's name")
    prepare.add_argument(
        "--image-column", default="", metavar="NAME", help="Parquet: of the image bytes (default: image, img, the only one)"
    )
    prepare.add_argument(
        "--label-column", default="", metavar="NAME", help="Parquet: of the labels (default: label, the only ClassLabel)"
    )


def _add_what_is_done(prepare: argparse.ArgumentParser) -> None:
    """Options that change the shards."""
    add = prepare.add_argument
    add("--test-share", type=_share, default=0.1, metavar="X", help="drawn for the test split (default 0.1; 0: none)")
    add("--seed", type=int, default=0, help="of the order and of the drawn split (default 0)")
    add("--shard-samples", type=_number, default=5000, metavar="N", help="images a shard at most (default 5000)")
    add(
        "--shard-bytes",
        type=_bytes,
        default=500_000_000,
        metavar="N",
        help="size of a shard at most, before --resize (default 500M)",
    )
    _add_max_pixels(prepare)
    add("--min-side", type=_number, default=0, metavar="N", help="images with a side of fewer pixels are bad (default 0: none)")
    add(
        "--resize",
        type=_resize,
        default=0,
        metavar="short=N",
        help="make the shorter side N pixels where it is longer, and every image a JPEG: upright, RGB, without metadata "
        "(default: the files' bytes)",
    )
    add("--quality", type=_number, default=None, metavar="Q", help=f"of those JPEGs, 1 to 95 (default {_QUALITY})")
