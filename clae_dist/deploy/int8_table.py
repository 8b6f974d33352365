"""onnx-int8.json in words and as a table of README.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def int8_summary(report: Mapping[str, Any]) -> str:
    """One line for the console."""
    size = report["bytes"]["float32"] / report["bytes"]["int8"]
    one = {name: report["latency"][name]["1"]["p50_ms"] for name in ("float32", "int8")}
    words = f"{size:.1f} times smaller, {one['int8']:.2f} ms an image ({one['float32']:.2f} ms in float32)"
    if problem := report.get("no_accuracies"):
        return f"{words}; no accuracies: {problem}"
    linear = {name: report["linear"][name]["percent"] for name in ("float32", "old_head")}
    return (
        f"{words}; kNN agrees on {report['knn_agreement']['percent']:.1f} % of {report['images']['test']:,} images; the linear "
        f"classifier of float32 is right on {linear['old_head']:.1f} % ({linear['float32']:.1f} % in float32)"
    )


def int8_section(report: Mapping[str, Any]) -> str:
    """The section of README.md."""
    calibration, latency = report["calibration"], report["latency"]
    rows = [("size", *(f"{report['bytes'][name] / 1e6:.2f} MB" for name in ("float32", "int8")), "")]
    for batch in latency["int8"]:
        shown = [_milliseconds(latency[name][batch]) for name in ("float32", "int8")]
        rows.append((f"latency of {batch}, p50 (p95)", *shown, f"{latency['threads']} thread, onnxruntime"))
    cosine = report["cosine"]
    rows.append(("cosine of the features to float32's", "1", f"{cosine['mean']:.4f}", f"lowest {cosine['lowest']:.4f}"))
    if "knn" in report:
        rows.append(("kNN accuracy", *(_percent(report["knn"][name]) for name in ("float32", "int8")), ""))
        rows.append(("kNN: same class as float32", "", _percent(report["knn_agreement"]), ""))
        linear, ece = report["linear"], report["ece"]
        for head, words in (("old_head", "head of float32 features"), ("new_head", "head fitted again")):
            rows.append(("linear accuracy", _percent(linear["float32"]), _percent(linear[head]), words))
        for head, words in (("old_head", "head of float32 features"), ("new_head", "head fitted again")):
            rows.append(("calibration error", f"{ece['float32']:.2f} %", f"{ece[head]:.2f} %", words))
        for name, share in report["robust"].items():
            graph, epsilon = name.split(" ")
            if graph == "float32":
                other = report["robust"][f"int8 {epsilon}"]
                words = "clean, the attacked images" if epsilon == "0/255" else f"PGD within {epsilon} on float32"
                rows.append(("linear accuracy", _percent(share), _percent(other), words))
    table = "\n".join(f"| {' | '.join(row)} |" for row in (("", "float32", "int8", ""), ("---",) * 4, *rows))
    problem = f"\n\nNo accuracies: {report['no_accuracies']}." if "no_accuracies" in report else ""
    return f"""
## int8

`encoder-int8.onnx` takes and gives the same: {report["method"]}; calibrated with {calibration["images"]:,}
images of {calibration["split"]}. Measured on {report["images"]["test"]:,} images of {report["images"]["test_split"]}, with 95 %
intervals; `onnx-int8.json` has all numbers. Images of attacks are made on float32, as int8 hides gradients.

{table}{problem}
"""


def _milliseconds(times: Mapping[str, float]) -> str:
    return f"{times['p50_ms']:.2f} ({times['p95_ms']:.2f}) ms"


def _percent(share: Mapping[str, float]) -> str:
    return f"{share['percent']:.1f} % ({share['low']:.1f} – {share['high']:.1f})"
