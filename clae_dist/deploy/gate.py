"""gate.yaml: what a candidate must reach, alone and beside the champion.

metrics:
  linear/accuracy: {at_least: 60, falls_by_at_most: 0.5}
  calibration/ece: {at_most: 5, rises_by_at_most: 1}
  latency_ms: {at_most: 20}
"""

from __future__ import annotations

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
from clae_dist.deploy.encoder import load_encoder
from clae_dist.errors import ConfigError
from clae_dist.evaluation.stored import read_evaluation
from clae_dist.reading import ReadError, read_text
from clae_dist.runs.folder import RunFolder

LATENCY = "latency_ms"  # of one image on one thread of the CPU, here
_RULES = ("at_least", "at_most", "falls_by_at_most", "rises_by_at_most")
_REPEATS = 30
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
        if name == LATENCY and set(rules) != {"at_most"}:
            raise ConfigError(f"--gate {str(path)!r}: {LATENCY} is measured on this machine; give at_most alone.")
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
            known = ", ".join(sorted(candidate.metrics)) or "none"
            raise ConfigError(f"the gate names {name!r}, which the evaluation does not have; known: {known}.")
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
