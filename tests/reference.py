"""References for tests: double loops in float64, written from the formulas of the papers.

# N rows of the global batch, D embedding width. Everything is on one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from clae_dist.config import Objective
from clae_dist.objectives import find

Loss = Callable[[torch.Tensor, torch.Tensor, Objective], torch.Tensor]
# Below it, a negative has nearly all the mass, and 1 - p has no digits left (and is floored).
LEAST_TEMPERATURE = {"uel": 0.05}
VALUES = {"tau_plus": 0.07, "beta": 0.8, "margin": 0.15, "mix": 0.3}  # not the defaults


def settings_of(name: str, temperature: float, **more: Any) -> Objective:
    """Settings of an objective in which everything that it uses differs from its default. Not below LEAST_TEMPERATURE."""
    temperature = max(temperature, LEAST_TEMPERATURE.get(name, 0.0))
    return Objective(name, temperature, **{key: VALUES[key] for key in find(name).uses}, **more)


def similarities(
    a_ND: torch.Tensor, b_ND: torch.Tensor, settings: Objective
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """For each of the 2N rows of [a; b]: s of its positive and of its 2N - 2 negatives; s(k, l) = z_k · z_l / temperature."""
    z = torch.cat([a_ND, b_ND])
    num_rows, num_images = len(z), len(a_ND)
    for k in range(num_rows):
        positive = (k + num_images) % num_rows
        negatives = [(z[k] * z[other]).sum() / settings.temperature for other in range(num_rows) if other not in (k, positive)]
        yield (z[k] * z[positive]).sum() / settings.temperature, negatives


def mean_over_anchors(loss: Callable[..., torch.Tensor]) -> Loss:
    """The mean over all 2N anchors of loss(s of the positive, list of s of the negatives, settings)."""

    def mean(a_ND: torch.Tensor, b_ND: torch.Tensor, settings: Objective) -> torch.Tensor:
        losses = [loss(positive, negatives, settings) for positive, negatives in similarities(a_ND, b_ND, settings)]
        return sum(losses, a_ND.new_zeros(())) / len(losses)

    return mean


def nt_xent(positive: torch.Tensor, negatives: list[torch.Tensor], settings: Objective) -> torch.Tensor:
    """-log [ exp s+ / (exp s+ + Σ exp s) ]."""
    denominator = torch.exp(positive)
    for s in negatives:
        denominator = denominator + torch.exp(s)
    return torch.log(denominator) - positive


def decoupled(positive: torch.Tensor, negatives: list[torch.Tensor], settings: Objective) -> torch.Tensor:
    """-s+ + log Σ exp s."""
    denominator = positive.new_zeros(())
    for s in negatives:
        denominator = denominator + torch.exp(s)
    return torch.log(denominator) - positive


def debiased(positive: torch.Tensor, negatives: list[torch.Tensor], settings: Objective) -> torch.Tensor:
    """-log [ P / (P + max{(R - tau_plus n P) / (1 - tau_plus), n exp(-1/temperature)}) ], R = Σ exp s."""
    total = positive.new_zeros(())
    for s in negatives:
        total = total + torch.exp(s)
    return _corrected(positive, total, len(negatives), settings)


def hard(positive: torch.Tensor, negatives: list[torch.Tensor], settings: Objective) -> torch.Tensor:
    """The same with R = n Σ exp((1 + beta) s) / Σ exp(beta s): each negative weighted by exp(beta s) over the mean of those."""
    weights = [torch.exp(settings.beta * s) for s in negatives]
    mean = sum(weights, positive.new_zeros(())) / len(weights)
    total = positive.new_zeros(())
    for s, weight in zip(negatives, weights, strict=True):
        total = total + weight / mean * torch.exp(s)
    return _corrected(positive, total, len(negatives), settings)


def _corrected(positive: torch.Tensor, total: torch.Tensor, num_negatives: int, settings: Objective) -> torch.Tensor:
    pos = torch.exp(positive)
    total = (total - settings.tau_plus * num_negatives * pos) / (1 - settings.tau_plus)
    least = num_negatives * math.exp(-1 / settings.temperature)
    if total < least:
        total = positive.new_tensor(least)
    return -torch.log(pos / (pos + total))


def ifm(positive: torch.Tensor, negatives: list[torch.Tensor], settings: Objective) -> torch.Tensor:
    """(1 - mix) L(s+, s) + mix L(s+ - margin/temperature, s + margin/temperature), L that of nt_xent."""
    shift = settings.margin / settings.temperature
    modified = nt_xent(positive - shift, [s + shift for s in negatives], settings)
    return (1 - settings.mix) * nt_xent(positive, negatives, settings) + settings.mix * modified


def instance(a_ND: torch.Tensor, b_ND: torch.Tensor, settings: Objective) -> torch.Tensor:
    """-1/N Σ_i log [ exp(a_i · b_i / temperature) / Σ_j exp(a_i · b_j / temperature) ]."""
    total = a_ND.new_zeros(())
    for i in range(len(a_ND)):
        columns = a_ND.new_zeros(())
        for j in range(len(b_ND)):
            columns = columns + torch.exp((a_ND[i] * b_ND[j]).sum() / settings.temperature)
        total = total - torch.log(torch.exp((a_ND[i] * b_ND[i]).sum() / settings.temperature) / columns)
    return total / len(a_ND)


def uel(a_ND: torch.Tensor, b_ND: torch.Tensor, settings: Objective) -> torch.Tensor:
    """-1/2N Σ_i [ log p_i,i* + Σ_j log(1 - p_ij) ]: j is neither i nor its positive i*; all rows but i are constants."""
    z, num_images = torch.cat([a_ND, b_ND]), len(a_ND)
    constant, total = z.detach(), a_ND.new_zeros(())
    for i in range(len(z)):
        positive = (i + num_images) % len(z)
        exps = {j: torch.exp((z[i] * constant[j]).sum() / settings.temperature) for j in range(len(z)) if j != i}
        mass = sum(exps.values(), a_ND.new_zeros(()))
        total = total - torch.log(exps[positive] / mass)
        for j in exps:
            if j != positive:  # 1 - p is the share of the others
                others = sum((exps[other] for other in exps if other != j), a_ND.new_zeros(()))
                total = total - torch.log(others / mass)
    return total / len(z)


OBJECTIVES: dict[str, Loss] = {
    "nt_xent": mean_over_anchors(nt_xent),
    "instance": instance,
    "decoupled": mean_over_anchors(decoupled),
    "debiased": mean_over_anchors(debiased),
    "hard": mean_over_anchors(hard),
    "ifm": mean_over_anchors(ifm),
    "uel": uel,
}


def batch_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Training-mode batch norm over all but the channel dimension."""
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean = x.mean(dims)
    variance = ((x - mean.view(shape)) ** 2).mean(dims)
    return (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + eps) * weight.view(shape) + bias.view(shape)


