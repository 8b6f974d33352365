"""The report's table of accuracies: narrow enough for a phone, an interval below each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clae_dist.evaluation import page
from clae_dist.evaluation.interval import interval_text
from clae_dist.evaluation.record import number


def accuracy_table(evaluation: Mapping[str, Any], requested_k: int) -> list[str]:
    """HTML of the table and of what it is measured on. `requested_k` is evaluation.knn_k of the run."""

    def cell(key: str) -> page.Cell:
        return number(evaluation[key], ".2f", " %"), interval_text(evaluation.get(f"{key}_interval_percent"))

    chance = number(100 / evaluation["num_classes"], ".2f", " %")
    rows: list[list[page.Cell]] = [
        ["untrained encoder", cell("knn_before"), cell("linear_before")],
        ["after pretraining", cell("knn_after"), cell("linear_after")],
        ["chance", chance, chance],
    ]
    without = list((evaluation.get("unlabelled") or {}).values())  # of train, of test
    bank = f"{evaluation['bank_images'] - sum(without[:1]):,} train images"
    tested = f"all {evaluation['test_images']:,} test images"
    if any(without):
        tested = f"{evaluation['test_images'] - sum(without[1:]):,} test images with a label"
    k = evaluation["knn_k"]
    lead = (
        f"On {tested}, below each accuracy its 95 % interval in percent (Wilson; for the "
        f"choice of test images, not of the seed). Frozen features of the clean route: weighted kNN with K = {k}, "
        f"τ = {evaluation['knn_temperature']:g} in a bank of {bank}; logistic regression on the same, its penalty chosen on "
        "a tenth of them held out. The untrained encoder has the run’s own initial weights."
    )
    parts = [page.table(rows, ["", "kNN", "linear probe"]), page.paragraph(lead)]
    if k < requested_k:
        parts.append(page.note(f"evaluation.knn_k is {requested_k}; with a bank of {bank} kNN takes K = {k}, a third of it."))
    return parts
