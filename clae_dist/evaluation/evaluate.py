"""`clae evaluate`: encoders under evaluation protocols, on all ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clae_dist import __version__, escape
from clae_dist.data.draws import permutation
from clae_dist.data.shard_set import open_shards
from clae_dist.devices import tf32
from clae_dist.errors import ConfigError
from clae_dist.evaluation.classifier import with_head
from clae_dist.evaluation.examined import Examined, examined_run
from clae_dist.evaluation.features import Features
from clae_dist.evaluation.interval import interval_text
from clae_dist.evaluation.knn import nearest
from clae_dist.evaluation.place import Place, digest_of
from clae_dist.evaluation.protocol import FORMAT, EvaluationProtocol, Subject, headlines
from clae_dist.evaluation.scored import Scored, scored
from clae_dist.evaluation.stored import read_evaluation
from clae_dist.evaluation.suite import default_suite
from clae_dist.files import check_writable, write_atomically
from clae_dist.runs.checkpoint.safetensors_file import weights_digest
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.trust import NOTHING, Permission
from clae_dist.world import World

NUM_QUERIES, NUM_NEIGHBOURS = 8, 8  # in the report
_ROWS = 65_536  # of features in memory at once

Say = Callable[[str], None]


def evaluate_run(
    run_dir: Path,
    say: Say = escape.say,
    shards: str = "",
    permission: Permission = NOTHING,
    suite: Sequence[EvaluationProtocol] | None = None,
) -> dict[str, Any]:
    """`evaluate` of a run in this process, by default with kNN and linear probe.

    Raises: ConfigError without a checkpoint, and for settings of the run that `permission` does not cover (runs/trust.py),
        DataError for unusable shards, StorageError if the result cannot be written.
    """
    return evaluate(examined_run(run_dir, shards, permission), default_suite() if suite is None else suite, World.single(), say)


def evaluate(
    examined: Examined, suite: Sequence[EvaluationProtocol], world: World, say: Say = escape.say, *, fresh: bool = False
) -> dict[str, Any]:
    """Run the protocols on each encoder; write and return evaluation.json. Collective.

    All encoders see the same decoded pixels, with the same settings. The bank is the train split, or a subset of
    evaluation.train_images images that is the same for every run; the queries are the whole test split. Images without a
    label are skipped; protocols that use labels have no results for sets without labels or with a single class.

    An interrupted evaluation continues where it was. Unless `fresh`, results of the same encoders on the same images under the
    same settings are kept, and those of protocols that are not in the suite.

    Raises: ConfigError, DataError for unusable shards, StorageError if the result cannot be written.
    """
    started = time.perf_counter()
    say = say if world.is_main else _silent
    world.run_on_main(lambda: check_writable(examined.folder))  # before hours of work
    manifest = open_shards(examined.config.data, world, say)
    folder = RunFolder(examined.folder)
    place = Place(world, folder.evaluation, examined.config, manifest, say, fresh)
    say(f"evaluating {examined.title}, on {world.device.type}; {manifest.name} {manifest.digest[:12]}")
    for model in examined.encoders.values():
        model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = _about(examined, place)
    if examined.config.data.test_split in manifest.splits:
        earlier = {} if fresh else world.run_on_main(lambda: _earlier(folder.evaluation_file, result))
        with tf32(allowed=examined.config.train.tf32):
            _Evaluation(examined, place, suite, result, earlier).run()
    else:
        split = examined.config.data.test_split
        say(f"{manifest.where} has no {split!r} split: no accuracies. Prepare the set with one to get them.")
    result["wall_s"] = round(time.perf_counter() - started, 2)
    if world.is_main:
        _write(folder.evaluation_file, result)
    say(f"wrote {folder.evaluation_file} after {result['wall_s']:.0f} s")
    return result


def _silent(_: str) -> None: ...


def _write(path: Path, result: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())


def _about(examined: Examined, place: Place) -> dict[str, Any]:
    """evaluation.json without results."""
    manifest, data = place.manifest, examined.config.data
    return {
        "format": FORMAT,
        "results": {},
        "protocols": {},
        "details": {},
        "train_images": manifest.num_samples(data.train_split),
        "bank_images": 0,  # of those, the bank
        "test_images": manifest.num_samples(data.test_split) if data.test_split in manifest.splits else 0,
        "num_classes": len(manifest.classes),
        "images_seen": examined.images_seen,
        "step": examined.step,
        "weights": {when: weights_digest(model.state_dict()) for when, model in examined.encoders.items()},
        "manifest_digest": manifest.digest,
        "device": place.world.device.type,
        "neighbours": [],
    }


def _earlier(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation.json that is there, if it is of the same encoders and images; otherwise empty."""
    before = read_evaluation(path)[0] or {}
    same = all(before.get(key) == result[key] for key in ("weights", "manifest_digest", "images_seen"))
    return before if same else {}


