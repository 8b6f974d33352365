"""quarantine(): a new set without the images, or the labels, that lists call bad. The old set stays as it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from clae_dist.data.manifest import Manifest, check_shard, load_manifest, write_manifest
from clae_dist.errors import DataError
from clae_dist.progress import Progress
from data_prep.bad_images import BadImage, BadLists, read_lists
from data_prep.cut_shard import CutTask, cut_shard
from data_prep.pool import run_tasks
from data_prep.prepare import already_complete
from data_prep.settings import QuarantineSettings
from data_prep.workspace import QUARANTINE, Workspace, open_workspace
from data_prep.write import ShardResult

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Rows of one shard: reasons of those that are dropped, and those that lose their label."""

    drop: dict[int, str] = dataclasses.field(default_factory=dict)
    unlabel: set[int] = dataclasses.field(default_factory=set)


def quarantine(
    folder: Path,
    lists: Sequence[Path],
    to: Path,
    settings: QuarantineSettings,
    *,
    max_bad: float = 0.2,
    num_workers: int = 1,
    say: Say = print,
) -> Manifest:
    """Copy the set in `folder` to `to`, without the images that the lists call bad, and return its manifest.

    Run again after an interruption, it resumes. Raises DataError for lists that do not suit the set, for more bad images than
    the share `max_bad` of a split, and for a folder that holds something else.
    """
    if to.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{to} lies inside {folder}, which stays as it is; name a folder elsewhere.")
    source = load_manifest(folder)
    found = read_lists(lists, source, settings)
    cuts = _cuts(found.images, settings)
    _check_shares(source, cuts, max_bad)
    with open_workspace(to) as workspace:
        fingerprint = hashlib.sha256(json.dumps([source.digest, *found.sha256]).encode()).hexdigest()
        if workspace.claim(fingerprint, settings) and workspace.is_complete:
            return already_complete(workspace, say)
        workspace.remove_leftovers()
        for note in found.notes:
            say(note)
        workspace.begin(fingerprint, settings.as_json())
        results = _write_shards(source, cuts, workspace, num_workers, say)
        manifest = _write_manifest(source, found, cuts, settings, workspace, results)
        workspace.complete()
    _report(source, manifest, cuts, say)
    return manifest


def _cuts(images: Sequence[BadImage], settings: QuarantineSettings) -> dict[tuple[str, str], _Cut]:
    """By split and shard. An image that several lines name is dropped once, if any of them says so, for all their reasons."""
    cuts: dict[tuple[str, str], _Cut] = {}
    reasons: dict[tuple[str, str, int], set[str]] = {}
    for image in images:
        cut = cuts.setdefault((image.split, image.shard), _Cut())
        if settings.unlabel and image.kind == "suspect":
            cut.unlabel.add(image.row)
        else:
            reasons.setdefault((image.split, image.shard, image.row), set()).add(image.reason)
    for (split, shard, row), texts in reasons.items():
        cuts[split, shard].drop[row] = "; ".join(sorted(texts))
        cuts[split, shard].unlabel.discard(row)
    return cuts


def _check_shares(source: Manifest, cuts: dict[tuple[str, str], _Cut], max_bad: float) -> None:
    for split in source.splits:
        of_split = [cut for (other, _), cut in cuts.items() if other == split]
        dropped, unlabelled = sum(len(cut.drop) for cut in of_split), sum(len(cut.unlabel) for cut in of_split)
        images = source.num_samples(split)
        if dropped == images:
            raise DataError(
                f"the lists name every image of the split {split}: nothing would be left. Use fewer of their lines."
            )
        if dropped + unlabelled > max_bad * images:
            raise DataError(
                f"the lists name {dropped + unlabelled:,} of {images:,} images of the split {split} "
                f"({(dropped + unlabelled) / images:.0%}), more than --max-bad {max_bad:.3g} allows. Look at some; then "
                "allow more, or take fewer (of suspects with --below)."
            )


def _write_shards(
    source: Manifest, cuts: dict[tuple[str, str], _Cut], workspace: Workspace, num_workers: int, say: Say
) -> dict[str, ShardResult]:
    """The results of all shards by name."""
    results = workspace.finished()
    if results:
        say(f"{len(results)} of {sum(map(len, source.splits.values()))} shards were finished before and are kept.")
    tasks = []
    for split, shards in source.splits.items():
        for shard in (shard for shard in shards if shard.name not in results):
            check_shard(source.folder, shard, "size")
            cut = cuts.get((split, shard.name), _Cut())
            alone = dataclasses.replace(source, splits={split: (shard,)})
            tar, index = workspace.temporary(shard.name), workspace.temporary(shard.index_name)
            tasks.append(CutTask(alone, shard, tar, index, cut.drop, frozenset(cut.unlabel)))
    total = sum(map(source.num_samples, source.splits))
    progress = Progress(total, done=total - sum(task.shard.samples for task in tasks))
    try:
        with closing(run_tasks(cut_shard, tasks, num_workers, progress.add)) as finished:
            for result in finished:
                workspace.finish(result)
                results[result.plan_name] = result
    finally:
        progress.close()
    return results


def _write_manifest(
    source: Manifest,
    found: BadLists,
    cuts: dict[tuple[str, str], _Cut],
    settings: QuarantineSettings,
    workspace: Workspace,
    results: dict[str, ShardResult],
) -> Manifest:
    """The manifest names the set that this one comes from, the lists and what was done."""
    splits = {
        split: tuple(result.shard for shard in shards if (result := results[shard.name]).shard)
        for split, shards in source.splits.items()
    }
    bad = [image for result in results.values() for image in result.bad]
    workspace.write_quarantine(bad)
    done = {
        "of": source.digest,
        "lists": list(found.sha256),
        **settings.as_json(),
        "dropped": len(bad),
        "unlabelled": sum(len(cut.unlabel) for cut in cuts.values()),
    }
    before = {key: value for key, value in source.preparation.items() if key != "indexed"}  # these shards lie here
    return write_manifest(
        workspace.folder,
        name=source.name,
        source=source.source,
        licence=source.licence,
        classes=source.classes,
        splits=splits,
        quarantined=len(bad),
        preparation={**before, "quarantine": [*before.get("quarantine", []), done]},
    )


def _report(source: Manifest, manifest: Manifest, cuts: dict[tuple[str, str], _Cut], say: Say) -> None:
    for split, before in source.class_counts.items():
        for name, old, new in zip(source.classes, before, manifest.class_counts[split], strict=False):
            if old and not new:
                say(f"Every image of the class {name} in {split} was named; its label is left unused there.")
    unlabelled = sum(len(cut.unlabel) for cut in cuts.values())
    images = ", ".join(f"{split} {manifest.num_samples(split)}" for split in manifest.splits)
    if manifest.quarantined:
        say(f"{manifest.quarantined} images were dropped; {manifest.folder / QUARANTINE} lists them.")
    if unlabelled:
        say(f"{unlabelled} images lost their label and stay.")
    say(f"{manifest.folder}: {images} images. Digest {manifest.digest[:12]}, made from {source.digest[:12]}.")
