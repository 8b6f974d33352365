"""Optimisers against their formulas, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from clae_dist.config import Batch, Config, Optim
from clae_dist.errors import ConfigError
from clae_dist.parallel.optim import learning_rate_at, make_optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()


def one_step(settings: Optim, rate: float) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Before, gradient and after of every parameter."""
    model = network()
    optimizer = make_optimizer(settings, rate, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (i + 1))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return {name: (before[name], grads[name], p.detach()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lars_adapts_weights_and_leaves_biases_and_norms(decay: float) -> None:
    """You et al. 2017: w -= lr · 0.001 · |w| / (|g| + decay · |w|) · (g + decay · w), with or without weight decay."""
    for name, (before, grad, after) in one_step(Optim(name="lars", weight_decay=decay), 0.3).items():
        if before.dim() > 1:
            trust = 0.001 * before.norm() / (grad.norm() + decay * before.norm())
            wanted = before - 0.3 * trust * (grad + decay * before)
        else:
            wanted = before - 0.3 * grad
        torch.testing.assert_close(after, wanted, atol=1e-8, rtol=0, msg=name)  # LARS adds 1e-8 below the ratio


@pytest.mark.parametrize(("decays", "excluded"), [("weights", True), ("all", False)])
def test_sgd_decays_what_it_should(decays: str, excluded: bool) -> None:
    settings = Optim(name="sgd", weight_decay=0.1, decay=decays)  # type: ignore[arg-type]
    for before, grad, after in one_step(settings, 0.5).values():
        decay = 0.0 if excluded and before.dim() == 1 else 0.1
        torch.testing.assert_close(after, before - 0.5 * (grad + decay * before))


@pytest.mark.parametrize("encoder", ["timm", "torchvision"])
def test_tokens_and_position_embeddings_are_not_decayed(encoder: str) -> None:
    """Of more than one dimension, yet no weights; with decay "all" they are decayed, too."""
    if encoder == "timm":
        tokens, network = {"cls_token", "pos_embed"}, make_vit()
    else:
        tokens, network = {"class_token", "encoder.pos_embedding"}, VisionTransformer(16, 8, 1, 2, 8, 16)
    model = nn.ModuleDict({"encoder": network})
    for decay, wanted in (("weights", {f"encoder.{name}" for name in tokens}), ("all", set())):
        optimizer = make_optimizer(Optim(name="adamw", weight_decay=0.1, decay=decay), 0.1, model)  # type: ignore[arg-type]
        plain = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
        assert {name for name, p in model.named_parameters() if id(p) in plain and p.dim() > 1} == wanted


def make_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer as TimmVit

    return TimmVit(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)


def test_adamw_s_first_step_is_the_sign() -> None:
    for before, grad, after in one_step(Optim(name="adamw", weight_decay=0.0), 0.01).values():
        torch.testing.assert_close(after, before - 0.01 * grad / (grad.abs() + 1e-8))


@pytest.mark.parametrize(("scaling", "wanted"), [("linear", 4.8), ("sqrt", 1.2), ("none", 0.3)])
def test_the_learning_rate_scales_with_the_global_batch(scaling: str, wanted: float) -> None:
    optim = Optim(learning_rate=0.3, scaling=scaling, reference_batch=256, warmup_epochs=1)  # type: ignore[arg-type]
    assert Config(batch=Batch(global_size=4096), optim=optim).learning_rate() == pytest.approx(wanted)


def test_warm_up_then_half_a_cosine() -> None:
    rates = [learning_rate_at(step, 110, 10, 2.0, "cosine") for step in range(111)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[110] == pytest.approx(0.0)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert learning_rate_at(100, 110, 10, 2.0, "constant") == 2.0


def test_a_schedule_in_steps() -> None:
    factors = {40: 0.05, 20: 0.1}  # in any order
    rates = [learning_rate_at(step, 60, 4, 2.0, "steps", factors) for step in (0, 4, 19, 20, 39, 40, 59)]
    assert rates == [0.5, 2.0, 2.0, 0.2, 0.2, 0.1, 0.1]
    with pytest.raises(ConfigError, match=r"optim.factors is \{\}; optim.schedule is steps: use factors with optim"):
        Optim(schedule="steps")
    with pytest.raises(ConfigError, match=r"optim.factors is \{'1': 0.1\}; optim.schedule is cosine"):
        Optim(factors={"1": 0.1})
    with pytest.raises(ConfigError, match="every key must be a number of epochs"):
        Optim(schedule="steps", factors={"half": 0.1})
