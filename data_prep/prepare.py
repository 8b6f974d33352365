"""prepare() turns a source into a folder of shards with a manifest; run again after an interruption, it resumes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from clae_dist.data.manifest import Manifest, check_shard, load_manifest, write_manifest
from clae_dist.errors import DataError
from clae_dist.files import make_folders
from clae_dist.progress import Progress
from data_prep.image import pixels_text
from data_prep.plan import SetPlan, make_plan
from data_prep.pool import run_tasks
from data_prep.settings import PrepareSettings
from data_prep.sources.entry import Layout, Listing, Source
from data_prep.workspace import QUARANTINE, Workspace, open_workspace
from data_prep.write import ShardResult, ShardTask, write_shard

Say = Callable[[str], None]


def prepare(
    source: Source, folder: Path, settings: PrepareSettings, *, max_bad: float = 0.01, num_workers: int = 1, say: Say = print
) -> Manifest:
    """Checks every image of `source` and writes the shards, their indexes and the manifest into `folder`.

    Images that cannot be decoded are set aside; when they are more than the share `max_bad` of all, DataError is raised.
    Finished shards of an earlier, interrupted run of the same plan are kept. `num_workers` 0: in this process.
    Raises DataError for a source that cannot be meant and for a folder that holds something else.
    """
    _refuse_overlap(source, folder)
    with open_workspace(folder) as workspace:
        fingerprint = source.fingerprint()
        known = workspace.claim(fingerprint, settings)
        if known and workspace.is_complete:
            return already_complete(workspace, say)
        workspace.remove_leftovers()
        make_folders(workspace.scratch)
        say(f"Reading {' and '.join(str(path) for path in source.paths)} …")
        plan = make_plan(_list(source, workspace), settings, " and ".join(str(path) for path in source.paths))
        for line in _describe(plan, settings):
            say(line)
        workspace.begin(fingerprint, settings.as_json())
        started = time.monotonic()
        results = _write_shards(plan, workspace, settings, max_bad, num_workers, say)
        manifest = _write_manifest(plan, workspace, settings, pixels_text(source.pixels, settings), results)
        workspace.complete()
        _report(plan, manifest, results, time.monotonic() - started, say)
        return manifest


def _list(source: Source, workspace: Workspace) -> Listing | Layout:
    """The images of the source; shows progress, since large or compressed tars take long."""
    size = sum(path.stat().st_size for path in source.paths if path.is_file())
    progress = Progress(size, name="MB", scale=1e6)
    try:
        return source.listing(workspace.scratch, progress.add)
    finally:
        progress.close(only_if_printed=True)


def _refuse_overlap(source: Source, folder: Path) -> None:
    for path in source.paths:
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise DataError(f"{folder} lies inside {path}, which it is made from; name a folder elsewhere.")


def already_complete(workspace: Workspace, say: Say) -> Manifest:
    """The manifest of a folder that is complete. Raises DataError if a shard is missing or of another size."""
    manifest = load_manifest(workspace.folder)
    for shards in manifest.splits.values():
        for shard in shards:
            check_shard(workspace.folder, shard, "size")
    workspace.complete()
    say(f"{workspace.folder} already holds this very set ({_sizes(manifest)}); nothing to do.")
    return manifest


def _describe(plan: SetPlan, settings: PrepareSettings) -> list[str]:
    lines = [f"{settings.name}: {plan.num_images} images, {len(plan.classes)} classes, {len(plan.shards)} shards."]
    if plan.splits_from == "drawn":
        lines.append(f"Splits: a test split of {settings.test_share:.0%} of every class is drawn with seed {settings.seed}.")
    if len(plan.classes) == 1:
        lines.append(
            f"All images are of one class, {plan.classes[0]}: no accuracy can be measured with them. Class folders are "
            "expected directly in the folder that is named, or in train/ and test/."
        )
    return lines + list(plan.notes)


def _write_shards(
    plan: SetPlan, workspace: Workspace, settings: PrepareSettings, max_bad: float, num_workers: int, say: Say
) -> list[ShardResult]:
    """All results, in the order of the plan. Raises DataError when too many images are bad."""
    results = workspace.finished()
    remaining = [shard for shard in plan.shards if shard.name not in results]
    if results:
        say(f"{len(results)} of {len(plan.shards)} shards were finished before and are kept.")
    tasks = [
        ShardTask(shard, workspace.temporary(shard.name), workspace.temporary(shard.name + ".index.npy"), settings)
        for shard in remaining
    ]
    progress = Progress(plan.num_images, done=plan.num_images - sum(len(shard.samples) for shard in remaining))
    try:
        _check_bad(plan, workspace, results, max_bad)
        with closing(run_tasks(write_shard, tasks, num_workers, progress.add)) as finished:  # closing it ends the workers
            for result in finished:
                workspace.finish(result)
                results[result.plan_name] = result
                _check_bad(plan, workspace, results, max_bad)
    finally:
        progress.close()
    return [results[shard.name] for shard in plan.shards]


def _check_bad(plan: SetPlan, workspace: Workspace, results: dict[str, ShardResult], max_bad: float) -> None:
    bad = [image for result in results.values() for image in result.bad]
    if len(bad) > max_bad * plan.num_images:
        workspace.write_quarantine(bad)
        path, reason = min(bad)
        raise DataError(
            f"{len(bad)} of {plan.num_images} images are bad, more than --max-bad {max_bad:.3g} allows, such as {path} "
            f"({reason}); {workspace.folder / QUARANTINE} lists them. Fix or remove them, or allow more."
        )


def _write_manifest(
    plan: SetPlan, workspace: Workspace, settings: PrepareSettings, pixels: str, results: list[ShardResult]
) -> Manifest:
    splits = {
        split: tuple(
            result.shard for shard, result in zip(plan.shards, results, strict=True) if shard.split == split and result.shard
        )
        for split in dict.fromkeys(shard.split for shard in plan.shards)
    }
    for split, shards in splits.items():
        if not shards:
            raise DataError(f"the split {split} has no good image left; {workspace.folder / QUARANTINE} says why.")
    bad = [image for result in results for image in result.bad]
    workspace.write_quarantine(bad)
    preparation = {key: value for key, value in settings.as_json().items() if key not in ("name", "source", "licence")}
    if plan.splits_from != "drawn":
        preparation["test_share"] = None
    return write_manifest(
        workspace.folder,
        name=settings.name,
        source=settings.source,
        licence=settings.licence,
        classes=plan.classes,
        splits=splits,
        quarantined=len(bad),
        preparation={**preparation, "splits_from": plan.splits_from, "pixels": pixels},
    )


def _report(plan: SetPlan, manifest: Manifest, results: list[ShardResult], seconds: float, say: Say) -> None:
    bad = sorted(image for result in results for image in result.bad)
    if bad:
        say(f"{len(bad)} images were set aside; {manifest.folder / QUARANTINE} lists them:")
        for path, reason in bad[:10]:
            say(f"  {path}: {reason}")
    planned = {sample.label for shard in plan.shards for sample in shard.samples}
    for label, name in enumerate(manifest.classes):
        if label in planned and not any(counts[label] for counts in manifest.class_counts.values()):
            say(f"Every image of the class {name} was set aside; its label {label} is left unused.")
    unused = [name for label, name in enumerate(manifest.classes) if label not in planned]
    if unused:
        say(f"The source names {len(unused)} classes without any image, such as {unused[0]}; their labels are left unused.")
    size = f"{sum(shard.bytes for shards in manifest.splits.values() for shard in shards) / 1e6:.0f} MB"
    say(f"{manifest.folder}: {_sizes(manifest)}, {size}, written in {seconds:.0f} s. Digest {manifest.digest[:12]}.")


def _sizes(manifest: Manifest) -> str:
    return ", ".join(f"{split} {manifest.num_samples(split)}" for split in manifest.splits)
