from __future__ import annotations

import math

import pytest
import torch

from clae_dist.evaluation import geometry
from clae_dist.evaluation.geometry import alignment, alpha_req, fit_power_law, rank_me, uniformity


def _normal(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _orthonormal(width: int) -> torch.Tensor:
    return torch.linalg.qr(_normal(width, width))[0]


def test_rank_of_orthogonal_columns_is_their_number() -> None:
    columns = torch.linalg.qr(_normal(100, 8))[0]
    assert rank_me(columns) == pytest.approx(8, abs=1e-4)  # 1e-7 is added to the shares
    assert rank_me(columns.float()) == pytest.approx(8, abs=1e-4)


def test_rank_of_rows_on_a_line_is_1() -> None:
    assert rank_me(_normal(100, 1) * _normal(1, 8)) == pytest.approx(1, abs=1e-4)


def test_rank_uses_singular_values_of_uncentred_rows() -> None:
    """Another definition takes their squares, of centred rows: a different number."""
    rows = 2 + _normal(50, 5) * torch.tensor([1.0, 2, 3, 4, 5])
    share = torch.linalg.svdvals(rows) / torch.linalg.svdvals(rows).sum()
    assert rank_me(rows) == pytest.approx(float((-(share * share.log()).sum()).exp()), abs=1e-4)


def test_rank_ignores_scale_rotation_and_duplicates() -> None:
    rows = _normal(60, 6) @ torch.diag(torch.arange(1.0, 7, dtype=torch.float64))
    for same in (17 * rows, rows @ _orthonormal(6), torch.cat([rows, rows])):
        assert rank_me(same) == pytest.approx(rank_me(rows))


def test_blocks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, other = _normal(60, 6), _normal(60, 6, 1)
    whole = (rank_me(rows), alpha_req(rows).alpha, alignment(rows, other), uniformity(rows))
    monkeypatch.setattr(geometry, "_ROWS", 7)
    monkeypatch.setattr(geometry, "_PAIR_ROWS", 3)
    assert (rank_me(rows), alpha_req(rows).alpha, alignment(rows, other), uniformity(rows)) == pytest.approx(whole)


def test_a_power_law_has_its_exponent() -> None:
    fit = fit_power_law(torch.arange(1, 201, dtype=torch.float64) ** -1.3)
    assert fit.alpha == pytest.approx(1.3)
    assert fit.r_squared == pytest.approx(1)
    assert fit_power_law(torch.arange(1, 21, dtype=torch.float64) ** -0.7).alpha == pytest.approx(0.7)  # fewer than 100


def test_the_power_law_is_that_of_the_centred_covariance() -> None:
    deviation = torch.arange(1, 121, dtype=torch.float64) ** -0.65
    rows = torch.linalg.qr(_normal(400, 120) - _normal(400, 120).mean(0))[0]
    rows = rows - rows.mean(0)
    rows = torch.linalg.qr(rows)[0] @ torch.diag(deviation) @ _orthonormal(120)
    assert alpha_req(rows + 100).alpha == pytest.approx(1.3, abs=1e-3)


def test_a_flat_spectrum_has_no_r_squared() -> None:
    flat = fit_power_law(torch.ones(50, dtype=torch.float64))
    assert flat.alpha == pytest.approx(0)
    assert math.isnan(flat.r_squared)
    assert math.isnan(fit_power_law(torch.ones(2, dtype=torch.float64)).alpha)


def test_collapse_has_alignment_and_uniformity_0() -> None:
    rows = torch.ones(20, 5, dtype=torch.float64)
    assert alignment(rows, 3 * rows) == 0
    assert uniformity(rows) == pytest.approx(0, abs=1e-12)


def test_alignment_and_uniformity_are_the_double_loops() -> None:
    a, b = torch.nn.functional.normalize(_normal(9, 4)), torch.nn.functional.normalize(_normal(9, 4, 1))
    assert alignment(5 * a, b) == pytest.approx(sum(float((p - q).square().sum()) for p, q in zip(a, b, strict=True)) / 9)
    total = sum(math.exp(-2 * float((a[i] - a[j]).square().sum())) for i in range(9) for j in range(9) if i != j)
    assert uniformity(7 * a) == pytest.approx(math.log(total / 72))


def test_uniformity_of_the_uniform_distribution() -> None:
    """On the circle the mean of exp(4 cos t - 4) is e^-4 times the Bessel function I₀(4)."""
    assert uniformity(_normal(4000, 2)) == pytest.approx(math.log(float(torch.special.i0(torch.tensor(4.0)))) - 4, abs=0.02)
