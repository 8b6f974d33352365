"""`python -m data_prep`: parse, call, print, exit code; nothing else. The only place here that reads environment variables."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

# Worker processes import this file, too: what takes long to import is imported in the functions.

OK, DIFFERENCES, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_EXIT_CODES = """exit codes: 0 done; 1 verify found differences; 2 wrong usage or bad input; 130 interrupted"""

_ALL = """\
Images in, WebDataset shards and a manifest out.

  python -m data_prep imagefolder photos/ shards/photos    # a folder of class folders, or a tar archive of one
  python -m data_prep index shards/x-{000..099}.tar        # WebDataset shards that exist get a manifest
  python -m data_prep verify shards/photos                 # is everything as the manifest says?
  python -m data_prep info shards/photos                   # which images, how many, of which classes
  python -m data_prep demo shards/demo                     # the images of the quickstart

Training reads DST/manifest.json; name the folder in data.shards. `COMMAND --help` tells the options.
"""

_IMAGEFOLDER = """\
Writes the images of SRC as WebDataset shards with a manifest into DST.

SRC is a folder with one folder of images a class (CLASS/…/image.jpg), or with train/ and test/ (or val/, valid/) that hold
class folders, or images without any folders (no labels), or a tar archive of one of these (.tar, .tar.gz, .tar.bz2, .tar.xz).
Without split folders a test split is drawn, the same share of every class. The label of an image is the position of its
class folder in the sorted list. The files' bytes are kept as they are; every image is decoded once to check it. Images that
fail (cut short, empty, no image, too many pixels) are listed with the reason in DST/quarantine.jsonl.

An interrupted run goes on where it was when the same command is run again. The same input and settings give the same bytes.
"""

_INDEX = """\
Writes a manifest and indices for WebDataset shards that exist; the shards stay as they are.

SHARDS are tars of this machine, folders of them, or lists such as x-{000..099}.tar. A sample is KEY.jpg (png, webp, …) with its
label, a whole number, in KEY.cls or as "label" in KEY.json; without one it has no label. Shards named train, val or test are
of that split, others of train. Every image is decoded once to check it; those that fail are left out and listed with the reason
in quarantine.jsonl. An interrupted run goes on where it was when the same command is run again.
"""

_DEMO = """\
Prepares the images of the quickstart and says which they are: PATH or $CLAE_DATA when given (a folder or an archive as for
imagefolder; NAME-train.tar.gz with NAME-test.tar.gz beside it are one set); else CIFAR-10 from ../shared/data, found beside
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


def _pixels(text: str) -> int:
    return _count(text, 1)


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
    (_pixels, "number"),
    (_workers, "number"),
):
    _kind.__name__ = _name  # what argparse calls it in "invalid … value"


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data_prep", description=_ALL, epilog=_EXIT_CODES, formatter_class=raw)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cores = len(os.sched_getaffinity(0))

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help, description=description, epilog=_EXIT_CODES, formatter_class=raw, parents=[common]
        )

    folder = command("imagefolder", "a folder of class folders, or an archive of one → shards", _IMAGEFOLDER)
    folder.add_argument("source", metavar="SRC", type=Path, help="folder or tar archive")
    folder.add_argument(
        "destination", metavar="DST", type=Path, help="folder for the shards; new, or of the same command before"
    )
    folder.add_argument("--name", default="", help="of the set, in the manifest (default: SRC's name)")
    folder.add_argument("--licence", default="not stated", metavar="TEXT", help="of the images, in the manifest")
    folder.add_argument("--source", dest="origin", default="", metavar="TEXT", help="where they are from (default: SRC's name)")
    folder.add_argument(
        "--test-share", type=_share, default=0.1, metavar="X", help="drawn for the test split (default 0.1; 0: none)"
    )
    folder.add_argument("--seed", type=int, default=0, help="of the order and of the drawn split (default 0)")
    folder.add_argument("--shard-samples", type=int, default=5000, metavar="N", help="images a shard at most (default 5000)")
    folder.add_argument(
        "--shard-bytes", type=_bytes, default=500_000_000, metavar="N", help="size of a shard at most (default 500M)"
    )
    folder.add_argument(
        "--max-pixels", type=_pixels, default=100_000_000, metavar="N", help="larger images are bad (default 100e6)"
    )
    check = command(
        "verify", "compare shards with their manifest", "Reads every shard of DST and names all that differs from the manifest."
    )
    check.add_argument("destination", metavar="DST", type=Path, help="folder that imagefolder or demo wrote")
    about = command("info", "what the manifest says", "Prints the manifest of DST: images by split, classes, origin, digest.")
    about.add_argument("destination", metavar="DST", type=Path, help="folder that imagefolder or demo wrote")
    about.add_argument("--json", action="store_true", help="as JSON, for scripts")
    listed = command("index", "WebDataset shards that exist → a manifest for them", _INDEX)
    listed.add_argument("shards", metavar="SHARDS", nargs="+", help="tars, folders of them, or lists with braces")
    listed.add_argument(
        "--to", metavar="DIR", type=Path, help="where manifest, indices and links to the shards go (default: beside them)"
    )
    listed.add_argument(
        "--classes", metavar="FILE", type=Path, help="names of the labels from 0 on, a line each (default: numbers)"
    )
    listed.add_argument("--name", default="", help="of the set, in the manifest (default: the folder's name)")
    listed.add_argument("--licence", default="not stated", metavar="TEXT", help="of the images, in the manifest")
    listed.add_argument(
        "--source", dest="origin", default="", metavar="TEXT", help="where they are from (default: the folder's name)"
    )
    listed.add_argument(
        "--max-pixels", type=_pixels, default=100_000_000, metavar="N", help="larger images are bad (default 100e6)"
    )
    demo = command("demo", "the images of the quickstart → shards", _DEMO)
    demo.add_argument("destination", metavar="DST", type=Path, help="folder for the shards")
    demo.add_argument("--data", metavar="PATH", type=Path, default=None, help="your own folder or archive")
    for preparing in (folder, listed, demo):
        preparing.add_argument(
            "--max-bad", type=_share, default=0.01, metavar="X", help="stop above this share of bad images (default 1%%)"
        )
        preparing.add_argument(
            "--workers", type=_workers, default=cores, metavar="N", help=f"processes; 0: none beside this one (default {cores})"
        )
    return parser


