"""The folder that is being filled: which plan it belongs to, what is finished in it, what must go.

While it is filled it holds `plan.json` (the input's fingerprint and the settings), a record in `.parts/` for every finished
shard, and temporary files `.tmp-*`. When it is complete, `manifest.json` is there and `.parts/` is not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from clae_dist.data.manifest import FILE_NAME, Shard
from clae_dist.errors import DataError
from clae_dist.files import make_folders, sync_folder, write_atomically
from clae_dist.lease import hold
from clae_dist.reading import ReadError, expect, is_count, is_list_of, is_text, read_object
from clae_dist.storage import writing
from data_prep.settings import PrepareSettings, QuarantineSettings
from data_prep.write import ShardResult

QUARANTINE = "quarantine.jsonl"
_PLAN = "plan.json"
_PARTS = ".parts"
_LOCK = ".lock"


_SHARD = {"name": is_text, "samples": is_count, "bytes": is_count, "sha256": is_text, "index_sha256": is_text}


def _is_bad(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_text, value))


class Workspace:
    """One destination folder, used by one process at a time. Create it through `open_workspace`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder.parent / f".{folder.name}.unpacked"  # beside the folder: same disk, and never part of the set
        self._parts = folder / _PARTS

    @property
    def is_complete(self) -> bool:
        return (self.folder / FILE_NAME).exists()

    def claim(self, fingerprint: str, settings: PrepareSettings | QuarantineSettings) -> bool:
        """True when this very plan was begun here before, False for an empty folder. Raises DataError for anything else."""
        path = self.folder / _PLAN
        if not path.exists():
            others = sorted(
                item.name for item in self.folder.iterdir() if item.name != _LOCK and not item.name.startswith(".tmp-")
            )
            if others:
                raise DataError(f"{self.folder} is not empty (it holds {others[0]}); name a new folder.")
            return False
        try:
            plan = read_object(path, surrogates=True)
            known_fingerprint, given = plan["fingerprint"], dict(plan["settings"])
            is_other = bool(given.keys() - settings.as_json().keys())
            known = {} if is_other else type(settings)(**given).as_json()  # what an older version lacks is at its default
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}); delete {self.folder} or name a new folder.") from None
        if is_other:
            raise DataError(f"{self.folder} holds the set of another command. Name a new folder, or delete that one.")
        requested = settings.as_json()
        differs = [f"{key} was {known[key]!r}, now {value!r}" for key, value in requested.items() if known[key] != value]
        if known_fingerprint != fingerprint:
            differs.append(settings.other_input)
        if differs:
            raise DataError(f"{self.folder} holds another set: {'; '.join(differs)}. Name a new folder, or delete that one.")
        return True

    def begin(self, fingerprint: str, settings: dict[str, Any]) -> None:
        """Writes down the plan; from here on the folder belongs to it."""
        content = json.dumps({"fingerprint": fingerprint, "settings": settings}, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.folder / _PLAN, content.encode())
        make_folders(self._parts)

    def remove_leftovers(self) -> None:
        """Remove the leftovers of an interrupted run: incomplete shards and an unpacked archive."""
        for leftover in self.folder.glob(".tmp-*"):
            leftover.unlink()
        for leftover in self._parts.glob(".tmp-*"):
            leftover.unlink()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def temporary(self, name: str) -> Path:
        """A name for a file that is not finished; it holds this process's id, so that no two runs write to the same one."""
        return self.folder / f".tmp-{os.getpid()}-{name}"

    def finished(self) -> dict[str, ShardResult]:
        """Results of the shards that are in place, by name."""
        results = {}
        for path in sorted(self._parts.glob("[!.]*.json")):
            try:
                part = read_object(path, surrogates=True)
                shard = Shard(**part["shard"]) if part["shard"] else None
                expect(part, {"name": is_text, "bad": is_list_of(_is_bad)})
                expect(vars(shard) if shard else {}, _SHARD if shard else {})
            except (ReadError, KeyError, TypeError):
                continue  # damaged: write the shard again
            tar = self.folder / part["name"]
            if shard and not (
                tar.is_file() and tar.stat().st_size == shard.bytes and (self.folder / shard.index_name).is_file()
            ):
                continue  # removed or damaged by hand since: write it again
            bad = tuple((path, reason) for path, reason in part["bad"])
            results[part["name"]] = ShardResult(part["name"], shard, bad, tar, tar)
        return results

    def finish(self, result: ShardResult) -> None:
        """Gives a shard and its index their names, then records the shard as finished."""
        with writing(self.folder / result.plan_name):
            if result.shard:
                os.replace(result.index, self.folder / result.shard.index_name)
                os.replace(result.tar, self.folder / result.shard.name)
                sync_folder(self.folder)
            else:
                result.tar.unlink()
        shard = dataclasses.asdict(result.shard) if result.shard else None
        part = json.dumps({"name": result.plan_name, "shard": shard, "bad": result.bad})
        write_atomically(self._parts / f"{result.plan_name}.json", part.encode())

    def write_quarantine(self, bad: list[tuple[str, str]]) -> None:
        """One JSON object a line: the path of an image that was set aside, and why."""
        if bad:
            lines = [json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in sorted(bad)]
            write_atomically(self.folder / QUARANTINE, "".join(lines).encode())

    def complete(self) -> None:
        """After the manifest is written: the records are no longer needed."""
        shutil.rmtree(self._parts, ignore_errors=True)


@contextmanager
def open_workspace(folder: Path) -> Iterator[Workspace]:
    """Locks `folder`, creating it; leaves no temporary file and no empty folder behind.

    Raises DataError when it is in use, StorageError when it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; name a folder.")
    make_folders(folder)
    try:
        with ExitStack() as stack:
            with writing(folder):
                stack.enter_context(
                    hold(folder / _LOCK, "data_prep", DataError, "wait until it has ended, or name a new folder.")
                )
            workspace = Workspace(folder)
            try:
                yield workspace
            finally:
                if (folder / _PLAN).exists() or workspace.scratch.exists():
                    workspace.remove_leftovers()
    finally:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
