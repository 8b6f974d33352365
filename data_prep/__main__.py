"""`python -m data_prep`: arguments, output and exit codes. Only this module reads environment variables."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from clae_dist.errors import BAD_INPUT, DIFFERENCES, INTERRUPTED, LEAKAGE, OK, STORAGE, ConfigError, DataError
from clae_dist.escape import in_json, say
from clae_dist.lifetime import end
from clae_dist.options import open_standard_streams
from data_prep.arguments import parse

# Worker processes import this file, too: slow imports belong in the functions.


def _prepare(args: argparse.Namespace) -> int:
    from data_prep.prepare import prepare
    from data_prep.settings import PrepareSettings
    from data_prep.sources import open_source
    from data_prep.sources.entry import origin_of

    source = open_source(args.sources, args.image_column, args.label_column)
    settings = PrepareSettings(
        name=args.name or source.name,
        source=args.origin or origin_of(source),
        licence=args.licence,
        seed=args.seed,
        test_share=args.test_share,
        shard_samples=args.shard_samples,
        shard_bytes=args.shard_bytes,
        max_pixels=args.max_pixels,
        min_side=args.min_side,
        resize_short=args.resize,
        quality=args.quality or 0,
    )
    prepare(source, args.destination, settings, max_bad=args.max_bad, num_workers=args.workers, say=_say)
    return OK


def _index(args: argparse.Namespace) -> int:
    from clae_dist.reading import ReadError, read_text
    from data_prep.index import IndexSettings, index

    classes: tuple[str, ...] = ()
    if args.classes:
        try:
            classes = tuple(read_text(args.classes).splitlines())
        except ReadError as error:
            raise DataError(f"--classes {args.classes} cannot be read ({error}); name a text file, a class a line.") from None
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
    if args.json:
        print(in_json(json.dumps(facts(manifest), indent=1, ensure_ascii=False)), flush=True)
    else:
        _say_lines(describe(manifest))
    return OK


def _audit(args: argparse.Namespace) -> int:
    from clae_dist.files import check_writable
    from data_prep.audit.find import audit
    from data_prep.audit.report import check_target, write_report
    from data_prep.audit.summary import describe

    if args.report:
        check_target(args.report, args.sets)
        check_writable(args.report)
    if args.encoder and not args.poison:
        raise DataError(f"--encoder is {args.encoder}, which only the search for poison uses; add --poison.")
    found = audit(args.sets, near_bits=args.near_bits, limit_pictures=args.limit_pictures, num_workers=args.workers)
    _say_lines(describe(found))
    suspects = None
    if args.poison:
        from data_prep.audit.poison import find_suspects, suspect_lines

        suspects = find_suspects(found, args.encoder, num_workers=args.workers)
        _say_lines(suspect_lines(found, suspects))
    if args.report:
        _say(f"Pictures: {write_report(found, args.report, suspects)}")
    return LEAKAGE if args.fail_on and found.leaked(args.fail_on) else OK


def _quarantine(args: argparse.Namespace) -> int:
    from data_prep.quarantine import quarantine
    from data_prep.settings import QuarantineSettings

    settings = QuarantineSettings(args.below, args.recurring, args.unlabel)
    quarantine(args.set, args.lists, args.to, settings, max_bad=args.max_bad, num_workers=args.workers, say=_say)
    return OK


def _demo(args: argparse.Namespace) -> int:
    from data_prep.demo import prepare_demo

    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(os.environ.get("CLAE_CACHE") or os.path.join(home, "clae-dist"))
    named = args.data or (Path(os.environ["CLAE_DATA"]) if os.environ.get("CLAE_DATA") else None)
    prepare_demo(args.destination, named, cache, max_bad=args.max_bad, num_workers=args.workers, say=_say)
    return OK


_COMMANDS = {
    "prepare": _prepare,
    "index": _index,
    "verify": _verify,
    "info": _info,
    "audit": _audit,
    "quarantine": _quarantine,
    "demo": _demo,
}
_READING = ("verify", "info", "audit")


def _say(text: str) -> None:
    say(text, flush=True)


def _say_lines(lines: list[str]) -> None:
    for line in lines:
        _say(line)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = parse(arguments)
    from clae_dist.redact import redact_text
    from clae_dist.storage import storage_error

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        way_out = "the sets are untouched" if args.command in _READING else "the same command resumes"
        print(f"data_prep: interrupted; {way_out}.", file=sys.stderr)
        return INTERRUPTED
    except (DataError, ConfigError, OSError) as error:
        if args.debug:
            raise
        storage = storage_error(error)
        way_out = "" if isinstance(error, (DataError, ConfigError)) else "; fix that, then the same command resumes."
        say(redact_text(f"data_prep: {storage or f'{error}{way_out}'}"), file=sys.stderr)
        return STORAGE if storage else BAD_INPUT
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    open_standard_streams()
    end(main())