def _imagefolder(args: argparse.Namespace) -> int:
    from data_prep.prepare import prepare
    from data_prep.settings import Settings
    from data_prep.sources import open_source

    plain_name = args.source.resolve().name
    settings = Settings(
        name=args.name or plain_name.split(".tar")[0].removesuffix(".tgz"),
        source=args.origin or plain_name,
        licence=args.licence,
        seed=args.seed,
        test_share=args.test_share,
        shard_samples=args.shard_samples,
        shard_bytes=args.shard_bytes,
        max_pixels=args.max_pixels,
    )
    prepare(open_source(args.source), args.destination, settings, max_bad=args.max_bad, num_workers=args.workers, say=_say)
    return OK


def _index(args: argparse.Namespace) -> int:
    from data_prep.index import IndexSettings, index

    classes = tuple(args.classes.read_text(encoding="utf-8").splitlines()) if args.classes else ()
    settings = IndexSettings(args.name, args.origin, args.licence, classes, args.max_pixels)
    index(args.shards, args.to, settings, max_bad=args.max_bad, num_workers=args.workers, say=_say)
    return OK


def _verify(args: argparse.Namespace) -> int:
    from data_prep.verify import verify

    differences = verify(args.destination)
    for line in differences:
        _say(line)
    _say(
        f"{args.destination}: {len(differences)} differences."
        if differences
        else f"{args.destination} is as its manifest says."
    )
    return DIFFERENCES if differences else OK


def _info(args: argparse.Namespace) -> int:
    from clae_dist.data.manifest import load_manifest
    from data_prep.info import describe, facts

    manifest = load_manifest(args.destination)
    _say(json.dumps(facts(manifest), indent=1, ensure_ascii=False) if args.json else "\n".join(describe(manifest)))
    return OK


def _demo(args: argparse.Namespace) -> int:
    from data_prep.demo import prepare_demo

    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(os.environ.get("CLAE_CACHE") or os.path.join(home, "clae-dist"))
    named = args.data or (Path(os.environ["CLAE_DATA"]) if os.environ.get("CLAE_DATA") else None)
    prepare_demo(args.destination, named, cache, max_bad=args.max_bad, num_workers=args.workers, say=_say)
    return OK


_COMMANDS = {"imagefolder": _imagefolder, "index": _index, "verify": _verify, "info": _info, "demo": _demo}


def _say(text: str) -> None:
    print(text, flush=True)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(arguments)
    from clae_dist.data.manifest import DataError

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        print("data_prep: interrupted; run the same command again to go on where it was.", file=sys.stderr)
        return INTERRUPTED
    except (DataError, OSError) as error:
        if args.debug:
            raise
        way_out = "" if isinstance(error, DataError) else "; mend that, then the same command goes on where it was."
        print(f"data_prep: {error}{way_out}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
