from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans

from clae_dist.evaluation import learnability
from clae_dist.evaluation.learnability import (
    cluster_learnability,
    intrinsic_dimension,
    k_means,
    prequential_learnability,
)


def _normal(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def _blobs(count: int = 300, blobs: int = 10, width: int = 16) -> torch.Tensor:
    return 20 * torch.eye(width)[torch.arange(count) % blobs] + 0.1 * _normal(count, width)


def _inertia(rows: torch.Tensor, cluster: torch.Tensor) -> float:
    return sum(float((part - part.mean(0)).square().sum()) for k in cluster.unique() for part in [rows[cluster == k]])


def test_clusters_are_as_tight_as_scikit_learns() -> None:
    rows = _normal(600, 8).double()
    theirs = KMeans(20, n_init=1, random_state=0).fit(rows.numpy()).inertia_
    assert _inertia(rows, k_means(rows, 20)) < 1.05 * theirs


def test_lloyds_algorithm_ends_at_a_fixed_point() -> None:
    rows = _normal(200, 4).double()
    cluster = k_means(rows, 6)
    centres = torch.stack([rows[cluster == k].mean(0) for k in range(6)])
    assert torch.equal(torch.cdist(rows, centres).argmin(1), cluster)


def test_no_cluster_stays_empty() -> None:
    assert len(k_means(_blobs(60, 3), 12).unique()) == 12


@pytest.mark.parametrize("form", [cluster_learnability, prequential_learnability])
def test_far_apart_blobs_are_learnable(form: object) -> None:
    result = form(_blobs(), clusters=10)  # type: ignore[operator]
    least = 1 if form is cluster_learnability else 1 - 10 / 299  # the first of each blob has no neighbour in it
    assert result.mean >= least - 1e-9


@pytest.mark.parametrize("form", [cluster_learnability, prequential_learnability])
def test_noise_is_less_learnable_the_wider_it_is(form: object) -> None:
    accuracies = [form(_normal(900, width)).mean for width in (2, 8, 64)]  # type: ignore[operator]
    assert accuracies[0] > accuracies[1] > accuracies[2]
    assert accuracies[2] < 0.4


@pytest.mark.parametrize("form", [cluster_learnability, prequential_learnability])
def test_shuffled_clusters_are_chance(form: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(rows: torch.Tensor, k: int, seed: int) -> torch.Tensor:
        return torch.arange(len(rows))[torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))] % k

    monkeypatch.setattr(learnability, "k_means", shuffled)
    assert form(_normal(1000, 8), clusters=10).mean == pytest.approx(0.1, abs=0.03)  # type: ignore[operator]


def test_names_of_clusters_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _normal(300, 6)
    expected = cluster_learnability(rows)
    monkeypatch.setattr(learnability, "k_means", lambda *arguments: (k_means(*arguments) + 5) % 17)
    assert cluster_learnability(rows) == expected


def test_rotation_and_scale_do_not_matter() -> None:
    rows = _normal(400, 6).double()
    rotation = torch.linalg.qr(_normal(6, 6, 1).double())[0]
    assert cluster_learnability(3 * rows @ rotation).mean == pytest.approx(cluster_learnability(rows).mean, abs=0.01)
    assert cluster_learnability(3 * rows) == cluster_learnability(rows)


def test_the_validation_half_has_no_part_in_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters chosen by the accuracy that they give would make any representation learnable: they are made once."""
    calls = []

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return k_means(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(learnability, "k_means", counted)
    cluster_learnability(_normal(100, 4), splits=5)
    assert len(calls) == 1


def test_prequential_is_the_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _normal(40, 5)
    labels = torch.arange(40) % 3
    monkeypatch.setattr(learnability, "k_means", lambda *_: labels)
    place = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    order = place.argsort().tolist()
    unit = torch.nn.functional.normalize(rows, dim=1)
    right = 0
    for t in range(1, 40):
        neighbour = max(order[:t], key=lambda row: float(unit[row] @ unit[order[t]]))
        right += int(labels[neighbour] == labels[order[t]])
    assert prequential_learnability(rows, 3, orders=1).mean == pytest.approx(right / 39)


@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_the_dimension_of_a_flat_manifold(dimension: int) -> None:
    rows = _normal(1500, dimension).double() @ _normal(dimension, 30, 1).double()
    estimate = intrinsic_dimension(rows)
    assert 0.85 * dimension < estimate.likelihood < 1.15 * dimension  # n = 1,500; large dimensions come out too small
    assert 0.8 * dimension < estimate.slope < 1.15 * dimension
    assert estimate.rows == 1500


def test_duplicates_count_once() -> None:
    """A distance of 0 to the first neighbour would make the estimate 0 or infinite."""
    rows = _normal(300, 3)
    twice = intrinsic_dimension(torch.cat([rows, rows]))
    assert twice.likelihood == pytest.approx(intrinsic_dimension(rows).likelihood)
    assert twice.rows == 300
