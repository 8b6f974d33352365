"""Folders of this machine in which run folders on object storage are staged.

Training stages s3://bucket/runs/a in CACHE/runs/s3/bucket/runs/a, below `cache_home()`, on the disk of every node. Commands
that read a run keep a copy of what they need in CACHE/copies, apart from a run that may be training. The path alone says which
URL a folder stages, so that code works on paths and asks `url_of` where objects matter.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from clae_dist.errors import ConfigError
from clae_dist.redact import redact_word

SCHEMES = ("s3", "gs")
_RUNS, _COPIES = "runs", "copies"
_URL = re.compile(r"([a-zA-Z][\w+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[a-zA-Z0-9][\w.-]{1,220}")
_WAY_OUT = f"name a folder that this machine sees, or one on object storage such as {SCHEMES[0]}://bucket/runs/first."


def cache_home() -> Path:
    """This machine's folder for what can be fetched or computed again: CLAE_CACHE, or clae-dist in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("CLAE_CACHE") or os.path.join(home, "clae-dist"))


def is_url(text: str) -> bool:
    """True for a text with a scheme, such as s3://bucket/run."""
    return "://" in text


def normal_url(url: str, key: str) -> str:
    """The URL in the one spelling that names its staging folder.

    Raises ConfigError, which calls it `key`, for one that is no folder in a bucket, and for credentials in it.
    """
    match = _URL.fullmatch(url)
    shown = f"{key} is {redact_word(url)!r}"
    scheme = match[1].lower() if match else ""
    if match is None or scheme not in SCHEMES:
        raise ConfigError(f"{shown}, a URL that is not one of {', '.join(f'{name}://' for name in SCHEMES)}; {_WAY_OUT}")
    bucket, *parts = match[2].split("/")
    parts = [part for part in parts if part]
    if "@" in bucket:
        raise ConfigError(
            f"{shown}, which holds credentials; leave them out: they are read from the environment (AWS_ACCESS_KEY_ID, "
            "AWS_PROFILE; GOOGLE_APPLICATION_CREDENTIALS)."
        )
    if not _BUCKET.fullmatch(bucket) or any(part in (".", "..") or re.search(r"[\0-\x1f?#*\[\]\\]", part) for part in parts):
        raise ConfigError(f"{shown}, which names no folder in a bucket; use {scheme}://bucket/runs/first.")
    return "/".join([f"{scheme}://{bucket}", *parts])


def staging_folder(url: str, key: str = "run_dir") -> Path:
    """The folder of this machine that stages `url`. Raises ConfigError."""
    return _below(_RUNS, normal_url(url, key))


def copy_folder(url: str, key: str = "RUN") -> Path:
    """The folder of this machine with the copies of a command that reads `url`. Raises ConfigError."""
    return _below(_COPIES, normal_url(url, key))


def url_of(folder: Path) -> str:
    """The URL that a folder of this machine stages, or ""."""
    path, home = folder.absolute(), cache_home().absolute()
    if not path.is_relative_to(home):
        return ""
    kind, scheme, *parts = (*path.relative_to(home).parts, "", "")
    parts = [part for part in parts if part]
    return f"{scheme}://{'/'.join(parts)}" if kind in (_RUNS, _COPIES) and scheme in SCHEMES and parts else ""


def shown_path(folder: Path) -> str:
    """The path, or the URL that it stages, as messages name it."""
    return url_of(folder) or str(folder)


def _below(kind: str, url: str) -> Path:
    scheme, _, rest = url.partition("://")
    return cache_home().absolute() / kind / scheme / rest
