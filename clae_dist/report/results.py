"""Results of an evaluation in the report: headlines, a table of every metric, pictures. No protocol is known by name here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from clae_dist.evaluation.interval import interval_text
from clae_dist.evaluation.protocol import WHEN, headlines
from clae_dist.report.figures import Picture, ReportSection, png
from clae_dist.report.record import RunRecord, number
from clae_dist.report.result_pictures import DRAWINGS, ProtocolResult

_MOST_PICTURES = 16  # of one protocol
RESULT_PICTURES = tuple(f"{name}-{n}" for name in DRAWINGS for n in range(1, _MOST_PICTURES + 1))
_NUM_CARDS = 4  # protocols with a card; all are in the table
_ENDS = ("_low", "_high")


def result_values(record: RunRecord, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Cards, the table of headlines and the tables of all metrics, for templates/run.html."""
    evaluation = record.evaluation or {}
    protocols = [one for one in _protocols(evaluation) if set(one["pair"]) == set(WHEN)]
    speed, wall_s = number(summary["images_per_s"]), number(summary["wall_s"], ",.0f", " s")
    loss = number(summary["loss"], ".3f")
    return {
        "protocols": protocols,
        "num_cards": _NUM_CARDS,
        "tables": list(_protocols(evaluation)),
        "route": record.config.evaluated_route,
        "chance": number(100 / evaluation["num_classes"], ".2f", " %") if evaluation.get("num_classes") else "–",
        "tested": _tested(evaluation) if protocols else "",
        "cards": [
            {"title": "Images per second", "value": speed, "below": f"{wall_s} of training"},
            {"title": "Images seen", "value": number(summary["images_seen"]), "below": f"loss {loss} at the end"},
        ],
    }


def _protocols(evaluation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    about, results = evaluation.get("protocols", {}), evaluation.get("results", {})
    for name, metrics in results.items():
        if name in about and metrics:
            pair = headlines(results, name, about[name].get("unit", "%"))
            texts = {key: about[name][key] for key in ("title", "description")}
            yield {"name": name, **texts, "pair": pair, "rows": list(_rows(metrics))}


def _rows(metrics: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Name, and value and interval before and after, of every metric that is not an end of another's interval."""
    ends = {name + end for name in metrics for end in _ENDS}
    for name, values in metrics.items():
        if name not in ends:
            low, high = (metrics.get(name + end, {}) for end in _ENDS)
            yield name.replace("_", " "), [_cell(values, low, high, when) for when in WHEN]


def _cell(values: Mapping[str, float], low: Mapping[str, float], high: Mapping[str, float], when: str) -> tuple[str, str]:
    if when not in values:
        return "–", ""
    interval = interval_text((low[when], high[when])) if when in low and when in high else ""
    return f"{values[when]:,.4g}" if abs(values[when]) < 1000 else f"{values[when]:,.0f}", interval


def _tested(evaluation: Mapping[str, Any]) -> str:
    """The test images of the accuracies, in words."""
    unlabelled = list((evaluation.get("unlabelled") or {}).values())  # of train, of test
    if any(unlabelled):
        return f"{evaluation['test_images'] - sum(unlabelled[1:]):,} test images with a label"
    return f"all {evaluation['test_images']:,} test images"


def protocol_results(evaluation: Mapping[str, Any] | None) -> Iterator[ProtocolResult]:
    """The results of the protocols that have pictures."""
    for protocol in _protocols(evaluation or {}):
        if evaluation and (name := protocol["name"]) in DRAWINGS:
            details = (evaluation.get("details") or {}).get(name, {})
            settings = evaluation["protocols"][name]["settings"]
            yield ProtocolResult(name, protocol["title"], evaluation["results"][name], details, settings)


def result_sections(evaluation: Mapping[str, Any] | None) -> Iterator[ReportSection]:
    """A section of pictures for each protocol that has some."""
    for result in protocol_results(evaluation):
        drawings = islice(DRAWINGS[result.name](result), _MOST_PICTURES)
        figures = tuple(
            Picture(f"{result.name}-{n}", png(one.figure), one.title, one.caption, one.alt) for n, one in enumerate(drawings, 1)
        )
        title = result.title[:1].upper() + result.title[1:]
        if figures:
            yield ReportSection(title, figures=figures)
        elif result.details:
            yield ReportSection(title, note="The values of its pictures in evaluation.json cannot be drawn; evaluate again.")
