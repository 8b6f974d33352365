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

OK, DIFFERENCES, BAD_INPUT, LEAKAGE, INTERRUPTED = 0, 1, 2, 3, 130

_EXIT_CODES = """\
exit codes: 0 done; 1 verify found differences; 2 wrong usage or bad input; 3 audit --fail-on found leakage; 130 interrupted"""

_ALL = """\
Images in, WebDataset shards and a manifest out.

  python -m data_prep imagefolder photos/ shards/photos    # a folder of class folders, or a tar archive of one
  python -m data_prep verify shards/photos                 # is everything as the manifest says?
  python -m data_prep info shards/photos                   # which images, how many, of which classes
  python -m data_prep audit shards/photos shards/eval      # copies within and between sets, odd images, labels
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

_DEMO = """\
Prepares the images of the quickstart and says which they are: PATH or $CLAE_DATA when given (a folder or an archive as for
imagefolder; NAME-train.tar.gz with NAME-test.tar.gz beside it are one set); else CIFAR-10 from ../shared/data, found beside
this checkout; else CIFAR-10 downloaded through torchvision; else, without a network, scikit-learn's embedded digits.
Downloads go to ${CLAE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/clae-dist}.
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

Nothing is written into the SETs. Memory: about 0.4 kB an image. For a million images the search takes about 20 s of one core
after decoding them.
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
    look = command("audit", "copies within and between sets, odd images, labels", _AUDIT)
    look.add_argument("sets", metavar="SET", type=Path, nargs="+", help="folder that imagefolder or demo wrote")
    look.add_argument("--near-bits", type=int, default=6, metavar="N", help="distance of near copies, 0 to 12 (default 6)")
    look.add_argument("--report", type=Path, default=None, metavar="DIR", help="write a page with pictures, JSON and a list")
    look.add_argument(
        "--limit-pictures",
        type=_workers,
        default=8,
        metavar="N",
        help="pairs shown of a kind for two splits, and odd images of a kind (default 8)",
    )
    look.add_argument(
        "--fail-on",
        choices=("pixels", "near"),
        help="exit 3 when an image of one split or set is in another: same pixels, near",
    )
    demo = command("demo", "the images of the quickstart → shards", _DEMO)
    demo.add_argument("destination", metavar="DST", type=Path, help="folder for the shards")
    demo.add_argument("--data", metavar="PATH", type=Path, default=None, help="your own folder or archive")
    for preparing in (folder, demo):
        preparing.add_argument(
            "--max-bad", type=_share, default=0.01, metavar="X", help="stop above this share of bad images (default 1%%)"
        )
    for parallel in (folder, demo, look):
        parallel.add_argument(
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


def _audit(args: argparse.Namespace) -> int:
    from data_prep.audit.find import audit
    from data_prep.audit.report import check_target, write_report
    from data_prep.audit.summary import describe

    if args.report:
        check_target(args.report, args.sets)
    found = audit(args.sets, near_bits=args.near_bits, limit_pictures=args.limit_pictures, num_workers=args.workers)
    _say("\n".join(describe(found)))
    if args.report:
        _say(f"Pictures: {write_report(found, args.report)}")
    return LEAKAGE if args.fail_on and found.leaked(args.fail_on) else OK


def _demo(args: argparse.Namespace) -> int:
    from data_prep.demo import prepare_demo

    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(os.environ.get("CLAE_CACHE") or os.path.join(home, "clae-dist"))
    named = args.data or (Path(os.environ["CLAE_DATA"]) if os.environ.get("CLAE_DATA") else None)
    prepare_demo(args.destination, named, cache, max_bad=args.max_bad, num_workers=args.workers, say=_say)
    return OK


_COMMANDS = {"imagefolder": _imagefolder, "verify": _verify, "info": _info, "audit": _audit, "demo": _demo}
_READING = ("verify", "info", "audit")


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
        way_out = "the sets are untouched" if args.command in _READING else "run the same command again to go on where it was"
        print(f"data_prep: interrupted; {way_out}.", file=sys.stderr)
        return INTERRUPTED
    except (DataError, OSError) as error:
        if args.debug:
            raise
        way_out = "" if isinstance(error, DataError) else "; mend that, then the same command goes on where it was."
        print(f"data_prep: {error}{way_out}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
