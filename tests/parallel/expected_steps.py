"""The steps of step_kinds.py by plain autograd, in one process, on the global batch.

# N rows of the global batch, B = N / W a rank.
"""

from __future__ import annotations

import torch

from clae_dist.models.model import PretrainModel
from clae_dist.models.norms import Route, untouched_statistics
from clae_dist.parallel.optim import make_optimizer
from tests.parallel.step_kinds import ALPHA, EPSILON, Seen, Setup, blocks_model, chunk_rows, compare, gradient_of, images


def _expected_loss(model: PretrainModel, kind: str, number: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x_adv and the loss of the global batch."""
    x, y = images(2 * number), images(2 * number + 1)

    def embed(rows: torch.Tensor, route: Route) -> torch.Tensor:
        if not kind.startswith("chunked"):
            return model(rows, route)
        size = chunk_rows(world_size)
        together = rows.view(world_size, -1, size, *rows.shape[1:]).transpose(0, 1).flatten(1, 2)  # one chunk of every rank
        z = torch.stack([model(chunk, route) for chunk in together])
        return z.view(-1, world_size, size, z.shape[-1]).transpose(0, 1).reshape(len(rows), -1)

    def ascend(rows: torch.Tensor, route: Route, num_steps: int) -> torch.Tensor:
        anchor, x_try = None, rows
        with untouched_statistics(model):
            for _ in range(num_steps):
                x_try = x_try.detach().requires_grad_()
                z = embed(x_try, route)
                anchor = z.detach() if anchor is None else anchor
                (gradient,) = torch.autograd.grad(compare(anchor, z), x_try)
                x_try = x_try + EPSILON * gradient.sign()
        return x_try.detach()

    if kind == "plain":
        return x, compare(embed(x, "clean"), embed(y, "clean"))
    if kind == "fused":
        with untouched_statistics(model):
            y_try = y.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(compare(embed(x, "clean"), embed(y_try, "clean")), y_try)
        x_adv = y + EPSILON * gradient.sign()
    else:
        x_adv = ascend(x, "clean", 1) if kind == "shared" else ascend(x, "adversarial", 2)
    a, b, c = embed(x, "clean"), embed(y, "clean"), embed(x_adv, "adversarial")
    return x_adv, compare(a, b) + ALPHA * compare(a, c)


def expected_steps(setup: Setup, kinds: list[str], world_size: int) -> tuple[list[Seen], dict[str, torch.Tensor]]:
    """What the steps should do, and the state_dict after them. A route that is left out has a gradient of zero."""
    config = setup.config()
    model = blocks_model(setup.norm).double()
    optimizer = make_optimizer(config.optim, config.learning_rate(), model)
    seen = []
    for number, kind in enumerate(kinds):
        x_adv, loss = _expected_loss(model, kind, number, world_size)
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = {name: gradient_of(p).clone() for name, p in model.named_parameters()}
        limit = config.optim.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(Seen(x_adv, gradients, norm))
    return seen, {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert list(found) == list(wanted)
    return max((found[name].double() - wanted[name].double()).abs().max().item() for name in wanted)


def check_steps(found: list[list[Seen]], wanted: list[Seen], tolerance: float) -> None:
    """`found` of every rank: the attack's images are the global batch's, and every rank has the whole gradients."""
    for number, step in enumerate(wanted):
        x_adv = torch.cat([steps[number].x_adv for steps in found])
        assert (x_adv - step.x_adv).abs().max() < tolerance
        for steps in found:
            assert largest_difference(steps[number].gradients, step.gradients) < tolerance
            assert type(steps[number].norm) is torch.Tensor
            assert abs(steps[number].norm - step.norm) < tolerance
        assert max(grad.abs().max() for grad in step.gradients.values()) > 1e-3  # there is a gradient to compare