class _Evaluation:
    """One call of `evaluate` on a set with a test split; fills in `result`."""

    def __init__(
        self,
        examined: Examined,
        place: Place,
        suite: Sequence[EvaluationProtocol],
        result: dict[str, Any],
        earlier: Mapping[str, Any],
    ) -> None:
        self.examined, self.place, self.suite, self.result, self.earlier = examined, place, suite, result, earlier
        self.config, self.world, self.say = examined.config, place.world, place.say

    def run(self) -> None:
        data, result = self.config.data, self.result
        banks = self._features(data.train_split, self.config.evaluation.train_images)
        tests = self._features(data.test_split)
        bank, test = banks["after"], tests["after"]
        result["bank_images"] = len(bank)
        result["neighbours"] = self.world.run_on_main(lambda: _neighbours(bank, test, self.config.seed))
        splits = (data.train_split, data.test_split)
        pairs = {when: scored(banks[when], tests[when], *splits) for when in self.examined.encoders}
        problem = self._say_labels(pairs["after"], splits)
        subjects = {
            when: self._subject(when, *((banks[when], tests[when]) if problem else (pair.bank, pair.queries)))
            for when, pair in pairs.items()
        }
        suite = [protocol for protocol in self.suite if not (problem and protocol.uses_labels)]
        reasons = {protocol.title: protocol.skipped(subjects["after"]) for protocol in suite}
        suite = [protocol for protocol in suite if not reasons[protocol.title]]
        notes = [protocol.note(subjects["after"]) for protocol in suite]
        result["notes"] = [f"{title} was skipped: {reason}" for title, reason in reasons.items() if reason]
        result["notes"] += [note for note in notes if note]
        for note in result["notes"]:
            self.say(note)
        self._keep_earlier({protocol.name for protocol in suite})
        for protocol in suite:
            self._run(protocol, subjects)

    def _features(self, split: str, limit: int = 0) -> dict[str, Features]:
        images, total = self.place.images(split, limit), self.place.manifest.num_samples(split)
        part = f" ({len(images):,} of {total:,})" if limit else ""
        found = self.place.features(self.examined.encoders, images, f"features, {split}{part}")
        for name, one in found.items():
            if not all(rows.isfinite().all() for rows in one.features_NF.split(_ROWS)):
                encoder = "untrained" if name == "before" else "trained"
                raise ConfigError(
                    f"the {encoder} encoder's features of {split} are NaN or infinite: no accuracy of them means anything. "
                    "Train with optim.clip_norm=1 or a lower optim.learning_rate."
                )
        missing = len(images) - len(found["after"])
        if missing:
            self.result.setdefault("undecodable", {})[split] = missing
            self.say(f"{missing} of {len(images):,} images of {split} cannot be decoded and were skipped.")
        return found

    def _say_labels(self, pair: Scored, splits: tuple[str, str]) -> str:
        """Report images without labels, and return the reason if there are no accuracies."""
        self.result["unlabelled"] = dict(zip(splits, pair.unlabelled, strict=True))
        for line in pair.notes:
            self.say(line)
        self.result["no_accuracies"] = pair.problem
        if pair.problem:
            self.say(f"no accuracies: {pair.problem}. Images get labels from class folders: python -m data_prep prepare")
        else:
            self.result["num_classes"] = pair.num_classes
        return pair.problem

    def _subject(self, when: str, bank: Features, queries: Features) -> Subject:
        config, model = self.config, self.examined.encoders[when]
        return Subject(bank, queries, config.evaluation, config.seed, self.world.device, when, model, self.place)

    def _keep_earlier(self, suite: set[str]) -> None:
        """Take over earlier results of protocols that are not asked for."""
        for name in self.earlier.get("results", {}):
            if name not in suite:
                self._take_over(name)

    def _take_over(self, name: str) -> None:
        for part in ("results", "protocols", "details"):
            if name in self.earlier.get(part, {}):
                self.result[part][name] = self.earlier[part][name]

    def _run(self, protocol: EvaluationProtocol, subjects: Mapping[str, Subject]) -> None:
        """Run a protocol on every encoder, unless the same results are there, and write what there is so far."""
        about = protocol.about(subjects["after"])
        about["key"] = digest_of({"about": about, "bank": self.result["bank_images"], "version": __version__})
        if self.earlier.get("protocols", {}).get(protocol.name) == about:
            self._take_over(protocol.name)
            self.say(f"{protocol.title}: the results of the same evaluation before are kept (--fresh computes them again)")
            return
        self.result["protocols"][protocol.name] = about
        results = self.result["results"].setdefault(protocol.name, {})
        for when, subject in subjects.items():
            started = time.perf_counter()
            subject = replace(subject, details={})
            for metric, value in self._metrics(protocol, subject).items():
                results.setdefault(metric, {})[when] = value
            if subject.details:
                self.result["details"].setdefault(protocol.name, {})[when] = subject.details
            headline = headlines(self.result["results"], protocol.name, protocol.unit)[when]
            wall_s = time.perf_counter() - started
            interval = f"95 % interval {interval_text(headline.interval)}; " if headline.interval else ""
            self.say(f"{protocol.title} {when} pretraining: {headline.text(2)} ({interval}{wall_s:.1f} s)")
        if self.world.is_main:
            _write(RunFolder(self.examined.folder).evaluation_file, self.result)

    def _metrics(self, protocol: EvaluationProtocol, subject: Subject) -> dict[str, float]:
        if protocol.uses_head:
            subject = with_head(subject)
        if protocol.collective:
            return protocol.run(subject)
        metrics: dict[str, float] = self.world.run_on_main(lambda: protocol.run(subject))
        return metrics


def _neighbours(bank: Features, test: Features, seed: int) -> list[dict[str, Any]]:
    """Ids and labels of a few test images and their nearest neighbours in the train split.

    The test images are drawn in a seeded order, the first image of each class before the second of any.
    """
    order = permutation(len(test), seed)
    seen: dict[int, int] = {}
    turns = []
    for row in order.tolist():
        label = int(test.labels_N[row])
        seen[label] = seen.get(label, 0) + 1
        turns.append(seen[label])
    chosen = [row for _, _, row in sorted(zip(turns, range(len(order)), order.tolist(), strict=True))][:NUM_QUERIES]
    near = nearest(test.features_NF[chosen], bank.features_NF, NUM_NEIGHBOURS)
    return [
        {
            "id": int(test.ids_N[row]),
            "label": int(test.labels_N[row]),
            "neighbour_ids": bank.ids_N[near.rows[q]].tolist(),
            "neighbour_labels": bank.labels_N[near.rows[q]].tolist(),
            "cosines": [round(cosine, 4) for cosine in near.cosines[q].tolist()],
        }
        for q, row in enumerate(chosen)
    ]
