"""Objectives against the double loops of tests/reference.py, properties of all of them, identities between them."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clae_dist.config import Objective
from clae_dist.contrast.distributed import Contrast, per_anchor_loss
from clae_dist.errors import ConfigError
from clae_dist.objectives import Dense, PerAnchor, PerPair, find, names
from clae_dist.objectives.dense import dense_loss
from clae_dist.objectives.form import Rows, dense_objective
from clae_dist.objectives.pairs import per_pair_loss
from clae_dist.world import World
from tests import reference

N, D = 6, 5


def unit_rows(seed: int, dtype: torch.dtype = torch.float64, count: int = N) -> torch.Tensor:
    rows = torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1).to(dtype)


def loss_of(form: str, settings: Objective, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """On one rank that has all rows, in either form."""
    rows, objective = (Rows(a, a), Rows(b, b)), find(settings.name)
    if form == "dense":
        return dense_loss(objective, *rows, 0, settings)
    if isinstance(objective, PerPair):
        return per_pair_loss(objective, *rows, 0, settings)
    assert isinstance(objective, PerAnchor)
    return per_anchor_loss(objective, *rows, 0, settings, None)


# Objectives of the form Dense do not go through the matrix in chunks.
IN_CHUNKS = [name for name in names() if not isinstance(find(name), Dense)]
FORMS = [*(("dense", name) for name in names()), *(("log_sum_exp", name) for name in IN_CHUNKS)]
every = pytest.mark.parametrize(("form", "name"), FORMS)
in_chunks = pytest.mark.parametrize("name", IN_CHUNKS)


@every
@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_value_and_gradient_equal_the_double_loop(form: str, name: str, temperature: float, chunk: int) -> None:
    a, b = unit_rows(0).requires_grad_(), unit_rows(1).requires_grad_()
    settings = reference.settings_of(name, temperature, chunk=chunk)
    fast, slow = loss_of(form, settings, a, b), reference.OBJECTIVES[name](a, b, settings)
    tight = 1e-12 / temperature  # float64: only the order of summation differs
    assert abs(fast - slow) < tight
    for got, expected in zip(torch.autograd.grad(fast, (a, b)), torch.autograd.grad(slow, (a, b)), strict=True):
        torch.testing.assert_close(got, expected, atol=tight, rtol=0)


@every
@pytest.mark.parametrize("constant", [0, 1])
def test_a_constant_view_does_not_change_the_other_views_gradient(form: str, name: str, constant: int) -> None:
    """In an attack the anchors are constants."""
    settings = reference.settings_of(name, 0.2)
    views = [unit_rows(0), unit_rows(1)]
    view = views[1 - constant].requires_grad_()
    (fast,) = torch.autograd.grad(loss_of(form, settings, *views), view)
    (slow,) = torch.autograd.grad(reference.OBJECTIVES[name](*views, settings), view)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", names())
def test_the_mean_over_ranks_is_the_loss_of_the_global_batch(name: str) -> None:
    """With positives of a later rank at the wrong offset the loss would stay near log N."""
    a, b = unit_rows(0), unit_rows(1)
    settings = reference.settings_of(name, 0.2)
    parts = [dense_loss(find(name), Rows(a[r : r + 2], a), Rows(b[r : r + 2], b), r, settings) for r in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), reference.OBJECTIVES[name](a, b, settings), atol=1e-12, rtol=0)


@every
def test_the_order_of_views_and_of_images_does_not_matter(form: str, name: str) -> None:
    a, b = unit_rows(0), unit_rows(1)
    settings, order = reference.settings_of(name, 0.2), torch.tensor([3, 1, 5, 0, 2, 4])
    loss = loss_of(form, settings, a, b)
    torch.testing.assert_close(loss, loss_of(form, settings, a[order], b[order]), atol=1e-12, rtol=0)
    objective = find(name)
    if isinstance(objective, PerAnchor) and objective.columns == "both views":
        torch.testing.assert_close(loss, loss_of(form, settings, b, a), atol=1e-12, rtol=0)


@every
def test_small_temperatures_and_bfloat16_stay_finite(form: str, name: str) -> None:
    a, b = (unit_rows(seed, torch.bfloat16, 64).requires_grad_() for seed in (0, 1))
    settings = reference.settings_of(name, 0.01, chunk=7)
    loss = loss_of(form, settings, a, b)
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    wide = [rows.detach().double().requires_grad_() for rows in (a, b)]
    expected = loss_of("dense", settings, *wide)
    torch.testing.assert_close(loss.double(), expected, atol=1e-3, rtol=1e-4)  # float32 sums over the same bfloat16 rows
    pairs = zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, wide), strict=True)
    for gradient, exact in pairs:
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - exact).norm() < 0.01 * exact.norm()  # bfloat16 has 8 bits


@in_chunks
def test_one_image_alone_has_no_nan(name: str) -> None:
    """Of objectives that are defined without negatives: their log-sum-exp is -inf."""
    if name not in ("nt_xent", "instance", "ifm", "uel"):
        return
    a, b = (unit_rows(seed, count=1).requires_grad_() for seed in (0, 1))
    loss = loss_of("log_sum_exp", reference.settings_of(name, 0.2), a, b)
    assert loss == 0
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(loss, (a, b)))


@in_chunks
def test_the_whole_similarity_matrix_never_exists(name: str) -> None:
    """No tensor of a step is larger than a chunk, or than all rows: memory does not grow with the square of the rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    rows, chunk = 512, 16
    a, b = (unit_rows(seed, torch.float32, rows).requires_grad_() for seed in (0, 1))
    with Largest() as largest:
        loss_of("log_sum_exp", reference.settings_of(name, 0.2, chunk=chunk), a, b).backward()
    objective = find(name)
    anchors = 2 * rows if isinstance(objective, PerAnchor) and objective.columns == "both views" else rows
    assert largest.elements == max(anchors * chunk, anchors * D)  # both views are anchors at once


