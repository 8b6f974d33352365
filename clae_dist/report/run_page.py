"""`clae report`: one HTML file for a run, with its pictures beside it, and summary.json."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clae_dist import __version__, escape
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.manifest import Manifest
from clae_dist.data.shard_set import entries_of, open_shards
from clae_dist.data.urls import is_tar, scheme
from clae_dist.devices import local_device
from clae_dist.errors import ConfigError, DataError
from clae_dist.evaluation.evaluate import Say
from clae_dist.evaluation.interval import interval_text
from clae_dist.files import check_writable, remove, write_together
from clae_dist.page import data_uri, render
from clae_dist.report.attacked import AttackedImages, amplification, attack_images
from clae_dist.report.curves import CHARTS, Chart, draw_chart, missing_keys
from clae_dist.report.figures import Picture, ReportSection
from clae_dist.report.pictures import draw_neighbours, draw_triples, share_right
from clae_dist.report.record import RunRecord, number, read_record, summarise
from clae_dist.report.results import RESULT_PICTURES, result_sections, result_values
from clae_dist.runs.checkpoint import load_model
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.goodput import KINDS, MEANING
from clae_dist.runs.trust import NOTHING, OpenedRun, Permission, open_run

ADVERSARIAL, NEIGHBOURS = "adversarial", "neighbours"
PICTURES = (*(chart.name for chart in CHARTS), *RESULT_PICTURES, ADVERSARIAL, NEIGHBOURS)
ATTACK_BATCH = 256  # images in the pictures of the attack, each other's negatives
ATTACK_CURVES = "The attack"
CURVES = (
    ("Learning", "", ("loss", "knn", "grad_norm")),
    (
        ATTACK_CURVES,
        "Against the loss of the whole global batch, bounded by ε.",
        ("attack_loss", "delta", "wrong_sign_share"),
    ),
    (
        "The embedding space",
        "Positives should be near each other, negatives spread over the sphere; values of single steps.",
        ("cos_positive", "cos_negative", "alignment"),
    ),
    ("Schedule and speed", "", ("learning_rate", "speed", "shares")),
)


def write_report(run_dir: Path, say: Say = escape.say, shards: str = "", permission: Permission = NOTHING) -> Path:
    """Write summary.json, report/report.html and its PNGs into the run folder; return the path of the HTML file.

    Parts that the run does not have yet (metrics, an evaluation, a checkpoint, its shards) are named in the report.

    Args:
        shards: the location of the images, if they have moved.

    Raises: ConfigError without a run and for an untrusted run folder that leads elsewhere (runs/trust.py), StorageError if
        the report cannot be written; an earlier report is then unchanged.
    """
    started = time.perf_counter()
    opened = open_run(run_dir, permission)
    record = read_record(run_dir)
    for problem in record.ignored:
        say(problem)
    summary = summarise(record)
    folder = RunFolder(run_dir)
    for path in (run_dir, folder.report):
        check_writable(path)
    manifest = _manifest(opened, shards, say)
    sections = [
        *result_sections(record.evaluation),
        *_curves(record),
        _attack(record, manifest, say),
        _neighbours(record, manifest),
    ]
    pictures = {folder.report / f"{figure.name}.png": figure.png for section in sections for figure in section.figures}
    html = render("clae_dist", "run.html", **_values(record, summary, manifest, sections)).encode()
    summary_json = (json.dumps(summary, indent=2) + "\n").encode()
    path = folder.report_page
    write_together({**pictures, path: html, folder.summary_file: summary_json})
    remove({folder.report / f"{name}.png" for name in PICTURES} - pictures.keys())
    say(f"report: {path}, {path.stat().st_size / 1e6:.1f} MB, in {time.perf_counter() - started:.1f} s; summary.json beside it")
    return path


def _values(
    record: RunRecord, summary: dict[str, Any], manifest: Manifest | None, sections: list[ReportSection]
) -> dict[str, Any]:
    """The values in templates/run.html."""
    return {
        "title": f"{record.config.name} · {summary['method']}",
        "name": record.config.name,
        "method": summary["method"],
        "facts": _facts(record, summary, manifest),
        "sections": sections,
        "goodput": _goodput(record),
        "versions": _versions(record, summary),
        "settings": list(_settings(record.config_text)),
        "data_uri": data_uri,
        "interval_text": interval_text,
        "notes": list(_notes(record, summary)),
        **result_values(record, summary),
    }


def _manifest(opened: OpenedRun, shards: str, say: Say) -> Manifest | None:
    try:
        data = opened.to_read_images(shards).data
        data = replace(data, retries=min(1, data.retries))  # do not wait minutes for pictures
        if data.shards and is_tar(entry := entries_of(data.shards)[0]) and scheme(entry):
            raise DataError("the shards have no manifest and are remote, so all of them would be downloaded.")
        return open_shards(data) if data.shards else None
    except (DataError, ConfigError) as error:
        say(f"no pictures of images in the report: {error}")
        return None


def _ranks(world_size: object) -> str:
    return f"{world_size} rank{'' if world_size == 1 else 's'}"


def _facts(record: RunRecord, summary: dict[str, Any], manifest: Manifest | None) -> str:
    parts = [
        record.config.model.encoder,
        f"{manifest.name}, {manifest.num_samples(record.config.data.train_split):,} images" if manifest else "",
        f"{record.config.data.image_size} px",
        f"{record.config.train.epochs:g} epoch{'' if record.config.train.epochs == 1 else 's'}",
        f"batch {record.config.batch.global_size}" + (f" on {_ranks(summary['world_size'])}" if summary["world_size"] else ""),
    ]
    return " · ".join(part for part in parts if part)


def _notes(record: RunRecord, summary: dict[str, Any]) -> Iterator[str]:
    evaluation = record.evaluation or {}
    if record.metrics.images_seen is None:
        yield "This run has logged no metrics yet, so there are no curves."
    if record.evaluation is None:
        yield f"This run has not been evaluated yet: run clae evaluate {record.run_dir}."
    else:
        if (reason := evaluation.get("no_accuracies")) or not evaluation["results"]:
            yield f"There are no accuracies: {reason or 'the set has no labels or no test split'}."
        yield from evaluation.get("notes", [])
        if record.metrics.images_seen is not None and evaluation["images_seen"] != summary["images_seen"]:
            yield f"Evaluated after {evaluation['images_seen']:,} images; the log goes to {summary['images_seen']:,} images."


def _curves(record: RunRecord) -> Iterator[ReportSection]:
    """Sections of charts. The attack's is missing for a run that has none and has logged none of its keys."""
    if record.metrics.images_seen is None:
        return
    for title, lead, names in CURVES:
        charts = [chart for name in names for chart in CHARTS if chart.name == name]
        figures = [figure for chart in charts if (figure := draw_chart(record, chart)) is not None]
        if figures or record.config.method.uses_attack or title != ATTACK_CURVES:
            yield ReportSection(title, lead, tuple(figures), _absent(record, charts))


