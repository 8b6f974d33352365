"""gate.yaml: what a candidate must reach, alone and beside the champion.

metrics:
  linear/accuracy: {at_least: 60, falls_by_at_most: 0.5}
  calibration/ece: {at_most: 5, rises_by_at_most: 1}
  latency_ms: {at_most: 20}
  onnx_difference: {at_most: 1e-4}
  int8/knn_agreement: {at_least: 97}
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from clae_dist import core_yaml
from clae_dist.deploy.encoder import Encoder, load_encoder
from clae_dist.deploy.layout import GRAPH, INT8_GRAPH, INT8_REPORT
from clae_dist.deploy.onnx_graph import CHECKED_IMAGES, Graph, check_weights, difference
from clae_dist.deploy.run_images import images_if_there, some_views
from clae_dist.errors import ConfigError
from clae_dist.evaluation.stored import read_evaluation
from clae_dist.reading import Check, ReadError, expect, is_number, is_text, read_object, read_text
from clae_dist.runs.folder import RunFolder

LATENCY = "latency_ms"  # of one image on one thread of the CPU, here
ONNX = "onnx_difference"  # of encoder.onnx from torch, on images of the run, as a share of the largest feature (or of 1)
_MEASURED = (LATENCY, ONNX)  # by `promote`, of the candidate alone
_RULES = ("at_least", "at_most", "falls_by_at_most", "rises_by_at_most")
_REPEATS = 30


def _has_numbers(*path: str) -> Check:
    """True for nested objects with a number at `path`."""

    def check(value: Any) -> bool:
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return is_number(value)

    return check


_INT8: dict[str, Check] = {
    "weights": is_text,
    "manifest_digest": is_text,
    "images": lambda value: isinstance(value, dict),
    "cosine": _has_numbers("mean"),
}
_INT8_ACCURACIES: dict[str, Check] = {
    "knn": _has_numbers("int8", "percent"),
    "knn_agreement": _has_numbers("percent"),
    "linear": _has_numbers("old_head", "percent"),
}
_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Facts:
    """The results of an encoder, by PROTOCOL/METRIC, and the settings and images that each is of."""

    metrics: Mapping[str, float]
    settings: Mapping[str, str]

    @staticmethod
    def of(stored: Mapping[str, Any]) -> Facts:
        """As a promotion stored them."""
        metrics, settings = stored.get("metrics"), stored.get("settings")
        return Facts(metrics if isinstance(metrics, dict) else {}, settings if isinstance(settings, dict) else {})


Gate = Mapping[str, Mapping[str, float]]


def read_gate(path: Path) -> Gate:
    """Raises ConfigError for a file without `metrics`, for unknown rules and for limits that are no numbers."""
    try:
        node = core_yaml.compose(read_text(path, _MAX_BYTES))
        content = core_yaml.construct(node) if node is not None else None
    except (OSError, ReadError, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--gate {str(path)!r} cannot be read ({error}).") from None
    metrics = content.get("metrics") if isinstance(content, dict) else None
    if not isinstance(content, dict) or set(content) != {"metrics"} or not isinstance(metrics, dict) or not metrics:
        example = "metrics: {knn/accuracy: {at_least: 60}}"
        raise ConfigError(f"--gate {str(path)!r} must have one key, metrics, with rules, such as `{example}`.")
    for name, rules in metrics.items():
        if not isinstance(rules, dict) or not rules or not set(rules) <= set(_RULES):
            raise ConfigError(f"--gate {str(path)!r}: {name} is {rules!r}; use one or more of {', '.join(_RULES)}.")
        for rule, limit in rules.items():
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not math.isfinite(limit):
                raise ConfigError(f"--gate {str(path)!r}: {name}: {rule} is {limit!r}; use a number.")
        if name in _MEASURED and set(rules) != {"at_most"}:
            raise ConfigError(f"--gate {str(path)!r}: {name} is measured on this machine; give at_most alone.")
    return metrics


def facts_of(run_dir: Path, export: Path, images_seen: int) -> Facts:
    """The results in RUN/evaluation.json. Raises ConfigError without them, or if they are of another checkpoint."""
    evaluation, problem = read_evaluation(RunFolder(run_dir).evaluation_file)
    if evaluation is None:
        missing = f"RUN is {str(run_dir)!r}, which has no evaluation.json; run `clae evaluate {run_dir}` first."
        raise ConfigError(problem or missing)
    if evaluation["images_seen"] != images_seen:
        raise ConfigError(
            f"{export} is of {images_seen:,} images seen and evaluation.json of {evaluation['images_seen']:,}; run "
            f"`clae evaluate {run_dir}` and `clae export {run_dir}` again."
        )
    metrics, settings = {}, {}
    for protocol, results in evaluation["results"].items():
        for name, values in results.items():
            if "after" in values and not name.endswith(("_low", "_high")):
                metrics[f"{protocol}/{name}"] = float(values["after"])
        key = evaluation["protocols"].get(protocol, {}).get("key", "")
        settings[protocol] = f"{evaluation['manifest_digest']} {key}"
    return Facts(metrics, settings)


def failures(gate: Gate, candidate: Facts, champion: Facts | None) -> list[str]:
    """The rules that the candidate breaks; [] lets it pass. Rules beside the champion hold where there is none.

    Raises ConfigError for a metric that the candidate or the champion does not have, or has with other settings.
    """
    found = []
    for name, rules in gate.items():
        if name not in candidate.metrics:
            known = ", ".join(sorted({*candidate.metrics, *_MEASURED}))
            raise ConfigError(
                f"the gate names {name!r}, which the evaluation does not have; known: {known}, and int8/… after `clae export "
                "RUN --format onnx-int8`."
            )
        value = candidate.metrics[name]
        for rule, limit in rules.items():
            if rule in ("at_least", "at_most"):
                broken, beside = value < limit if rule == "at_least" else value > limit, ""
            elif champion is None:
                continue
            else:
                before = _of_champion(name, candidate, champion)
                broken = before - value > limit if rule == "falls_by_at_most" else value - before > limit
                beside = f", the champion has {before:.4g}"
            if broken:
                found.append(f"{name} is {value:.4g}{beside}; the gate has {rule}: {limit:g}")
    return found


def _of_champion(name: str, candidate: Facts, champion: Facts) -> float:
    protocol = name.partition("/")[0]
    if name not in champion.metrics:
        raise ConfigError(
            f"the champion has no {name!r}; promote it again after it was evaluated, or remove the rule beside it."
        )
    if champion.settings.get(protocol) != candidate.settings.get(protocol):
        raise ConfigError(
            f"{name!r} of the champion is of other images or settings; evaluate both alike, and promote it again."
        )
    return champion.metrics[name]


def measured(gate: Gate, run_dir: Path, export: Path, encoder: Encoder) -> Facts:
    """The facts of the candidate that are not in evaluation.json, as far as the gate names them, or the export has them.

    Raises ConfigError for graphs of another encoder, and where the gate names a graph that the export does not have.
    """
    metrics: dict[str, float] = {LATENCY: latency_ms(export)} if LATENCY in gate else {}
    graphs = {path: Graph(path) for name in (GRAPH, INT8_GRAPH) if (path := export / name).exists()}
    for path, graph in graphs.items():
        check_weights(path, graph, encoder)
    if ONNX in gate:
        if export / GRAPH not in graphs:
            raise ConfigError(f"the gate names {ONNX}, and {export} has no {GRAPH}; `clae export {run_dir} --format onnx`.")
        views, _ = some_views(images_if_there(run_dir), CHECKED_IMAGES, encoder.image_size)
        distance = difference(graphs[export / GRAPH], encoder, views)
        metrics[ONNX] = distance if math.isfinite(distance) else math.inf
    return _with_int8(metrics, export / INT8_REPORT, encoder) if (export / INT8_REPORT).exists() else Facts(metrics, {})


def _with_int8(metrics: Mapping[str, float], path: Path, encoder: Encoder) -> Facts:
    """The metrics, and those of onnx-int8.json as int8/….  Raises ConfigError for a report of another encoder."""
    try:
        report = read_object(path)
        expect(report, _INT8 | (_INT8_ACCURACIES if "knn" in report else {}))
    except ReadError as error:
        raise ConfigError(f"{path} cannot be used ({error}); export again with --format onnx-int8.") from None
    if report["weights"] != encoder.weights_digest():
        raise ConfigError(f"{path} is of another encoder; export again with --format onnx-int8.")
    found = {"int8/cosine": report["cosine"]["mean"]}
    if "knn" in report:
        shares = {
            "knn_agreement": report["knn_agreement"],
            "knn": report["knn"]["int8"],
            "linear": report["linear"]["old_head"],
        }
        found |= {f"int8/{name}": share["percent"] for name, share in shares.items()}
    return Facts({**metrics, **found}, {"int8": f"{report['manifest_digest']} {json.dumps(report['images'], sort_keys=True)}"})


def latency_ms(export: Path) -> float:
    """Median milliseconds of the encoder for one image, on one thread of the CPU."""
    encoder = load_encoder(export)
    image = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    try:
        with torch.inference_mode():
            for _ in range(_REPEATS):
                start = time.perf_counter()
                encoder(image)
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1000 * statistics.median(times)
