"""Selection of the images of an accuracy: those with a label, if they have more than one class.

# N images of the bank, Q queries
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clae_dist.evaluation.features import Features


@dataclass(frozen=True)
class Scored:
    """The labelled images of two splits, with labels renumbered from 0 to `num_classes` - 1.

    `unlabelled` counts the skipped images of each split. `problem` is the reason if there is no accuracy, or "". `notes` are
    for the console.
    """

    bank: Features
    queries: Features
    num_classes: int
    unlabelled: tuple[int, int]
    problem: str
    notes: tuple[str, ...]


def scored(bank: Features, queries: Features, bank_name: str, queries_name: str) -> Scored:
    """Select the images for accuracies of `queries` given `bank`; the names are those of the splits."""
    names = (bank_name, queries_name)
    parts = [_labelled(part) for part in (bank, queries)]
    unlabelled = (len(bank) - len(parts[0]), len(queries) - len(parts[1]))
    totals = (len(bank), len(queries))
    notes = [
        f"images of {name} without a label, skipped in the accuracies: {count:,} of {total:,}"
        for name, count, total in zip(names, unlabelled, totals, strict=True)
        if 0 < count < total
    ]
    classes, labels = torch.unique(torch.cat([part.labels_N for part in parts]), return_inverse=True)
    bank_N, queries_Q = labels[: len(parts[0])], labels[len(parts[0]) :]
    unknown = int((~torch.isin(queries_Q, bank_N)).sum())
    if unknown and len(parts[0]):
        notes.append(
            f"images of {queries_name} whose class {bank_name} does not have, so that they count as wrong: {unknown:,}"
        )
    return Scored(
        Features(parts[0].features_NF, bank_N, parts[0].ids_N),
        Features(parts[1].features_NF, queries_Q, parts[1].ids_N),
        len(classes),
        unlabelled,
        _problem(parts, bank_N, names),
        tuple(notes),
    )


def _labelled(part: Features) -> Features:
    if part.labelled:
        return part
    rows = part.labels_N >= 0
    return Features(part.features_NF[rows], part.labels_N[rows], part.ids_N[rows])


def _problem(parts: list[Features], bank_N: torch.Tensor, names: tuple[str, str]) -> str:
    for part, name in zip(parts, names, strict=True):
        if not len(part):
            return f"no image of {name} has a label"
    if len(torch.unique(bank_N)) == 1:
        return f"all labelled images of {names[0]} are of one class, with which any encoder looks right"
    return ""
