"""Hints for a `data.shards` that is not a folder with a manifest."""

from __future__ import annotations

from pathlib import Path

_UNPACK = {".gz": "gzip -dc", ".tgz": "gzip -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc", ".zst": "zstd -dc"}
_PREPARED = "name the folder that `python -m data_prep prepare IMAGES SHARDS` wrote, which is SHARDS"


def no_manifest(path: Path) -> str:
    """Fact and way out for a path that is no folder with a manifest.json. Reads only file names."""
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        return f"{path} is not a folder; {_PREPARED}."
    fact = f"{path} has no manifest.json"
    below = sorted(child.parent for child in path.glob("*/manifest.json"))
    tars = sum(child.suffix == ".tar" for child in path.iterdir())
    if below:
        return f"{fact}, but {below[0]} has one; name that folder."
    if tars:
        return (
            f"{fact}, but {tars} tar{'s' * (tars > 1)}: if these are WebDataset shards, `python -m data_prep index {path}` "
            f"adds a manifest, or name the shards themselves, 'data.shards={path}/NAME-{{000000..000099}}.tar'."
        )
    if any(path.iterdir()):
        return (
            f"{fact}; if it holds images, write their shards into another folder and name that one: `python -m data_prep "
            f"prepare {path} SHARDS`."
        )
    return f"{path} is empty; {_PREPARED}."


def _file(path: Path) -> str:
    command = _UNPACK.get(path.suffix)
    if command is None:
        return f"{path} is a file, neither a folder with a manifest.json nor a shard (.tar); {_PREPARED}."
    return (
        f"{path} is compressed, neither a folder with a manifest.json nor a shard (.tar); read it as a WebDataset shard with "
        f"'data.shards=pipe:{command} {path}', or, if it is an archive of images, make shards of it: `python -m data_prep "
        f"prepare {path} SHARDS`."
    )