def _absent(record: RunRecord, charts: list[Chart]) -> str:
    missing = missing_keys(record, charts)
    if not missing:
        return ""
    alone = record.identity.get("world_size") == 1 and any("Wrong attack signs" in title for title in missing)
    reason = " (a single rank has no other rank’s negatives to miss)" if alone else ""
    return f"Not logged by this run: {', '.join(missing)}{reason}."


def _attack(record: RunRecord, manifest: Manifest | None, say: Say) -> ReportSection:
    title = "Clean, perturbation, adversarial"
    if manifest is None:
        return ReportSection(title, note="The shards of this run are not where config.yaml says, so no images can be shown.")
    try:
        config, model, info = load_model(record.run_dir)
    except ConfigError as error:
        return ReportSection(title, note=f"There is no trained model to attack: {error}")
    images = EvaluationSet(manifest, config.data.train_split, config.data.image_size, ATTACK_BATCH, config.seed)
    batch = images.images(images.ids).views
    attacked = attack_images(config, model.to(local_device()), batch)
    say(f"attack on {len(batch)} train images: loss {attacked.loss_before:.4f} → {attacked.loss_after:.4f}")
    alt = "Rows of clean images, their amplified perturbations and the adversarial images, which look like the clean ones."
    figure = Picture(ADVERSARIAL, draw_triples(attacked), *_attack_caption(attacked, info), alt, pixels=True)
    return ReportSection(title, figures=(figure,))


