"""One training step by the code that trains, on W ranks, and what a float64 double loop expects of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from clae_dist.config import Batch, Config, Data, Optim, Train
from clae_dist.contrast import distributed
from clae_dist.contrast.encoding import Update
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import TrainingStep, pretrain_step
from clae_dist.models import PretrainModel
from clae_dist.models.norms import untouched_statistics
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.world import World
from tests import reference, steps
from tests.networks import small_model

N, SIDE, TEMPERATURE, ALPHA = 12, 8, 0.2, 0.7
EPSILON = 0.03
TOLERANCE = 1e-10  # float64: only the order of summation differs
X, Y = steps.images(1, N, SIDE), steps.images(2, N, SIDE)
NOISE = torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@dataclass
class Found:
    """Loss, gradients and adversarial images of one rank in a step."""

    loss: torch.Tensor
    grads: dict[str, torch.Tensor]
    input_grad: torch.Tensor
    x_adv: torch.Tensor


class KeepsGradients(DdpBackend):
    """DDP that shows what it would step with."""

    def update(self, loss: torch.Tensor | None = None) -> Update:
        self.grads = self.gradients()
        return super().update(loss)


def run_step(world: World, norm: str, config: Config, wrong: str = "") -> Found:
    """One training step on this rank's rows, by the code that trains."""
    with wrong_gather(wrong):
        backend = KeepsGradients(config, small_model(norm, 3, world.group), world)
        backend.model.train()
        run = steps.pretraining(config, world, backend, NOISE)
        x, y = steps.share(world, X), steps.share(world, Y)
        with backend.untouched():
            x_try = x.clone().requires_grad_()
            rows = run.contrast.rows(backend.attack_embed(x_try, "adversarial"))
            (input_grad,) = torch.autograd.grad(run.contrast(rows.constant(), rows), x_try)
        assert all(p.grad is None or not p.grad.any() for p in backend.model.parameters()), "the attack left a gradient"
        seen: list[TrainingStep] = []

        def watched(*given: Any) -> TrainingStep:
            seen.append(TrainingStep(*given))
            return seen[0]

        metrics = pretrain_step(run, (x, y), Moment(), watched)
    return Found(metrics.loss, backend.grads, input_grad, seen[0].attacks[0].found.images.detach())


def settings(variant: steps.Variant, objective: str = "nt_xent", gather: str = "auto", micro: int = 0) -> Config:
    return Config(
        data=Data(image_size=SIDE),
        batch=Batch(global_size=N, micro_size=micro),
        objective=reference.settings_of(objective, TEMPERATURE, gather=gather, chunk=5),  # 5 divides nothing
        method=variant.method,
        attack=variant.attack,
        optim=Optim(name="sgd", warmup_epochs=0),
        train=Train(precision="float64"),
    )


FGSM = steps.variant(alpha=ALPHA, epsilon=EPSILON)