# ---- identities between objectives ----


def same(one: Objective, other: Objective, tolerance: float = 1e-12) -> None:
    """Both have the same loss and gradients."""
    results = []
    for settings in (one, other):
        views = [unit_rows(seed).requires_grad_() for seed in (0, 1)]
        loss = loss_of("log_sum_exp", settings, *views)
        results.append([loss.detach(), *torch.autograd.grad(loss, views)])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=0)


def test_objectives_without_their_effect_are_nt_xent() -> None:
    nt_xent = Objective("nt_xent", 0.2)
    same(Objective("debiased", 0.2, tau_plus=0.0), nt_xent)
    same(Objective("hard", 0.2, tau_plus=0.0, beta=0.0), nt_xent)
    same(Objective("ifm", 0.2, margin=0.0), nt_xent)
    same(Objective("ifm", 0.2, mix=0.0), nt_xent)


@pytest.mark.parametrize("tau_plus", [0.02, 0.1])
def test_hard_without_concentration_is_debiased(tau_plus: float) -> None:
    same(Objective("hard", 0.2, tau_plus=tau_plus, beta=0.0), Objective("debiased", 0.2, tau_plus=tau_plus))


# ---- rows that are constants ----


def test_uel_has_the_gradient_of_the_paper() -> None:
    """dU_i/ds_ij = p_j (1 - W) + w_j for a negative and p (1 - W) - 1 for the positive; w = p / (1 - p), W its sum."""
    temperature, z = 0.3, torch.cat([unit_rows(0), unit_rows(1)])
    a, b = z[:N].clone().requires_grad_(), z[N:].clone().requires_grad_()
    s = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    p = s.softmax(1)
    positives = torch.arange(2 * N).roll(N)
    w = (p / (1 - p)).scatter(1, positives[:, None], 0.0)
    mass = 1 - w.sum(1, keepdim=True)
    slope = (p * mass + w).scatter_add(1, positives[:, None], torch.full((2 * N, 1), -1.0, dtype=z.dtype))
    wanted = slope @ z / (2 * N * temperature)
    found = torch.autograd.grad(loss_of("log_sum_exp", Objective("uel", temperature), a, b), (a, b))
    torch.testing.assert_close(torch.cat(found), wanted, atol=1e-12, rtol=0)


def test_uel_sends_no_gradient_to_other_rows() -> None:
    mine, everyone = unit_rows(0)[:2].clone().requires_grad_(), unit_rows(0).requires_grad_()
    rows = Rows(mine, everyone), Rows(unit_rows(1)[:2], unit_rows(1))
    for loss in (per_pair_loss, dense_loss):
        value = loss(find("uel"), *rows, 0, Objective("uel", 0.2))  # type: ignore[arg-type]
        found = torch.autograd.grad(value, (mine, everyone), allow_unused=True)
        assert found[0].abs().max() > 0.01
        assert found[1] is None


def per_anchor_losses(settings: Objective, pos: torch.Tensor, lse: torch.Tensor, num_negatives: int = 10) -> torch.Tensor:
    objective = find(settings.name)
    assert isinstance(objective, PerAnchor)
    return objective.function(pos, lse, num_negatives, settings)


def test_decoupled_and_ifm_are_functions_of_nt_xent() -> None:
    """Per anchor, with L that of nt_xent: decoupled = L + log(1 - exp -L); exp L_margin - 1 = exp(2 margin/τ) (exp L - 1)."""
    pos, lse = unit_rows(0).flatten() * 5, 1 + unit_rows(1).flatten()[:, None] * 5
    plain = per_anchor_losses(Objective("nt_xent", 0.2), pos, lse)
    decoupled = per_anchor_losses(Objective("decoupled", 0.2), pos, lse)
    torch.testing.assert_close(decoupled, plain + (-torch.expm1(-plain)).log(), atol=1e-12, rtol=0)
    modified = per_anchor_losses(Objective("ifm", 0.2, margin=0.15, mix=1.0), pos, lse)
    torch.testing.assert_close(modified.expm1(), math.exp(2 * 0.15 / 0.2) * plain.expm1(), atol=0, rtol=1e-12)