def embed(state: dict[str, torch.Tensor], images: torch.Tensor, route: str, mean: float, std: float) -> torch.Tensor:
    """The network of tests/networks.py (convolution, batch norm, ReLU, mean, Linear-ReLU-Linear, unit length)."""
    x = (images - mean) / std
    x = F.conv2d(x, state["encoder.conv.weight"], padding=1, stride=2)
    x = batch_norm(x, state[f"encoder.norm.{route}.weight"], state[f"encoder.norm.{route}.bias"])
    x = torch.relu(x).mean((2, 3))
    x = torch.relu(x @ state["projector.0.weight"].T + state["projector.0.bias"])
    x = x @ state["projector.2.weight"].T + state["projector.2.bias"]
    return x / x.norm(dim=1, keepdim=True)


def clae_loss_and_delta(
    state: dict[str, torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    epsilon: float,
    std: float,
    mean: float,
    temperature: float,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One CLAE step of the original: same-view anchor, ε in normalised units, no clipping. Returns loss and δ (in pixels)."""
    frozen = {name: value.detach() for name, value in state.items()}
    x_try = x.clone().requires_grad_()
    anchor = embed(frozen, x, "adversarial", mean, std)
    loss_of = OBJECTIVES["nt_xent"]
    objective = Objective(temperature=temperature)
    attack_loss = loss_of(anchor, embed(frozen, x_try, "adversarial", mean, std), objective)
    (gradient,) = torch.autograd.grad(attack_loss, x_try)
    delta = epsilon * std * gradient.sign()
    a, b = embed(state, x, "clean", mean, std), embed(state, y, "clean", mean, std)
    c = embed(state, x + delta, "adversarial", mean, std)
    return loss_of(a, b, objective) + alpha * loss_of(a, c, objective), delta
