"""DynACL: its schedule, its momentum encoder, and ACL as its limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clae_dist.config import Config, Model
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import pretrain_step
from clae_dist.errors import ConfigError
from clae_dist.methods.acl import AclSettings
from clae_dist.methods.dynacl import DynAclSettings
from tests import steps
from tests.methods.attacked import PGD, SIDE, N, Tried, noise, nt_xent

NAMES = ("encoder.norm.clean.running_mean", "encoder.norm.adversarial.running_mean")


def test_the_weight_is_a_function_of_the_epoch() -> None:
    settings = DynAclSettings()
    weights = [settings.adversarial_weight(epoch, 1000) for epoch in range(1000)]
    as_the_code = [min(1 + epoch // 50 * 50 / 1000 * 2 / 3, 2) for epoch in range(1, 1001)]  # which counts from 1
    assert weights == pytest.approx(as_the_code)
    assert weights[0] == 1
    assert weights[-1] == pytest.approx(1 + 2 / 3)
    assert DynAclSettings(shift=0.0).adversarial_weight(999, 1000) == 1
    assert DynAclSettings(shift=1.0, block_epochs=1).adversarial_weight(7, 4) == 2


def test_without_shift_and_momentum_it_is_acl() -> None:
    tried, acl = Tried(DynAclSettings(shift=0.0, momentum=0.0)), Tried(AclSettings())
    assert tried.terms.keys() == acl.terms.keys()
    for name, (weight, loss) in acl.terms.items():
        assert tried.terms[name][0] == weight
        assert torch.equal(tried.terms[name][1], loss)
    assert all(torch.equal(one, other) for one, other in zip(tried.attacked, acl.attacked, strict=True))


def after_a_step() -> Tried:
    """The second step: the momentum encoder differs from the encoder."""
    tried = Tried(DynAclSettings(momentum=0.9))
    pretrain_step(tried.step.run, (tried.x, tried.y), Moment())
    return tried


def test_the_second_views_are_attacked_through_the_momentum_encoder() -> None:
    tried = after_a_step()
    model, backend = tried.model, tried.backend
    online, keys = dict(backend.weights()), {**backend.weights(), **backend.key_weights()}
    assert not torch.equal(online["projector.0.weight"], keys["projector.0.weight"])
    views = [steps.images(5, N, SIDE), steps.images(6, N, SIDE)]
    step = type(tried.step)(tried.step.run, views, Moment(1))
    step.run.method.losses(step, *views)

    def embed(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model.eval(), weights, (images, "adversarial"))

    starts = torch.cat(views)
    at = (starts + PGD.epsilon * (2 * torch.cat([noise(0), noise(1)]) - 1)).clamp(0, 1)
    for _ in range(PGD.steps):
        at = at.detach().requires_grad_()
        first, second = at.chunk(2)
        (gradient,) = torch.autograd.grad(nt_xent(embed(online, first), embed(keys, second)), at)
        delta = (at - starts + PGD.step_size * gradient.sign()).clamp(-PGD.epsilon, PGD.epsilon)
        at = (starts + delta).clamp(0, 1)
    found = [one.found.images for one in step.attacks]
    torch.testing.assert_close(found, list(at.detach().chunk(2)), rtol=0, atol=1e-12)


def test_the_momentum_encoder_averages_parameters_and_has_statistics_of_its_own() -> None:
    tried = Tried(DynAclSettings(momentum=0.9))
    backend, step = tried.backend, tried.step
    weights, keys = backend.weights(), backend.key_weights()
    own = steps.images(1, N, SIDE)
    torch.testing.assert_close(tried.y, own, rtol=0, atol=0)
    pretrain_step(step.run, (tried.x, tried.y), Moment())
    after = backend.key_weights()
    for name, value in backend.weights().items():
        if name in dict(tried.model.named_parameters()):
            torch.testing.assert_close(after[name], 0.9 * keys[name] + 0.1 * value, rtol=0, atol=1e-13)
    with torch.no_grad():  # the statistics that one more forward of y leaves, with the weights of before
        hidden = torch.nn.functional.conv2d(
            (own - tried.model.mean) / tried.model.std, keys["encoder.conv.weight"], stride=2, padding=1
        )
    wanted = 0.9 * keys[NAMES[0]] + 0.1 * hidden.mean((0, 2, 3))
    torch.testing.assert_close(after[NAMES[0]], wanted, rtol=0, atol=1e-12)
    assert not torch.equal(after[NAMES[1]], keys[NAMES[1]])
    assert not torch.equal(after[NAMES[0]], backend.weights()[NAMES[0]])  # those are of x
    assert weights.keys() > after.keys() - {"mean", "std"}


def test_statistics_of_one_rank_are_refused() -> None:
    method = DynAclSettings()
    with pytest.raises(ConfigError, match="model.norm is 'local', but the momentum encoder of method.name=dynacl"):
        Config(method=method, model=Model(norm="local"))
    Config(method=replace(method, momentum=0.0), model=Model(norm="local"))