def test_hard_in_the_limit_sees_the_hardest_negative_alone() -> None:
    """As beta grows, the sum over negatives tends to n exp(max s)."""
    a, b = unit_rows(0), unit_rows(1)
    settings = Objective("hard", 0.2, tau_plus=0.0, beta=1e5)
    z = torch.cat([a, b])
    s = z @ z.T / 0.2
    pos = s[torch.arange(2 * N), torch.arange(2 * N).roll(N)]
    negatives = s.clone().fill_diagonal_(-math.inf)
    negatives[torch.arange(2 * N), torch.arange(2 * N).roll(N)] = -math.inf
    expected = (torch.logaddexp(pos, math.log(2 * N - 2) + negatives.amax(1)) - pos).mean()
    torch.testing.assert_close(loss_of("log_sum_exp", settings, a, b), expected, atol=1e-9, rtol=0)
    views = [unit_rows(seed, torch.float32).requires_grad_() for seed in (0, 1)]
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss_of("log_sum_exp", settings, *views), views))


@pytest.mark.parametrize("name", ["debiased", "hard"])
def test_where_the_correction_is_clamped_negatives_have_no_gradient(name: str) -> None:
    """Positives are so close that nearly all of the sum over negatives is attributed to them."""
    pos = torch.full((3,), 5.0, dtype=torch.float64, requires_grad=True)
    lse = torch.zeros(3, 2 if name == "hard" else 1, dtype=torch.float64, requires_grad=True)
    losses = per_anchor_losses(Objective(name, 0.2, tau_plus=0.5), pos, lse)
    torch.testing.assert_close(losses, torch.logaddexp(pos, math.log(10) - 1 / pos.new_tensor(0.2)) - pos)
    grad_pos, grad_lse = torch.autograd.grad(losses.sum(), (pos, lse))
    assert grad_lse.eq(0).all()
    assert grad_pos.isfinite().all()
    a = unit_rows(0)
    views = [a.clone().requires_grad_(), a.clone().requires_grad_()]  # identical views, all anchors clamped
    loss = loss_of("log_sum_exp", Objective(name, 0.05, tau_plus=0.5), *views)
    for gradient in torch.autograd.grad(loss, views):  # of the positive alone, along the row itself
        torch.testing.assert_close(gradient, (gradient * a).sum(1, keepdim=True) * a, atol=1e-12, rtol=0)


def test_a_wrongly_declared_sign_is_no_silent_error() -> None:
    """It makes the gradient NaN, and not merely wrong."""
    objective = replace(find("nt_xent"), signs=(-1,))
    a, b = unit_rows(0).requires_grad_(), unit_rows(1).requires_grad_()
    loss = per_anchor_loss(objective, Rows(a, a), Rows(b, b), 0, Objective(), None)  # type: ignore[arg-type]
    assert torch.autograd.grad(loss, a)[0].isnan().any()


# ---- names ----


def test_names_and_settings_that_no_objective_has() -> None:
    with pytest.raises(ConfigError, match=r"objective.name is 'nt_xnet'; expected one of .*\(did you mean nt_xent\?\)"):
        Objective("nt_xnet")
    with pytest.raises(ConfigError, match="objective.beta is 2.0; objective.name=nt_xent does not use it"):
        Objective("nt_xent", beta=2.0)
    with pytest.raises(ConfigError, match="objective.tau_plus is 1.0; use 0 or more and below 1"):
        Objective("debiased", tau_plus=1.0)
    with pytest.raises(ConfigError, match="cannot be imported"):
        find("no_such_package:objective")
    with pytest.raises(ConfigError, match="which is not an objective"):
        find("math:log")


@dense_objective()
def alignment(a: Rows, b: Rows, start: int, settings: Objective) -> torch.Tensor:
    """An objective of another form, for the next test."""
    return (a.mine - b.mine).square().sum(1).mean() + 0.1 * (a.all @ b.all.T).square().mean()


def test_an_objective_of_a_module_is_used_by_its_name() -> None:
    settings, world = Objective(f"{__name__}:alignment"), World.single("cpu")
    contrast = Contrast(settings, world)
    a, b = unit_rows(0), unit_rows(1)
    rows = contrast.rows(a), contrast.rows(b)
    torch.testing.assert_close(contrast(*rows), (a - b).square().sum(1).mean() + 0.1 * (a @ b.T).square().mean())
    with pytest.raises(ConfigError, match=r"objective.gather is 'log_sum_exp', but .* is a dense objective"):
        Contrast(replace(settings, gather="log_sum_exp"), world)
    per_anchor = Contrast(Objective("clae_dist.objectives.nt_xent:nt_xent"), world)
    assert torch.equal(per_anchor(*rows), Contrast(Objective("nt_xent"), world)(*rows))


def test_reading_settings_imports_no_torch() -> None:
    """The built-in objectives import it only while type checking."""
    code = (
        "import sys; from clae_dist.objectives import find, names; list(map(find, names())); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
