"""`clae report`: a run in one HTML file, with its pictures beside it, and summary.json."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clae_dist import __version__, escape
from clae_dist.config import ConfigError
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.manifest import DataError, Manifest
from clae_dist.data.shard_set import entries_of, open_shards
from clae_dist.data.urls import is_tar, scheme
from clae_dist.devices import local_device
from clae_dist.escape import in_html
from clae_dist.evaluation import page
from clae_dist.evaluation.accuracies import accuracy_table
from clae_dist.evaluation.attacked import Attacked, amplification, attack_images
from clae_dist.evaluation.curves import CHARTS, Chart, draw_chart, missing_keys
from clae_dist.evaluation.evaluate import Say
from clae_dist.evaluation.pictures import draw_neighbours, draw_triples, share_right
from clae_dist.evaluation.record import Record, number, read_record, summarise
from clae_dist.files import check_writable, remove, write_together
from clae_dist.runs.checkpoint import load_model
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.goodput import KINDS, MEANING
from clae_dist.runs.trust import NOTHING, OpenedRun, Permission, open_run

ADVERSARIAL, NEIGHBOURS = "adversarial", "neighbours"
PICTURES = (*(chart.name for chart in CHARTS), ADVERSARIAL, NEIGHBOURS)
ATTACK_BATCH = 256  # images that are each other's negatives in the pictures of the attack
SECTIONS = (
    ("Learning", "", ("loss", "knn", "grad_norm")),
    (
        "The attack",
        "One step against the loss of the whole global batch, bounded by ε.",
        ("attack_loss", "delta", "wrong_sign_share"),
    ),
    (
        "The embedding space",
        "Positives should be near each other, negatives spread over the sphere.",
        ("cos_positive", "cos_negative", "alignment"),
    ),
    ("Schedule and speed", "", ("learning_rate", "speed", "shares")),
)


def write_report(run_dir: Path, say: Say = escape.say, shards: str = "", permission: Permission = NOTHING) -> Path:
    """Writes summary.json, report/report.html and its PNGs into the run folder; returns the HTML file's path.

    What the run does not have yet (metrics, an evaluation, a checkpoint, its shards) is said in the report.
    `shards` is where its images are now, if they have moved. Raises ConfigError without a run, and for a folder that cannot be
    written safely (runs/trust.py); StorageError when the report cannot be written: then the one before is as it was.
    """
    started = time.perf_counter()
    opened = open_run(run_dir, permission)
    record = read_record(run_dir)
    for problem in record.ignored:
        say(problem)
    summary = summarise(record)
    folder = RunFolder(run_dir).report
    for path in (run_dir, folder):
        check_writable(path)
    album = _Album(folder)
    manifest = _manifest(opened, shards, say)
    body = [_title(record, summary, manifest), _results(record, summary)]
    body += [part for name, lead, names in SECTIONS for part in _curves(record, name, lead, names, album)]
    body += _attack_page(record, manifest, album, say)
    body += _neighbour_page(record, manifest, album)
    body += _goodput(record)
    body += _settings(record, summary)
    path = RunFolder(run_dir).report_page
    html = page.page(f"{record.config.name} · {summary['method']}", body).encode()
    summary_json = (json.dumps(summary, indent=2) + "\n").encode()
    write_together({**album.pictures, path: html, RunFolder(run_dir).summary_file: summary_json})
    remove({folder / f"{name}.png" for name in PICTURES} - album.pictures.keys())
    say(f"report: {path}, {path.stat().st_size / 1e6:.1f} MB, in {time.perf_counter() - started:.1f} s; summary.json beside it")
    return path


class _Album:
    """Pictures, to be kept as files beside the report: `pictures` holds their bytes by path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pictures: dict[Path, bytes] = {}

    def keep(self, name: str, png: bytes) -> bytes:
        self.pictures[self._folder / f"{name}.png"] = png
        return png


