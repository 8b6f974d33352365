"""index(): existing WebDataset shards get a manifest and indices; the shards themselves stay as they are.

What is done is kept in `.parts/` beside the manifest-to-be, one record a shard, until all is: an interrupted run goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from clae_dist.data.image_names import is_hidden
from clae_dist.data.manifest import FILE_NAME, Manifest, load_manifest, write_manifest
from clae_dist.data.tar_index import Dropped, index_tar
from clae_dist.data.urls import expand, local_path, redact, scheme
from clae_dist.errors import DataError
from clae_dist.files import make_folders, remove, write_atomically
from clae_dist.progress import Progress
from clae_dist.storage import writing
from data_prep.index_shard import IndexResult, IndexTask, finished, index_shard
from data_prep.named_labels import label_classes, place_index
from data_prep.pool import run_tasks
from data_prep.split_names import files_by_split
from data_prep.workspace import QUARANTINE, open_workspace

Say = Callable[[str], None]
_PARTS = ".parts"
_MANY = 100  # classes


@dataclass(frozen=True)
class IndexSettings:
    """Settings of indexing existing shards."""

    name: str = ""
    source: str = ""
    licence: str = "not stated"
    classes: tuple[str, ...] = ()  # (): the labels' numbers
    max_pixels: int = 100_000_000


def index(
    shards: list[str],
    to: Path | None,
    settings: IndexSettings,
    *,
    max_bad: float = 0.01,
    num_workers: int = 1,
    say: Say = print,
) -> Manifest:
    """Checks every image of existing shards and writes their indices and a manifest, beside them or into `to`.

    `shards` are tars of this machine, folders of them, or lists with braces. In `to` the shards are links. Images that cannot
    be decoded are skipped. Raises DataError for a damaged tar, a label without a class, too many bad images.
    """
    tars = _tars(shards)
    folder = to or tars[0].parent
    if to is None and {tar.parent for tar in tars} != {folder}:
        raise DataError("the shards lie in several folders, and a manifest describes one; say where with --to DIR.")
    splits, notes = _splits([tar.name for tar in tars])
    with open_workspace(folder) as _:
        if (folder / FILE_NAME).exists():
            return _already(folder, tars, say)
        if (folder / "plan.json").exists():
            raise DataError(
                f"{folder} holds a preparation that is not finished; give its command again, or name another folder."
            )
        make_folders(folder / _PARTS)
        tasks = [IndexTask(tar, folder / _PARTS, settings.max_pixels) for tar in tars]
        results = _check_all(tasks, max_bad, num_workers, folder, say)
        for note in notes:
            say(note)
        classes, names = label_classes(settings.classes, results, folder / _PARTS)
        for tar in tars:
            _link(tar, folder / tar.name)
        results = {name: place_index(result, folder / _PARTS, folder, names) for name, result in results.items()}
        bad = [image for result in results.values() for image in result.bad]
        _write_quarantine(folder, bad)
        manifest = write_manifest(
            folder,
            name=settings.name or folder.resolve().name,
            source=settings.source or folder.resolve().name,
            licence=settings.licence,
            classes=classes,
            splits={split: tuple(results[name].shard for name in names) for split, names in splits.items()},
            quarantined=len(bad),
            preparation={"indexed": True, "max_pixels": settings.max_pixels, "splits_from": "names", "pixels": "as they were"},
        )
        shutil.rmtree(folder / _PARTS)
    _say_labels(manifest, say)
    images = ", ".join(f"{split} {manifest.num_samples(split)}" for split in manifest.splits)
    set_aside = f"; {len(bad)} were set aside, {folder / QUARANTINE} lists them" if bad else ""
    say(f"{folder}: {images} images in {len(tars)} shards{set_aside}. Digest {manifest.digest[:12]}.")
    return manifest


def _tars(shards: list[str]) -> list[Path]:
    """The shards in the order in which they were named. Raises DataError for what is none."""
    tars: list[Path] = []
    for entry in (entry for text in shards for entry in expand(text)):
        if scheme(entry):
            raise DataError(
                f"{redact(entry)} is not on this machine; fetch it first, or train on it as it is: data.shards={redact(entry)}."
            )
        path = Path(local_path(entry))
        found = [tar for tar in sorted(path.glob("*.tar")) if not is_hidden(tar.name)] if path.is_dir() else [path]
        wrong = next((tar for tar in found if not tar.is_file() or tar.suffix != ".tar"), None)
        if wrong or not found:
            raise DataError(f"{wrong or path} is no shard: no file .tar; name shards, or the folder that holds them.")
        tars += found
    names = [tar.name for tar in tars]
    double = next((name for name in names if names.count(name) > 1), None)
    if double:
        raise DataError(f"two shards are called {double}; rename one of them.")
    return tars


def _splits(names: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Names of shards by split: by the word in them that is a split's, else `train`. And what to tell the user."""
    try:
        found = files_by_split(names)
    except ValueError as error:
        raise DataError(f"{error}; which one is it? Rename the shard, or a link to it.") from None
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(found[name] or "train", []).append(name)
    notes = []
    unnamed = [name for name in names if not found[name]]
    if unnamed and len(unnamed) < len(names):
        notes.append(f"{len(unnamed)} shards do not tell their split, such as {unnamed[0]}: they are taken for train.")
    if "val" in splits and "test" not in splits:  # as `prepare` does it: evaluation looks for a split test
        splits["test"] = splits.pop("val")
        notes.append(f"Shards such as {splits['test'][0]} become the split test.")
    if "train" not in splits:
        notes.append("No shard is of the split train; training needs one, or data.train_split.")
    return splits, notes


