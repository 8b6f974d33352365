"""The mathematics once more, slow and plain: double loops in float64, written from the formulas of the paper.

# N rows of the global batch, D embedding width. Everything is on one process.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def nt_xent(a_ND: torch.Tensor, b_ND: torch.Tensor, temperature: float) -> torch.Tensor:
    """1/M Σ_k [ log Σ_{l≠k} exp s(k, l) − s(k, pos k) ] over the M = 2N rows of [a; b]; s(k, l) = z_k · z_l / τ."""
    z = torch.cat([a_ND, b_ND])
    num_rows, num_images = len(z), len(a_ND)
    total = z.new_zeros(())
    for k in range(num_rows):
        positive = (k + num_images) % num_rows
        others = z.new_zeros(())
        for other in range(num_rows):
            if other != k:
                others = others + torch.exp((z[k] * z[other]).sum() / temperature)
        total = total + torch.log(others) - (z[k] * z[positive]).sum() / temperature
    return total / num_rows


def instance(a_ND: torch.Tensor, b_ND: torch.Tensor, temperature: float) -> torch.Tensor:
    """−1/N Σ_i log [ exp(a_i · b_i / τ) / Σ_j exp(a_i · b_j / τ) ]."""
    total = a_ND.new_zeros(())
    for i in range(len(a_ND)):
        columns = a_ND.new_zeros(())
        for j in range(len(b_ND)):
            columns = columns + torch.exp((a_ND[i] * b_ND[j]).sum() / temperature)
        total = total - torch.log(torch.exp((a_ND[i] * b_ND[i]).sum() / temperature) / columns)
    return total / len(a_ND)


OBJECTIVES = {"nt_xent": nt_xent, "instance": instance}


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
    attack_loss = nt_xent(anchor, embed(frozen, x_try, "adversarial", mean, std), temperature)
    (gradient,) = torch.autograd.grad(attack_loss, x_try)
    delta = epsilon * std * gradient.sign()
    a, b = embed(state, x, "clean", mean, std), embed(state, y, "clean", mean, std)
    c = embed(state, x + delta, "adversarial", mean, std)
    return nt_xent(a, b, temperature) + alpha * nt_xent(a, c, temperature), delta
