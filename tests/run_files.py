"""Files of a run, damaged at random: their readers end with an error of ours or with values that can be used."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.checkpoints import write_checkpoint
from tests.mutations import Rng, mutate

MOST_S = 5.0  # one took 90 s
SETTINGS = ["name=fuzz", "data.shards=/none", "data.image_size=16", "model.encoder=small_resnet", "batch.global_size=32"]
STEP = {
    "step": 6,
    "alpha": 1.0,
    "learning_rate": 0.1,
    "problem": "the loss is NaN",
    "world_size": 2,
    "precision": "float32",
    "gradient_norms": {"a": float("nan")},
    "ranks": [{"rank": 0, "host": "h", "loss": {"loss": float("nan")}, "images": ["one", "two"]}],
}
EVALUATION = {
    "format": 2,
    "results": {"knn": {"accuracy": {"before": 50.0, "after": 50.0}, "accuracy_low": {"before": 40.0, "after": 40.0}}},
    "protocols": {"knn": {"title": "kNN", "description": "kNN with K = 7", "settings": {"k": 7}}},
    **dict.fromkeys(("images_seen", "train_images", "bank_images", "test_images", "step"), 7),
    "num_classes": 3,
    "manifest_digest": "d",
    "neighbours": [{"id": 1, "label": 0, "neighbour_ids": [1, 2], "neighbour_labels": [0, -1], "cosines": [1.0, 0.5]}],
}


def both(before: Any, after: Any) -> dict[str, Any]:
    """A value of the untrained and one of the pretrained encoder."""
    return {"before": before, "after": after}


def _accuracy(name: str, before: float, after: float) -> dict[str, dict[str, float]]:
    return {
        name: both(before, after),
        f"{name}_low": both(before - 2, after - 2),
        f"{name}_high": both(before + 2, after + 2),
    }


ROBUST_RESULTS = {
    **_accuracy("slf_autoattack", 2.0, 9.0),
    **_accuracy("slf_pgd", 3.0, 10.0),
    **_accuracy("slf_fgsm", 5.0, 14.0),
    **_accuracy("slf_pgd_at_16", 2.0, 4.0),
    **_accuracy("slf_pgd_at_2", 20.0, 31.0),
    **_accuracy("slf_clean", 30.0, 45.0),
    "slf_masked": both(0.0, 1.0),
}
BINS = {
    f"{prefix}{name}": values
    for prefix in ("", "scaled_")
    for name, values in {"images": [0, 40, 60.0], "confidence": [0, 0.5, 0.9], "accuracy": [0, 0.4, 0.95]}.items()
}
HISTOGRAM = {"far_knn_edges": [0.0, 0.5, 1.0], "far_knn_inside": [0.75, 0.25], "far_knn_outside": [0.1, 0.9]}
KINDS = {"fog": [50.0, 40.0], "jpeg": [60.0, 20.0]}
DETAILS: dict[str, Any] = {
    "calibration": both(BINS, BINS),
    "corruptions": both(KINDS, KINDS),
    "ood": both(HISTOGRAM, HISTOGRAM),
}
RESULTS: dict[str, Any] = {
    "robust": ROBUST_RESULTS,
    "calibration": {"ece": both(4.0, 2.0), "temperature": both(1.0, 1.25)},
    "corruptions": _accuracy("accuracy", 35.0, 41.0),
    "ood": {**_accuracy("far_knn_auroc", 55.0, 87.0)},
    "new": {"accuracy": both(12.5, 25.0), "layers": both(300.0, 12345.0)},
}


def evaluation(results: dict[str, Any] = RESULTS, details: dict[str, Any] = DETAILS) -> dict[str, Any]:
    """The content of an evaluation.json with these results."""
    settings = {"robust": {"epsilon": 8 / 255}}
    protocols = {
        name: {"title": f"<{name}> title", "description": f"a probe of {name} & more", "settings": settings.get(name, {})}
        for name in results
    }
    return {**EVALUATION, "results": results, "protocols": protocols, "details": details, "neighbours": []}


# Replacements of a value: of another type, too large, too deep, no Unicode, not finite.
STRANGE: tuple[Any, ...] = (None, -1, 10**30, 1.5, float("nan"), float("-inf"), 1e308, "", "\ud800", "\x1b[2J\n", [], {}, [[]])
STRANGE += ({"a": 1}, True, ["x"] * 9, 2**62, "9" * 5000, 0)
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{one}: &{one} [{','.join([f'*{before}'] * 9)}]\n" for before, one in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS: tuple[bytes, ...] = (
    b"",
    b"\0",
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"1" * 10_000,
    b"[1e999]",
    b'{"step": 1, "step": 2}',
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b"[" + b"[]," * 300_000 + b"[]]",
    LAUGHS.encode(),
    b"data: {mixture: {? [a]: 1}}",
    b"seed: " + b"9" * 400,
    b"train: {epochs: 1e400}",
    b"&a data: *a",
)


def make_run(folder: Path) -> None:
    from clae_dist.models import build_model
    from clae_dist.recipe import resolve, to_yaml

    config, origins = resolve(None, SETTINGS)
    (folder / "nonfinite" / "step-00000007").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config, origins))
    identity = {"package_version": "1", "git_revision": "", "manifest_digest": "d", "world_size": 2, "backend": "ddp"}
    (folder / "run.json").write_text(json.dumps({**identity, "collectives": "gloo", "run_key": "k", "started": 5.0}))
    lines = [{"images_seen": 32 * n, "loss": 1.0, "images_per_s": 5.0, "time_s": n, "bad_samples": 1.0} for n in range(9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = [
        {"event": "start", "at": 0.0},
        {"event": "resume", "at": 1.0, "step": 0, "spent": {"starting": 1.0}},
        {"event": "end", "at": 9.0, "step": 9, "spent": {"starting": 1.0, "training": 7.0, "data": 1.0}},
    ]
    (folder / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    (folder / "evaluation.json").write_text(json.dumps({**evaluation(), "neighbours": EVALUATION["neighbours"]}))
    (folder / "summary.json").write_text(json.dumps({"method": "CLAE", "loss": 1.0, "images_seen": 5, "results": {}}))
    (folder / "nonfinite" / "step-00000007" / "step.json").write_text(json.dumps(STEP))
    model = build_model(config)
    weights = {f"model/{name}": value for name, value in model.state_dict().items()}
    write_checkpoint(folder, 3, weights)
    write_checkpoint(folder, 6, {**weights, "optimizer/encoder.bn.weight/exp_avg": torch.zeros(16)})


def strange_value(rng: Rng, data: bytes) -> bytes:
    """One value of a JSON text, or of one of its lines, replaced by a strange one; the digest is made right again."""
    from clae_dist.runs.checkpoint.index import _digest

    lines = data.splitlines() if data.startswith((b'{"images_seen', b'{"event')) else [data]
    number = int(rng.integers(len(lines)))
    content = json.loads(lines[number])
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(content)
    node, key = places[int(rng.integers(len(places)))]
    if rng.random() < 0.1 and isinstance(node, dict):
        del node[key]
    else:
        node[key] = STRANGE[int(rng.integers(len(STRANGE)))]
    if "tensors" in content and "sha256" in content:
        del content["sha256"]
        content["sha256"] = _digest(content)
    lines[number] = json.dumps(content).encode()
    return b"\n".join(lines) + b"\n"


def read_everything(run: Path) -> int:
    """Every reader of a run's files; how many of them refused what is there."""
    from clae_dist.errors import ConfigError
    from clae_dist.evaluation.stored import read_summary
    from clae_dist.page import render
    from clae_dist.report.record import read_record, summarise, summary_table
    from clae_dist.report.result_pictures import DRAWINGS
    from clae_dist.report.results import protocol_results
    from clae_dist.report.run_page import _values
    from clae_dist.runs.checkpoint import load_model
    from clae_dist.runs.checkpoint.listing import say_checkpoints
    from clae_dist.training.replay import num_ranks, read_step

    def record() -> None:
        found = read_record(run)
        summary = summarise(found)
        json.dumps(summary, allow_nan=False)
        render("clae_dist", "run.html", **_values(found, summary, None, [])).encode()
        for result in protocol_results(found.evaluation):
            for drawing in DRAWINGS[result.name](result):
                assert drawing.alt

    def checkpoints() -> None:
        for as_json in (True, False):
            say_checkpoints(run, verify=True, as_json=as_json, say=lambda text: None)

    def step() -> None:
        config, wanted = read_step(run / "nonfinite" / "step-00000007", "")
        assert 0 < num_ranks(config, wanted) <= 1 << 20

    readers: tuple[Callable[[], Any], ...] = (
        record,
        checkpoints,
        step,
        lambda: summary_table(read_summary(run)),
        lambda: load_model(run),
    )
    refused = 0
    for reader in readers:
        try:
            reader()
        except ConfigError:
            refused += 1
    return refused


def damage(rng: np.random.Generator, folder: Path) -> str:
    """For `fuzz`: one file of a run is damaged, all of them are read, and the file is put right again."""
    run = folder / "run"
    if not run.exists():
        make_run(run)
        assert read_everything(run) == 0
    files = [path for path in sorted(run.rglob("*")) if path.suffix in (".json", ".jsonl", ".yaml")]
    path = files[int(rng.integers(len(files)))]
    before = path.read_bytes()
    draw = rng.random()
    if draw < 0.5 and path.suffix != ".yaml":
        data = strange_value(rng, before)
    else:
        data = mutate(rng, before) if draw < 0.8 else TEXTS[int(rng.integers(len(TEXTS)))]
    started = time.process_time()
    try:
        path.write_bytes(data)
        refused = read_everything(run)
    finally:
        path.write_bytes(before)
    assert time.process_time() - started < MOST_S, path
    return f"{path.name} {'refused' if refused else 'read'}"