def _already(folder: Path, tars: list[Path], say: Say) -> Manifest:
    manifest = load_manifest(folder)
    known = {(shard.name, shard.bytes) for shards in manifest.splits.values() for shard in shards}
    if known != {(tar.name, tar.stat().st_size) for tar in tars}:
        raise DataError(
            f"{folder} has a manifest.json of other shards; remove it to index anew, or name another folder with --to."
        )
    say(f"{folder} already has a manifest of these shards; `python -m data_prep verify {folder}` compares every byte.")
    return manifest


def _check_all(tasks: list[IndexTask], max_bad: float, num_workers: int, folder: Path, say: Say) -> dict[str, IndexResult]:
    """The results by the shards' names, in the order of `tasks`."""
    say(f"Reading the headers of {len(tasks)} shards …")
    dropped = Dropped()
    counts = {task.tar.name: _count(task.tar, dropped) for task in tasks}
    for line in dropped.lines():
        say(line[0].upper() + line[1:] + ".")
    results = {task.tar.name: result for task in tasks if (result := finished(task))}
    if results:
        say(f"{len(results)} of {len(tasks)} shards were checked before and are kept.")
    total = sum(counts.values())
    progress = Progress(total, done=sum(counts[name] for name in results))
    remaining = [task for task in tasks if task.tar.name not in results]
    with closing(run_tasks(index_shard, remaining, num_workers, progress.add)) as done:
        for result in done:
            results[result.shard.name] = result
            _refuse_many_bad(results, total, max_bad, folder)
    progress.close()
    _refuse_many_bad(results, total, max_bad, folder)
    return {task.tar.name: results[task.tar.name] for task in tasks}


def _count(tar: Path, dropped: Dropped) -> int:
    with tar.open("rb") as file:
        found = index_tar(file, str(tar))
    dropped.include(found.dropped)
    return len(found.rows)


def _say_labels(manifest: Manifest, say: Say) -> None:
    """How many classes there are, and how many images have none."""
    labelled = {split: sum(counts) for split, counts in manifest.class_counts.items()}
    for split, count in labelled.items():
        images = manifest.num_samples(split)
        if count < images:
            say(f"Images of {split} without a label (-1): {images - count} of {images}.")
    if manifest.classes:
        say(f"Classes: {len(manifest.classes)}, {manifest.classes[0]!r} to {manifest.classes[-1]!r}.")
    if len(manifest.classes) > _MANY and 2 * len(manifest.classes) > sum(labelled.values()):
        say("There is a class for every image or two: are the labels ids of images rather than of classes?")


def _refuse_many_bad(results: dict[str, IndexResult], total: int, max_bad: float, folder: Path) -> None:
    bad = [image for result in results.values() for image in result.bad]
    empty = next((name for name, result in results.items() if not result.shard.samples), None)
    if len(bad) <= max_bad * total and empty is None:
        return
    _write_quarantine(folder, bad)
    path, reason = min(bad)
    if empty is not None:
        raise DataError(f"{empty} has no good image, such as {path} ({reason}); leave this shard out.")
    raise DataError(
        f"{len(bad)} of {total} images are bad, more than --max-bad {max_bad:.3g} allows, such as {path} ({reason}); "
        f"{folder / QUARANTINE} lists them. Allow more and go on, or write the shards again."
    )


def _write_quarantine(folder: Path, bad: list[tuple[str, str]]) -> None:
    remove([folder / QUARANTINE])  # of a try that was given up
    if bad:
        lines = [json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in sorted(bad)]
        write_atomically(folder / QUARANTINE, "".join(lines).encode())


def _link(tar: Path, place: Path) -> None:
    """A link to the shard where the manifest is, unless it lies there."""
    if place.exists() and place.samefile(tar):
        return
    if place.is_symlink() or place.exists():
        raise DataError(f"{place} is another file than {tar}; name another folder with --to.")
    with writing(place):
        place.symlink_to(tar.resolve())
