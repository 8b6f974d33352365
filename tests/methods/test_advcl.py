"""AdvCL and A-InfoNCE: the high-pass view, the loss on four views, its attack, and what asymmetry changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clae_dist.config import Config, Objective
from clae_dist.contrast.interface import Moment
from clae_dist.errors import ConfigError
from clae_dist.methods.advcl import AdvClSettings, adapted, high_pass
from clae_dist.methods.rocl import RoclSettings
from tests.methods.attacked import PGD, TEMPERATURE, Tried, noise

BATCH = replace(PGD, statistics="untouched")  # batch statistics in the attack, as in its code


def test_high_and_low_frequencies_make_the_image() -> None:
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(high_pass(images, 0.0), images, rtol=0, atol=1e-12)
    assert high_pass(images, 23.0).abs().max() < 1e-12  # the farthest frequency is 16·√2
    high = high_pass(images, 8.0)
    assert high.mean((2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(high_pass(high, 8.0), high, rtol=0, atol=1e-12)
    assert high_pass(images - high, 8.0).abs().max() < 1e-12
    wave = torch.cos(2 * torch.pi * 9 * torch.arange(32, dtype=torch.float64) / 32).expand(1, 3, 32, 32)
    torch.testing.assert_close(high_pass(wave, 8.0), wave.clone(), rtol=0, atol=1e-12)
    assert high_pass(wave, 9.5).abs().max() < 1e-12


def four_views(rows: list[torch.Tensor]) -> torch.Tensor:
    """SupCon with one image a class: the mean over 4N anchors of minus the mean log-probability of the three positives."""
    z, count = torch.cat(rows), len(rows[0])
    s = (z @ z.T / TEMPERATURE).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    log_p = s.log_softmax(1)
    positives = [[log_p[k, (k + shift * count) % len(z)] for shift in (1, 2, 3)] for k in range(len(z))]
    return -torch.stack([torch.stack(three).mean() for three in positives]).mean()


def test_loss_and_gradient_are_supcons_at_its_scale() -> None:
    tried = Tried(AdvClSettings(radius=2.0), BATCH, "group")
    images = [tried.x, tried.y, high_pass(tried.third, 2.0), tried.attacked[0]]
    rows = [tried.model(view).detach().requires_grad_() for view in images]
    wanted = TEMPERATURE / 0.07 * four_views([rows[-1], *rows[:-1]])
    total = tried.step.total(tried.terms)
    torch.testing.assert_close(total, wanted, rtol=0, atol=1e-11)
    gradients = torch.autograd.grad(wanted, rows)
    total.backward()
    for embedding, gradient in zip(tried.step.embeddings, gradients, strict=True):
        torch.testing.assert_close(embedding.z.grad, gradient, rtol=0, atol=1e-11)
    assert [embedding.route for embedding in tried.step.embeddings] == ["clean", "clean", "clean", "adversarial"]


def test_the_weak_view_is_attacked_away_from_all_others() -> None:
    tried = Tried(AdvClSettings(radius=2.0), BATCH)
    tried.model.load_state_dict(tried.before)
    others = [tried.model(view).detach() for view in (tried.x, tried.y, high_pass(tried.third, 2.0))]
    at = (tried.third + PGD.epsilon * (2 * noise(2) - 1)).clamp(0, 1)
    for _ in range(PGD.steps):
        at = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(four_views([tried.model(at, "adversarial"), *others]), at)
        delta = (at - tried.third + PGD.step_size * gradient.sign()).clamp(-PGD.epsilon, PGD.epsilon)
        at = (tried.third + delta).clamp(0, 1)
    torch.testing.assert_close(tried.attacked[0], at.detach(), rtol=0, atol=1e-12)


def total_and_gradients(settings: AdvClSettings | RoclSettings) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tried = Tried(settings, BATCH, "group")
    total = tried.step.total(tried.terms)
    total.backward()
    return total.detach(), [embedding.z.grad for embedding in tried.step.embeddings if embedding.z.grad is not None]


def test_asymmetry_changes_no_value_and_half_of_the_gradient() -> None:
    plain, of_plain = total_and_gradients(AdvClSettings(radius=2.0))
    half, of_half = total_and_gradients(AdvClSettings(radius=2.0, asymmetry=0.5))
    _, of_other = total_and_gradients(AdvClSettings(radius=2.0, asymmetry=0.9))
    torch.testing.assert_close(half, plain, rtol=0, atol=1e-12)
    assert not torch.allclose(of_half[-1], of_plain[-1])
    assert not torch.allclose(of_half[-1], of_other[-1])


def test_rocl_is_the_symmetric_form_with_twice_the_weight() -> None:
    plain, of_plain = total_and_gradients(RoclSettings())
    _, low = total_and_gradients(RoclSettings(asymmetry=0.25))
    _, high = total_and_gradients(RoclSettings(asymmetry=0.75))
    for one, a, b in zip(of_plain, low, high, strict=True):
        torch.testing.assert_close(one, (a + b) / 2, rtol=0, atol=1e-12)
    assert RoclSettings().pairs.constant == {(u, v): 1 / 3 for u in range(3) for v in range(3) if u != v}
    without, _ = total_and_gradients(RoclSettings(adversarial_weight=0.0, regulariser=0.0))
    assert without < plain


@pytest.mark.parametrize(
    ("distance", "expected"), [(2.5, 0.2), (2.0, 0.2), (1.5, 0.3), (0.5, 0.5), (0.1, 0.5)], ids=lambda value: f"{value:g}"
)
def test_asymmetry_between_the_usual_and_the_least_distance(distance: float, expected: float) -> None:
    assert adapted(0.2, distance, usual=2.0, least=0.5) == pytest.approx(expected)


def test_adaptive_asymmetry_follows_the_distances_of_attacked_features() -> None:
    settings = AdvClSettings(radius=2.0, asymmetry=0.2, adaptive_epochs=1, min_distance=0.0)
    tried = Tried(settings, BATCH, "group")
    s, method, model = tried.step, tried.step.run.method, tried.model
    expected = (model.features(tried.attacked[0], "clean") - model.features(tried.third, "clean")).norm(dim=1).mean().detach()
    method.after_update(s)
    method.after_update(s)
    torch.testing.assert_close(s.state["distances"], torch.stack([2 * expected, 2 * torch.ones_like(expected)]))
    s.state["distances"][0] *= 2  # attacks now move features half as far as they usually did
    assert method._asymmetry(s, tried.attacked[0]) == 0.2  # type: ignore[attr-defined]
    s.moment = Moment(step=1)
    assert method._asymmetry(s, tried.attacked[0]) == pytest.approx(0.35)  # type: ignore[attr-defined]
    before = s.state["distances"].clone()
    method.after_update(s)
    assert torch.equal(s.state["distances"], before)


def test_adaptive_epochs_without_an_asymmetry_are_refused() -> None:
    with pytest.raises(ConfigError, match="method.adaptive_epochs is 3, but method.asymmetry is -1, which is AdvCL itself"):
        Config(method=AdvClSettings(adaptive_epochs=3))


def test_hard_negatives_only_with_a_share_of_the_class() -> None:
    assert RoclSettings().hard is None
    hard = AdvClSettings(tau_plus=0.1).pairs(-1.0).hard
    assert hard is not None
    assert (hard.beta, hard.tau_plus) == (1.0, 0.1)
    _, plain = total_and_gradients(AdvClSettings(radius=2.0))
    _, changed = total_and_gradients(AdvClSettings(radius=2.0, tau_plus=0.01))
    assert not torch.allclose(plain[1], changed[1])


@pytest.mark.parametrize("method", [AdvClSettings(), RoclSettings()])
def test_another_objective_is_refused(method: AdvClSettings) -> None:
    with pytest.raises(ConfigError, match=f"objective.name is 'uel', but method.name={method.name} has a loss of its own"):
        Config(method=method, objective=Objective("uel"))