def _manifest(opened: OpenedRun, shards: str, say: Say) -> Manifest | None:
    try:
        data = opened.to_read_images(shards).data
        data = replace(data, retries=min(1, data.retries))  # pictures are not worth minutes
        if data.shards and is_tar(entry := entries_of(data.shards)[0]) and scheme(entry):
            raise DataError("the shards have no manifest and lie elsewhere, so that all of them would be fetched.")
        return open_shards(data) if data.shards else None
    except (DataError, ConfigError) as error:
        say(f"no pictures of images in the report: {error}")
        return None


def _title(record: Record, summary: dict[str, Any], manifest: Manifest | None) -> str:
    parts = [
        record.config.model.encoder,
        f"{manifest.name}, {manifest.num_samples(record.config.data.train_split):,} images" if manifest else "",
        f"{record.config.data.image_size} px",
        f"{record.config.train.epochs:g} epoch{'' if record.config.train.epochs == 1 else 's'}",
        f"batch {record.config.batch.global_size}" + (f" on {summary['world_size']} ranks" if summary["world_size"] else ""),
    ]
    method = in_html(summary["method"])
    line = in_html(" · ".join(part for part in parts if part))
    return f'<h1>{in_html(record.config.name)}<span class="tag {method}">{method}</span></h1>\n<p class="soft">{line}</p>'


def _results(record: Record, summary: dict[str, Any]) -> str:
    evaluation = record.evaluation or {}
    cards = [
        page.comparison_card("kNN", summary["knn_before"], summary["knn_after"]),
        page.comparison_card("Linear probe", summary["linear_before"], summary["linear_after"]),
        page.card(
            "Images per second", number(summary["images_per_s"]), f"{number(summary['wall_s'], ',.0f', ' s')} of training"
        ),
        page.card("Images seen", number(summary["images_seen"]), f"loss {number(summary['loss'], '.3f')} at the end"),
    ]
    parts = ['<div class="cards">\n' + "\n".join(cards) + "\n</div>"]
    if record.metrics.images_seen is None:
        parts.append(page.note("This run has logged no metrics yet, so there are no curves."))
    if record.evaluation is None:
        parts.append(page.note(f"This run has not been evaluated yet: clae evaluate {record.run_dir} does it."))
    elif summary["knn_after"] is None:
        reason = evaluation.get("no_accuracies") or "the set has no labels or no test split"
        parts.append(page.note(f"There are no accuracies: {in_html(reason)}."))
    else:
        parts += accuracy_table(evaluation, record.config.evaluation.knn_k)
        if record.metrics.images_seen is not None and evaluation["images_seen"] != summary["images_seen"]:
            later = f"{summary['images_seen']:,} images"
            parts.append(page.note(f"Evaluated after {evaluation['images_seen']:,} images; the log goes to {later}."))
    return "\n".join(parts)


def _curves(record: Record, name: str, lead: str, names: Iterable[str], album: _Album) -> list[str]:
    chosen = [chart for wanted in names for chart in CHARTS if chart.name == wanted]
    drawn = [(chart, png) for chart in chosen if (png := draw_chart(record, chart)) is not None]
    if record.metrics.images_seen is None or (not drawn and not record.attacked and name == "The attack"):
        return []
    figures = [page.picture(album.keep(chart.name, png), chart.title, chart.note) for chart, png in drawn]
    return [page.heading(name, lead), page.charts(figures), *_absent(record, chosen)]


def _absent(record: Record, chosen: list[Chart]) -> list[str]:
    missing = missing_keys(record, chosen)
    if not missing:
        return []
    alone = record.identity.get("world_size") == 1 and any("Wrong attack signs" in title for title in missing)
    reason = " (one rank alone has no other rank’s negatives to miss)" if alone else ""
    return [page.note(f"Not logged by this run: {', '.join(missing)}{reason}.")]