def expected(norm: str, config: Config, world_size: int = 1) -> Found:
    """The same by one process on the concatenated batch, with the double-loop objective and no backend."""
    model, attack = small_model(norm, 3).train(), steps.Variant(config.method, config.attack)
    objective = reference.OBJECTIVES[config.objective.name]
    groups = batches_of_statistics(world_size, config.batch.micro_size)

    def contrast(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return objective(a, b, config.objective)

    def embed(images: torch.Tensor, route: Any, groups: Any = groups) -> torch.Tensor:
        return embed_by_groups(model, images, route, groups)

    own = X.clone().requires_grad_()
    with untouched_statistics(model):
        z = embed(own, "adversarial", [list(range(N))])
        (input_grad,) = torch.autograd.grad(contrast(z.detach(), z), own)
    chosen = steps.attacked(attack, N)
    x_adv = attacked_images(attack, embed, contrast, chosen, groups)
    a, b = embed(X, "clean"), embed(Y, "clean")
    c = embed(x_adv, "adversarial", groups if len(chosen) == N else [list(range(len(chosen)))])
    loss = contrast(a, b) + ALPHA * contrast(a[chosen], c)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Found(loss.detach(), grads, input_grad, x_adv)


def batches_of_statistics(world_size: int, micro: int) -> list[list[int]]:
    """Which rows share batch statistics: the j-th micro-batches of all ranks."""
    rows = N // world_size
    size = micro or rows
    return [[r * rows + j + i for r in range(world_size) for i in range(size)] for j in range(0, rows, size)]


def embed_by_groups(model: PretrainModel, images: torch.Tensor, route: Any, groups: list[list[int]]) -> torch.Tensor:
    order = [row for group in groups for row in group]
    z = torch.cat([model(images[group], route) for group in groups])
    return z[torch.argsort(torch.tensor(order))]


def attacked_images(variant: steps.Variant, embed: Any, contrast: Any, chosen: list[int], groups: Any) -> torch.Tensor:
    """Projected gradient ascent, written from the formulas, on the rows `chosen`."""
    fused, attack = variant.fused, variant.attack
    route = "clean" if fused else "adversarial"
    start = (Y if variant.other_anchor else X)[chosen]
    inside = groups if len(chosen) == N else [list(range(len(chosen)))]
    anchor = embed(X if fused else X[chosen], route, groups if fused else inside).detach()
    at = start
    if attack.random_start:
        at = start + EPSILON * (2 * NOISE[chosen] - 1)
    for _ in range(attack.num_steps):
        if fused:  # the loss of the whole batch, of which some images are moved
            image = Y.clone().requires_grad_()
            gradient = torch.autograd.grad(contrast(anchor, embed(image, route)), image)[0][chosen]
        else:
            image = at.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(contrast(anchor, embed(image, route, inside)), image)
        if attack.norm == "linf":
            at = start + (at - start + attack.length_of_step * gradient.sign()).clamp(-EPSILON, EPSILON)
        else:
            moved = []
            for before, now, slope in zip(start, at, gradient, strict=True):
                delta = now - before + attack.length_of_step * slope / slope.norm()
                moved.append(before + delta * min(1.0, EPSILON / float(delta.norm())))
            at = torch.stack(moved)
    return at.detach()


def differences(world_size: int, found: list[Found], wanted: Found) -> dict[str, float]:
    """The largest absolute difference of each quantity, and the share of δ's pixels that differ by more than rounding."""
    grads = [abs(rank.grads[name] - grad).max().item() for rank in found for name, grad in wanted.grads.items()]
    together = torch.cat([rank.input_grad for rank in found]) / world_size  # the contract's point 4
    x_adv = torch.cat([rank.x_adv for rank in found])
    return {
        "loss": abs(sum(rank.loss for rank in found) / world_size - wanted.loss).item(),
        "parameter gradients": max(grads),
        "input gradient": abs(together - wanted.input_grad).max().item(),
        "pixels": ((x_adv - wanted.x_adv).abs() > 1e-9).double().mean().item(),
    }


def assert_equal(world_size: int, found: list[Found], wanted: Found) -> None:
    assert set(found[0].grads) == set(wanted.grads)
    got = differences(world_size, found, wanted)
    assert got.pop("pixels") == 0
    assert max(got.values()) < TOLERANCE, got
    assert max(grad.abs().max() for grad in wanted.grads.values()) > 1e-3  # there is a gradient to compare


# ---- gathers that are wrong on purpose; the forward loss of each is right ----


class _AllReduceOwnSlot(distributed._GatherRows):
    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = len(grads[0]) // dist.get_world_size(ctx.group)
        own = grads[0][dist.get_rank(ctx.group) * rows :][:rows].contiguous()
        dist.all_reduce(own, group=ctx.group)
        return own, None


class _OwnRowsOnly(distributed._GatherRows):
    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = len(grads[0]) // dist.get_world_size(ctx.group)
        return grads[0][dist.get_rank(ctx.group) * rows :][:rows].contiguous(), None


_WRONG: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "detached": lambda rows, group: distributed._GatherRows.apply(rows, group).detach(),
    "own rows only": _OwnRowsOnly.apply,
    "all-reduce of own slot": _AllReduceOwnSlot.apply,
}


@contextmanager
def wrong_gather(name: str) -> Iterator[None]:
    right, shifts = distributed.gather_rows, distributed._shifts_of_all_ranks
    if name == "own shifts for everyone's":
        distributed._shifts_of_all_ranks = lambda shift, group: shift.repeat(dist.get_world_size(group), 1, 1)
    elif name:
        distributed.gather_rows = _WRONG[name]
    try:
        yield
    finally:
        distributed.gather_rows, distributed._shifts_of_all_ranks = right, shifts
