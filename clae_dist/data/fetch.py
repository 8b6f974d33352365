"""Fetch a file until it is complete and correct: resume after a cut, repeat after wrong bytes, with backoff."""

from __future__ import annotations

import email.utils
import errno
import hashlib
import http.client
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import IO
from urllib.error import HTTPError, URLError

from clae_dist.data.byte_streams import open_stream
from clae_dist.data.urls import redact, redact_text
from clae_dist.errors import DataError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0
_LONGEST_RETRY_AFTER_S = 60.0  # of a server's Retry-After
_START_BYTES = 512
_MOST_WRONG = 3  # complete files with wrong bytes; the fourth one is wrong at its source
_PASSING = (408, 425, 429)  # of the 4xx, those that a retry may fix


@dataclass(frozen=True)
class Patience:
    """Limits of a fetch: `retries` without progress after the first try; `timeout_s` without a byte is a stall."""

    retries: int = 8
    timeout_s: float = 30.0


class Stopped(Exception):
    """The fetch was cancelled because the file is no longer needed."""


class _Wrong(Exception):
    """The file is complete, but its bytes are wrong."""


class _Short(OSError):
    """The stream ended before the end of the file."""


Check = Callable[[IO[bytes]], str]  # the problem of a complete file, or ""


def digest_check(num_bytes: int, sha256: str) -> Check:
    """A check against the manifest's size (0: any) and digest."""

    def check(file: IO[bytes]) -> str:
        size = file.seek(0, 2)
        if num_bytes and size != num_bytes:
            return f"{size} bytes, expected {num_bytes}"
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return "" if found == sha256 else f"sha256 {found}, expected {sha256}"

    return check


def fetch(
    url: str,
    target: IO[bytes],
    name: str,
    patience: Patience,
    check: Check,
    num_bytes: int = 0,
    stop: threading.Event | None = None,
    begins: Callable[[bytes], str] = lambda start: "",
) -> None:
    """Fill `target` with the file at `url`; errors call it `name`. `num_bytes` is its size, 0 if unknown.

    With a known size, bytes that `target` already has are kept and the rest is requested; `check` tells if they match. `begins`
    checks the first bytes (512 at least) and returns a problem, or "": after a problem, the rest is not fetched. Raises
    DataError if the retries are used up or useless, Stopped if `stop` is set.
    """
    stop = stop or threading.Event()
    download = _Download(url, target, patience, num_bytes, stop, begins)
    failures = wrongs = 0
    furthest = target.seek(0, 2)
    while True:
        pause_s = 0.0
        try:
            download.attempt()
            problem = check(target)
            if not problem:
                return
            raise _Wrong(problem)
        except _Wrong as error:
            reason, furthest = str(error), 0
            wrongs += 1
            download.begin_again()
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a URL that is none
            reason = _reason(error, patience)
            if _is_final(error):
                raise DataError(_message(name, url, reason, 1)) from None
            if isinstance(error, HTTPError):
                pause_s = _retry_after_s(error)
                if error.code == 416:  # the target is longer than the file
                    download.begin_again()
            here = target.seek(0, 2)
            failures = 1 if here > furthest else failures + 1
            furthest = max(here, furthest)
        if failures > patience.retries or wrongs > min(_MOST_WRONG, patience.retries):
            raise DataError(_message(name, url, reason, max(failures, wrongs)))
        backed_off = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (max(failures, wrongs) - 1)) * random.uniform(0.5, 1.5)
        if stop.wait(max(pause_s, backed_off)):
            raise Stopped


@dataclass
class _Download:
    """The state of a download over all its connections."""

    url: str
    target: IO[bytes]
    patience: Patience
    num_bytes: int
    stop: threading.Event
    begins: Callable[[bytes], str]
    validator: str = ""  # of the file whose bytes `target` holds

    def begin_again(self) -> None:
        self.target.truncate(0)
        self.validator = ""

    def attempt(self) -> None:
        """Read one connection; the bytes before an error are in `target`."""
        size = self.target.seek(0, 2)
        if self.num_bytes and size >= self.num_bytes:
            return
        # Without a known size or a validator, two parts of different files could be joined unnoticed.
        start = size if self.num_bytes or self.validator else 0
        with closing(open_stream(self.url, start, self.validator, self.patience.timeout_s)) as stream:
            self.validator = stream.validator
            self.target.truncate(stream.start)
            self.target.seek(stream.start)
            first: bytes | None = b"" if stream.start == 0 else None  # of the file, until there are enough of them
            while data := stream.read():
                if first is not None:
                    first += data[:_START_BYTES]
                    if len(first) >= _START_BYTES:
                        if problem := self.begins(first):
                            raise _Wrong(problem)
                        first = None
                self.target.write(data)
                if self.num_bytes and self.target.tell() > self.num_bytes:
                    raise _Wrong(f"more than the expected {self.num_bytes} bytes")
                if self.stop.is_set():
                    raise Stopped
            self.target.flush()
            self._refuse_short(self.target.tell(), stream.total)

    def _refuse_short(self, came: int, total: int | None) -> None:
        if total is not None and came < total:
            raise _Short(f"the connection was cut after {came} of {total} bytes")
        if came < self.num_bytes:
            if total is not None:
                raise _Wrong(f"{came} bytes, expected {self.num_bytes}")
            raise _Short(f"the stream ended after {came} of {self.num_bytes} bytes")


def _is_final(error: Exception) -> bool:
    """True if a retry is useless: missing file, missing permission, full disk."""
    if isinstance(error, HTTPError):
        return 400 <= error.code < 500 and error.code not in (*_PASSING, 416)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return full or isinstance(error, (FileNotFoundError, PermissionError, http.client.InvalidURL, ValueError))


def _reason(error: Exception, patience: Patience) -> str:
    if isinstance(error, HTTPError):
        return f"the server answered {error.code} {error.reason}"
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no bytes for {patience.timeout_s:g} s"
    if isinstance(cause, http.client.InvalidURL):  # its text is the URL's
        return "the URL has invalid characters"
    if isinstance(cause, FileNotFoundError):
        return "it does not exist"
    return redact_text(str(cause)) or type(cause).__name__


def _retry_after_s(error: HTTPError) -> float:
    """Seconds until the retry that the server requests (Retry-After: a number or a date)."""
    text = error.headers.get("Retry-After", "") if error.headers else ""
    if text.isdigit():
        return min(_LONGEST_RETRY_AFTER_S, float(text))
    try:
        moment = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError):
        return 0.0
    return min(_LONGEST_RETRY_AFTER_S, max(0.0, moment - time.time()))


def _message(name: str, url: str, reason: str, tries: int) -> str:
    often = f" in {tries} tries" if tries > 1 else ""
    return (
        f"{name} could not be fetched from {redact(url)}{often}: {reason}; check that it exists, is complete and readable. The "
        "same command resumes from the last checkpoint (data.retries, data.timeout_s)."
    )
