"""Entries of `data.shards`: a folder or a list of shards, local or remote (redact.py removes secrets)."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, urlsplit, urlunsplit

from clae_dist.redact import HIDDEN as HIDDEN
from clae_dist.redact import PIPE as PIPE
from clae_dist.redact import redact as redact
from clae_dist.redact import redact_list as redact_list
from clae_dist.redact import redact_text as redact_text
from clae_dist.redact import scheme as scheme
from clae_dist.redact import uri_without_secrets as uri_without_secrets
from clae_dist.redact import without_secrets as without_secrets


def expand(text: str) -> list[str]:
    """The entries of `data.shards`: several by "::", each with braces ({000000..000099}), as WebDataset writes them."""
    if "{" not in text and "::" not in text:
        return [text]
    from webdataset.shardlists import expand_urls

    entries: list[str] = expand_urls(text)
    return entries


def is_tar(entry: str) -> bool:
    """True if an entry names one shard rather than a folder: a pipe, or a name that ends in .tar."""
    return scheme(entry) == "pipe" or urlsplit(entry).path.endswith(".tar") or entry.endswith(".tar")


def local_path(entry: str) -> str:
    """The path of an entry without a scheme, or with file://."""
    return re.sub(r"^file:(//)?", "", entry)


def absolute(text: str) -> str:
    """`data.shards` with absolute paths, for processes that run in other folders."""
    parts = text.split("::") if text else []
    return "::".join(part if scheme(part) else os.path.abspath(local_path(part)) for part in parts)


def join(folder: str, name: str) -> str:
    """The URL of a file in a folder; a query (a signature) stays at the end."""
    if scheme(folder) not in ("http", "https"):
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
