"""What `data.shards` may name: a folder or a list of shards, here or elsewhere; and how a URL is shown without its secrets."""

from __future__ import annotations

import os
import re
import shlex
from urllib.parse import quote, urlsplit, urlunsplit

_SCHEME = re.compile(r"([a-zA-Z][\w+.-]*)://")
_URL = re.compile(r"[a-zA-Z][\w+.-]*://[^\s'\"<>]+")
_SECRET = re.compile("pass|secret|token|key|cred|sig", re.IGNORECASE)
_SHELL = re.compile(r"[|;&$`<>()]")
_UNPACKERS = frozenset("cat gzip gunzip zcat bzip2 bzcat xz xzcat zstd zstdcat lz4 pigz".split())
PIPE = "pipe:"
HIDDEN = "?…"  # what stands for the query of a URL, which may be a signature


def expand(text: str) -> list[str]:
    """The entries of `data.shards`: several by "::", each with braces ({000000..000099}), as WebDataset writes them."""
    if "{" not in text and "::" not in text:
        return [text]
    from webdataset.shardlists import expand_urls

    entries: list[str] = expand_urls(text)
    return entries


def scheme(entry: str) -> str:
    """ "https", "s3", "pipe", …; "" for a path of this machine (file:// is one, too)."""
    if entry.startswith(PIPE):
        return "pipe"
    found = _SCHEME.match(entry)
    name = found[1].lower() if found else ""
    return "" if name == "file" else name


def is_tar(entry: str) -> bool:
    """Whether an entry names one shard rather than a folder: a pipe, or what ends in .tar."""
    return scheme(entry) == "pipe" or urlsplit(entry).path.endswith(".tar") or entry.endswith(".tar")


def local_path(entry: str) -> str:
    """The path of an entry without a scheme, or with file://."""
    return re.sub(r"^file:(//)?", "", entry)


def absolute(text: str) -> str:
    """`data.shards` with absolute paths, for processes that run in other folders."""
    parts = text.split("::") if text else []
    return "::".join(part if scheme(part) else os.path.abspath(local_path(part)) for part in parts)


def join(folder: str, name: str) -> str:
    """The URL of a file in a folder; what follows a question mark (a signature) stays at the end."""
    if not _is_http(folder):
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def redact(entry: str) -> str:
    """An entry as logs and errors may show it: no user, no password, nothing after "?", of a pipe only the program's name."""
    kind = scheme(entry)
    if kind == "pipe":
        return f"{PIPE}{_program(entry)} …"
    if not kind:
        return entry
    parts = urlsplit(entry)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))


def redact_list(text: str) -> str:
    """`data.shards` as logs may show it, braces as they were written."""
    return "::".join(redact(part) for part in text.split("::"))


def without_secrets(text: str) -> str:
    """`data.shards` as a run's files may hold it: as it was written, but without logins and what follows "?" in URLs.

    Of a command, which may hold a token anywhere, no more than the program's name, unless it does no more than unpack a file.
    """
    return "::".join(_command_without_secrets(part) if scheme(part) == "pipe" else redact(part) for part in text.split("::"))


def _command_without_secrets(entry: str) -> str:
    words = entry[len(PIPE) :].split()
    if words and words[0] in _UNPACKERS and not _SHELL.search(entry) and "://" not in entry:
        return entry
    return f"{PIPE}{_program(entry)} {HIDDEN}"


def _program(entry: str) -> str:
    """The program that a pipe starts, without what is assigned before it; "" where that is not a plain word."""
    try:
        words = shlex.split(entry[len(PIPE) :])
    except ValueError:  # a quotation that does not end
        return ""
    word = next((word for word in words if "=" not in word), "")
    return word if re.fullmatch(r"[\w./+-]*", word) else ""


def uri_without_secrets(uri: str) -> str:
    """The address of a store without its login; a database's user stays (libpq finds the password in ~/.pgpass by it)."""
    parts = urlsplit(uri)
    login, at, host = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    if parts.scheme in ("http", "https"):  # it may be a token instead of a user
        user, at = "", ""
    options = "&".join(option for option in parts.query.split("&") if not _SECRET.search(option.partition("=")[0]))
    shown = uri.replace(parts.netloc, f"{user}{at}{host}", 1)  # not put together anew: sqlite has more slashes than a URL
    return shown.replace(f"?{parts.query}", f"?{options}" if options else "", 1)


def redact_text(text: str) -> str:
    """A vendor's message with every URL in it redacted."""
    return _URL.sub(lambda found: redact(found[0]), text)


def _is_http(entry: str) -> bool:
    return scheme(entry) in ("http", "https")
