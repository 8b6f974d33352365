"""Open the set of shards that `data.shards` names: a local or remote folder, or plain shards."""

from __future__ import annotations

from collections.abc import Callable

from clae_dist.config import Data
from clae_dist.data.manifest import Manifest, load_manifest
from clae_dist.data.plain import open_plain
from clae_dist.data.remote import Fetching, load_remote_manifest
from clae_dist.data.urls import HIDDEN, expand, is_tar, local_path, redact, redact_list, scheme
from clae_dist.errors import ConfigError, DataError
from clae_dist.world import World


def open_shards(
    data: Data,
    world: World | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[], None] = lambda: None,
) -> Manifest:
    """The manifest of the set that `data.shards` names. Collective if `world` is given.

    `progress` is called repeatedly while shards are fetched and indexed.

    Remote shards are fetched when they are read. Raises the same ConfigError or DataError on every rank.
    """
    world = world or World.single("cpu")
    entries = entries_of(data.shards)
    if len(entries) == 1 and not is_tar(entries[0]):
        manifest: Manifest = world.run_on_main(lambda: _open_folder(entries[0], data))
        return manifest
    return open_plain(data.shards, entries, Fetching.of(data), world, say, progress)


def entries_of(text: str) -> list[str]:
    """Parse `data.shards` into one folder, or shards. Raises ConfigError if it is empty, malformed or a mix of both."""
    if not text:
        raise ConfigError(
            "data.shards is ''; name a folder of shards, such as data.shards=shards after `python -m data_prep demo shards` "
            "(the quickstart's images) or `python -m data_prep prepare IMAGES shards` (yours)."
        )
    if HIDDEN in text:
        raise ConfigError(
            f"data.shards is {text!r}: the part after the question mark was a secret, which a run does not store; name the "
            "set again (`clae evaluate RUN --shards …`, `clae report RUN --shards …`)."
        )
    try:
        entries = expand(text)
    except ValueError as error:
        raise ConfigError(
            f"data.shards is {redact_list(text)!r}, whose braces cannot be expanded ({error}); write {{000000..000099}}."
        ) from None
    folders = [entry for entry in entries if not is_tar(entry)]
    if folders and len(entries) > 1:
        raise ConfigError(
            f"data.shards lists {redact(folders[0])!r} among {len(entries)} entries, which is no shard (.tar); name one "
            "folder with a manifest, or shards (compressed ones through pipe:gzip -dc FILE.tar.gz)."
        )
    return entries


def _open_folder(entry: str, data: Data) -> Manifest:
    if not scheme(entry):
        return load_manifest(local_path(entry))
    Fetching.of(data).cache.remove_leftovers()
    try:
        return load_remote_manifest(entry, data)
    except DataError as error:
        raise DataError(f"{error} data.shards names a folder with a manifest.json; plain shards end in .tar.") from None
