"""Read files that a crash may have damaged or that may come from an attacker.

Only plain files of bounded size are read; text is strict UTF-8; JSON has bounded depth, no NaN and no repeated key. Every
problem raises ReadError, which callers turn into an error that names the file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from clae_dist.errors import BAD_DATA, ClaeError

MAX_BYTES = 16 << 20
MAX_DEPTH = 32
_MAX_LINE_BYTES = 1 << 20
_MAX_DIGITS = 20  # of an integer: 64 bits and a sign
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class ReadError(ClaeError, ValueError):
    """A file or a text cannot be used. The message is only the reason; callers add the file and the way out."""

    exit_code = BAD_DATA
    cause = "data"
    on_all_ranks = False


class MissingError(ReadError):
    """The file does not exist."""


def open_regular(path: str | Path, *, follow: bool = True) -> IO[bytes]:
    """Open a plain file for reading, never a fifo or a device, which could block or have no end; `follow` symbolic links.

    Raises ReadError.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise MissingError(os.strerror(errno.ENOENT)) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise ReadError(getattr(error, "strerror", None) or str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ReadError("it is not a plain file")
    return open(path, "rb", opener=lambda *_: descriptor)  # whose name is the path


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES, *, follow: bool = True) -> bytes:
    """The content of a plain file of at most `max_bytes`. Raises ReadError."""
    with open_regular(path, follow=follow) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise ReadError(error.strerror or str(error)) from None
    if len(data) > max_bytes:
        raise ReadError(f"it has more than {max_bytes:,} bytes")
    return data


def decode(data: bytes) -> str:
    """Strict UTF-8 as text. Raises ReadError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReadError(f"byte {error.start} is not UTF-8") from None


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a plain file in UTF-8. Raises ReadError."""
    return decode(read_bytes(path, max_bytes))


def read_object(path: str | Path, max_bytes: int = MAX_BYTES, *, surrogates: bool = False, nan: bool = False) -> dict[str, Any]:
    """The JSON object in a file; see `parse_object`. Raises ReadError."""
    return parse_object(read_bytes(path, max_bytes), surrogates=surrogates, nan=nan)


def parse_object(data: bytes, *, surrogates: bool = False, nan: bool = False) -> dict[str, Any]:
    """The JSON object in a text. Raises ReadError.

    `surrogates` allows strings that stand for file names which are no UTF-8, `nan` allows NaN and infinity.
    """
    content = parse_json(data, surrogates=surrogates, nan=nan)
    if not isinstance(content, dict):
        raise ReadError(f"it holds a {type(content).__name__}, not an object")
    return content


def parse_json(data: bytes, *, surrogates: bool = False, nan: bool = False) -> Any:
    """Strict JSON: no NaN and no infinity (unless `nan`), no integer above 64 bits, no key twice, at most MAX_DEPTH deep.

    Raises ReadError.
    """
    if not data.strip():
        raise ReadError("it is empty")
    if data.count(b"[") + data.count(b"{") > 10_000 + len(data) // 8:
        raise ReadError("it holds more brackets than content")  # each takes 30 times its bytes in memory
    try:
        content = json.loads(
            decode(data),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=float if nan else _float,
            parse_constant=float if nan else _constant,
        )
    except ReadError:
        raise
    except RecursionError:
        raise ReadError(f"it is nested more than {MAX_DEPTH} deep") from None
    except MemoryError:
        raise ReadError("it needs more memory than there is") from None
    except ValueError as error:
        raise ReadError(f"no valid JSON: {error}") from None
    _check_depth(content)
    if not surrogates and _SURROGATE.search(data):
        _check_text(content)
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ReadError(f"the key {next(key for key in keys if keys.count(key) > 1)[:60]!r} is repeated")
    return content


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ReadError(f"it has an integer of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _constant(text[:40])


def _constant(text: str) -> NoReturn:
    raise ReadError(f"it holds {text}, which is no finite number")


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        containers = [node for node in level if isinstance(node, (dict, list))]
        if not containers:
            return
        level = [child for node in containers for child in (node.values() if isinstance(node, dict) else node)]
    raise ReadError(f"it is nested more than {MAX_DEPTH} deep")


def _check_text(content: Any) -> None:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ReadError("it holds a lone surrogate (half a character)") from None


def json_lines(path: str | Path) -> Iterator[dict[str, Any] | None]:
    """The JSON objects of a file of lines, one at a time; None for a line without one, such as a line cut off by a kill.

    NaN and infinity are allowed, as losses may have these values. A missing file has no lines. Raises ReadError.
    """
    return (parse_line(line.rstrip(b"\n") + b"\n") for line in raw_lines(path))  # the last line may lack its line feed


def raw_lines(path: str | Path) -> Iterator[bytes]:
    """The lines of a plain file, none if it does not exist; a line above a megabyte comes in parts. Raises ReadError."""
    try:
        file = open_regular(path)
    except MissingError:
        return
    with file:
        try:
            while line := file.readline(_MAX_LINE_BYTES):
                yield line
        except OSError as error:
            raise ReadError(error.strerror or str(error)) from None


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a complete line; None if the line holds none."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = json.loads(line)
    except (ValueError, RecursionError, MemoryError):
        return None
    return content if isinstance(content, dict) else None


# ---- checks of fields ----

Check = Callable[[Any], bool]


def is_count(value: Any) -> bool:
    """True for a non-negative integer of at most 62 bits."""
    return type(value) is int and 0 <= value < 2**62


def is_number(value: Any) -> bool:
    """True for a finite number so small that sums and products of a few of them are finite as well."""
    return type(value) in (int, float) and -1e100 < value < 1e100


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def expect(content: Mapping[str, Any], fields: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> None:
    """Check an object: all of `fields` are present and valid; `optional` ones may be absent.

    Raises ReadError with the first missing or invalid field.
    """
    for key, check in {**fields, **(optional or {})}.items():
        if key not in content:
            if key in fields:
                raise ReadError(f"{key} is missing")
        elif not check(content[key]):
            raise ReadError(f"{key} is {str(content[key])[:40]!r}")