def _attack_caption(attacked: AttackedImages, info: dict[str, Any]) -> tuple[str, str]:
    attack = attacked.attack
    epsilon = f"{attack.epsilon * 255:.3g}/255" if attack.unit == "pixel" else f"{attack.epsilon:g} in normalised units"
    used = "the default attack, because this run has none" if attacked.borrowed else "the run’s own attack"
    title = f"Loss {attacked.loss_before:.3f} → {attacked.loss_after:.3f} with ε = {epsilon}"
    others = "; the attacked view is the mirrored image" if attacked.mirrored else ""
    return title, (
        f"After {info['images_seen']:,} images, {used}, on {len(attacked.clean)} unaugmented train images that are each "
        f"other’s negatives{others}. The middle row is the change, amplified {amplification(attacked)} times around grey."
    )


def _neighbours(record: RunRecord, manifest: Manifest | None) -> ReportSection:
    title, evaluation = "Nearest neighbours of test images", record.evaluation or {}
    queries = evaluation.get("neighbours")
    if not queries:
        return ReportSection(title, note="They come with an evaluation on a test split, which this run does not have yet.")
    if manifest is None or manifest.digest != evaluation["manifest_digest"]:
        return ReportSection(title, note="The evaluated images are not where config.yaml says, so they cannot be shown.")
    data = record.config.data
    train, test = (EvaluationSet(manifest, split, data.image_size) for split in (data.train_split, data.test_split))
    query_images = test.images([query["id"] for query in queries]).views
    neighbour_images = [train.images(query["neighbour_ids"]).views for query in queries]
    right, shown = share_right(queries)
    png = draw_neighbours(queries, query_images, neighbour_images, manifest.classes)
    verdict = f"{right} of the {shown} neighbours are of the right class" if shown else "This set has no classes"
    caption = (
        "Left: test images, drawn by the run’s seed, the first of each class before a second of any. Right: the nearest of the "
        "kNN’s bank by cosine, nearest first; a solid green frame marks the same class, a dotted orange one another."
    )
    alt = f"{len(queries)} test images, each with its nearest train images. {verdict}."
    return ReportSection(title, figures=(Picture(NEIGHBOURS, png, verdict, caption, alt, pixels=True),))


def _goodput(record: RunRecord) -> dict[str, Any] | None:
    if record.goodput is None:
        return None
    starts, shares = record.goodput.starts, record.goodput.shares
    return {
        "lead": f"Of {record.goodput.wall_s:,.0f} s since the first start, over {starts} start{'s' * (starts > 1)}.",
        "rows": [(kind, number(shares[kind], ".1f", " %"), MEANING[kind]) for kind in KINDS],
    }


def _versions(record: RunRecord, summary: dict[str, Any]) -> dict[str, Any]:
    identity, bad_samples = record.identity, summary["bad_samples"]
    backend, collectives = (identity.get(key, "–") for key in ("backend", "collectives"))
    replaced = f"{bad_samples}, replaced by others of their shards; see bad-samples.jsonl"
    return {
        "run folder": record.run_dir,
        "trained with clae-dist": identity.get("package_version", "–"),
        "git revision": identity.get("git_revision") or "–",
        **({"continues": f"{summary['parent']}, after its {identity['parent']['step']} steps"} if summary["parent"] else {}),
        "manifest digest": summary["manifest_digest"] or "–",
        "undecodable images": replaced if bad_samples else "none",
        **({"last end": _last_end(record)} if record.ends else {}),
        "backend": f"{backend} over {collectives}, {_ranks(identity.get('world_size', '–'))}",
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(identity["started"])) if "started" in identity else "–",
        "report written with": f"clae-dist {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def _last_end(record: RunRecord) -> str:
    """The last end, and how often each cause was that of an end."""
    causes = Counter(end.cause for end in record.ends)
    text = escape.shown(record.ends[-1].describe())
    return f"{text}; of {len(record.ends)} starts: " + ", ".join(f"{cause} {count}" for cause, count in causes.most_common())


def _settings(config_text: str) -> Iterator[tuple[str, str, str]]:
    """Key, value and origin of each line of a resolved config.yaml; the value of a section is empty."""
    for line in config_text.splitlines():
        setting, _, origin = line.partition("  # ")
        key, _, value = setting.partition(":")
        yield key.strip(), value.strip(), origin.strip()
