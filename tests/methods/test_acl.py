"""ACL: its three forms and its joint attack, against the paper's formulas and its authors' order of operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clae_dist.methods.acl import AclSettings
from tests.methods.attacked import PGD, N, Tried, noise, nt_xent


@pytest.mark.parametrize("clip_start", [True, False])
def test_both_views_are_attacked_together_in_evaluation_mode(clip_start: bool) -> None:
    attack = replace(PGD, epsilon=0.3, step_size=0.1, clip_start=clip_start)  # so large that clipping matters
    tried = Tried(AclSettings(), attack)
    images = torch.cat([tried.x, tried.y])
    at = images + attack.epsilon * (2 * torch.cat([noise(0), noise(1)]) - 1)
    if clip_start:
        at = at.clamp(0, 1)
    model = tried.as_before()
    for _ in range(attack.steps):
        at = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(nt_xent(*model(at, "adversarial").chunk(2)), at)
        delta = (at - images + attack.step_size * gradient.sign()).clamp(-attack.epsilon, attack.epsilon)
        at = (images + delta).clamp(0, 1)
    for found, wanted in zip(tried.attacked, at.chunk(2), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_the_attack_changes_no_statistics_and_the_step_both_routes() -> None:
    tried = Tried(AclSettings())
    changed = {name for name, value in tried.model.state_dict().items() if not torch.equal(value, tried.before[name])}
    assert {name.rpartition(".")[0] for name in changed} == {"encoder.norm.clean", "encoder.norm.adversarial"}
    counts = [
        norm.num_batches_tracked.item() for norm in (tried.model.encoder.norm.clean, tried.model.encoder.norm.adversarial)
    ]
    assert counts == [2, 2]  # a forward each of x and y, and none of the attack's


def test_the_dual_form_is_the_mean_of_both_losses() -> None:
    tried = Tried(AclSettings())
    model, (x_adv, y_adv) = tried.model, tried.attacked
    (half, clean), (other_half, adversarial) = tried.terms["clean"], tried.terms["adversarial"]
    assert half == other_half == 0.5
    torch.testing.assert_close(clean, nt_xent(model(tried.x), model(tried.y)), rtol=0, atol=1e-12)
    wanted = nt_xent(model(x_adv, "adversarial"), model(y_adv, "adversarial"))
    torch.testing.assert_close(adversarial, wanted, rtol=0, atol=1e-12)
    alone = Tried(AclSettings(form="adversarial"))
    assert list(alone.terms) == ["adversarial"]
    assert alone.terms["adversarial"][0] == 1
    torch.testing.assert_close(alone.terms["adversarial"][1], adversarial, rtol=0, atol=0)


def test_without_a_perturbation_and_with_one_route_all_forms_are_nt_xent() -> None:
    for form in ("dual", "adversarial", "mixed"):
        tried = Tried(AclSettings(form=form), replace(PGD, epsilon=0.0, step_size=0.1), "group")  # type: ignore[arg-type]
        total = sum(weight * loss for weight, loss in tried.terms.values())
        torch.testing.assert_close(total, nt_xent(tried.model(tried.x), tried.model(tried.y)), rtol=0, atol=1e-12)


def test_the_mixed_form_attacks_the_second_view_away_from_the_clean_first() -> None:
    tried = Tried(AclSettings(form="mixed"), replace(PGD, steps=1))
    (y_adv,) = tried.attacked
    model = tried.as_before()
    at = (tried.y + PGD.epsilon * (2 * noise(1) - 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent(model(tried.x).detach(), model(at, "adversarial")), at)
    delta = (at.detach() - tried.y + PGD.step_size * gradient.sign()).clamp(-PGD.epsilon, PGD.epsilon)
    torch.testing.assert_close(y_adv, (tried.y + delta).clamp(0, 1), rtol=0, atol=1e-12)


def test_swapped_views_swap_and_permuted_images_permute_the_perturbations() -> None:
    x_adv, y_adv = Tried(AclSettings()).attacked
    swapped = Tried(AclSettings(), swap=True).attacked
    torch.testing.assert_close(swapped, [y_adv, x_adv], rtol=0, atol=1e-12)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1)).tolist()
    permuted = Tried(AclSettings(), order=order).attacked
    torch.testing.assert_close(permuted, [x_adv[order], y_adv[order]], rtol=0, atol=1e-12)