def _attack_page(record: Record, manifest: Manifest | None, album: _Album, say: Say) -> list[str]:
    title = page.heading("Clean, perturbation, adversarial")
    if manifest is None:
        return [title, page.note("The shards of this run are not where config.yaml says, so no images can be shown.")]
    try:
        config, model, info = load_model(record.run_dir)
    except ConfigError as error:
        return [title, page.note(f"There is no trained model to attack: {error}")]
    images = EvaluationSet(manifest, config.data.train_split, config.data.image_size, ATTACK_BATCH, config.seed)
    batch, *_ = images.images(images.ids)
    attacked = attack_images(config, model.to(local_device()), batch)
    say(f"attack on {len(batch)} train images: loss {attacked.loss_before:.4f} → {attacked.loss_after:.4f}")
    png = album.keep(ADVERSARIAL, draw_triples(attacked))
    return [title, page.picture(png, *_attack_caption(attacked, info), css="pixels")]


def _attack_caption(attacked: Attacked, info: dict[str, Any]) -> tuple[str, str]:
    attack = attacked.attack
    epsilon = f"{attack.epsilon * 255:.3g}/255" if attack.unit == "pixel" else f"{attack.epsilon:g} in normalised units"
    mine = "the default attack, because this run has none" if attacked.borrowed else "the run’s own attack"
    title = f"Loss {attacked.loss_before:.3f} → {attacked.loss_after:.3f} with ε = {epsilon}"
    others = "; the attacked view is the mirrored image" if attacked.mirrored else ""
    return title, (
        f"After {info['images_seen']:,} images, {mine}, on {len(attacked.clean)} unaugmented train images that are each "
        f"other’s negatives{others}. The middle row is the change, amplified {amplification(attacked)} times around grey."
    )


def _neighbour_page(record: Record, manifest: Manifest | None, album: _Album) -> list[str]:
    title = page.heading("Nearest neighbours of test images")
    found = (record.evaluation or {}).get("neighbours")
    if not found:
        return [title, page.note("They come with an evaluation on a test split, which this run does not have yet.")]
    if manifest is None or manifest.digest != (record.evaluation or {})["manifest_digest"]:
        return [title, page.note("The images that were evaluated are not where config.yaml says, so they cannot be shown.")]
    data = record.config.data
    train, test = (EvaluationSet(manifest, split, data.image_size) for split in (data.train_split, data.test_split))
    query_images, *_ = test.images([query["id"] for query in found])
    neighbour_images = [train.images(query["neighbour_ids"])[0] for query in found]
    right, shown = share_right(found)
    png = album.keep(NEIGHBOURS, draw_neighbours(found, query_images, neighbour_images, manifest.classes))
    verdict = f"{right} of the {shown} neighbours are of the right class" if shown else "this set has no classes"
    caption = (
        "Left: test images, drawn by the run’s seed, one a class before a second of any. Right: the nearest of the kNN’s bank "
        "by cosine, nearest first; green frames have the same class."
    )
    return [title, page.picture(png, verdict[0].upper() + verdict[1:], caption, css="pixels")]


def _goodput(record: Record) -> list[str]:
    if record.goodput is None:
        return []
    found = record.goodput
    lead = (
        f"Of {number(found.wall_s, ',.0f', ' s')} since the first start, over {found.starts} start{'s' * (found.starts > 1)}."
    )
    rows = [[kind, number(found.shares[kind], ".1f", " %"), MEANING[kind]] for kind in KINDS]
    return [
        page.heading("Where the time went", lead),
        page.table(rows, ["", "share of the wall time", "what it is"], numbers=False),
    ]


def _settings(record: Record, summary: dict[str, Any]) -> list[str]:
    identity = record.identity
    versions = {
        "run folder": record.run_dir,
        "trained with clae-dist": identity.get("package_version", "–"),
        "git revision": identity.get("git_revision") or "–",
        "manifest digest": summary["manifest_digest"] or "–",
        "images that could not be decoded": (
            f"{summary['bad_samples']}; others of their shards stood in, bad-samples.jsonl names them"
            if summary["bad_samples"]
            else "none"
        ),
        "backend": "{} over {}, {} ranks".format(*(identity.get(key, "–") for key in ("backend", "collectives", "world_size"))),
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(identity["started"])) if "started" in identity else "–",
        "report written with": f"clae-dist {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    return [
        page.heading("Versions"),
        page.definitions(versions),
        page.heading("Configuration", "Resolved: every value and where it comes from. What is not a default stands out."),
        page.configuration(record.config_text),
    ]
