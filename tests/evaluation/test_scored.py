from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from clae_dist.evaluation.features import Features
from clae_dist.evaluation.scored import scored

FeaturesOf = Callable[..., Features]


def test_labelled_images_with_classes_from_0_on(features_of: FeaturesOf) -> None:
    bank, queries = features_of(torch.eye(4), [7, -1, 10**12, 7]), features_of(torch.eye(3), [10**12, 5, -1])
    found = scored(bank, queries, "train", "test")
    assert (found.bank.labels_N.tolist(), found.bank.ids_N.tolist()) == ([1, 2, 1], [0, 2, 3])
    assert (found.queries.labels_N.tolist(), found.queries.ids_N.tolist()) == ([2, 0], [0, 1])
    assert torch.equal(found.bank.features_NF, torch.eye(4)[[0, 2, 3]])
    assert (found.num_classes, found.unlabelled, found.problem) == (3, (1, 1), "")
    assert found.notes == (
        "images of train without a label, skipped in the accuracies: 1 of 4",
        "images of test without a label, skipped in the accuracies: 1 of 3",
        "images of test whose class train does not have, so that they count as wrong: 1",
    )


def test_of_sets_that_are_labelled_in_full_nothing_is_said(features_of: FeaturesOf) -> None:
    whole = features_of(torch.eye(3), [0, 1, 2])
    found = scored(whole, whole, "train", "test")
    assert (found.bank.labels_N.tolist(), found.notes, found.problem) == ([0, 1, 2], (), "")


@pytest.mark.parametrize(
    ("bank", "queries", "problem"),
    [
        ([-1, -1], [0, 1], "no image of train has a label"),
        ([0, 1], [-1, -1], "no image of val has a label"),
        ([], [0], "no image of train has a label"),
        ([3, 3], [3, 3], "all labelled images of train are of one class, with which any encoder looks right"),
        ([3, -1], [0, 3], "all labelled images of train are of one class, with which any encoder looks right"),
        ([0, 1], [1, 1], ""),
    ],
)
def test_where_there_is_no_accuracy(features_of: FeaturesOf, bank: list[int], queries: list[int], problem: str) -> None:
    found = scored(*(features_of(torch.ones(len(labels), 2), labels) for labels in (bank, queries)), "train", "val")
    assert found.problem == problem
