"""W ranks compute what one would: loss, parameter gradients, input gradient and δ, against a float64 double loop.

Every rank holds different images. N rows of the global batch, B = N / W a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clae_dist.config import Attack, Batch, Config, Data, Optim, Train
from clae_dist.contrast import gather
from clae_dist.contrast.adversary import perturb
from clae_dist.contrast.step import Pretraining, adversarial_view, pretrain_step
from clae_dist.models.norms import untouched_statistics
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.world import World
from tests import reference
from tests.networks import small_model
from tests.ranks import RankPool

N, SIDE, TEMPERATURE, ALPHA = 12, 8, 0.2, 0.7
EPSILON = 0.03
TOLERANCE = 1e-10  # float64: only the order of summation differs


@dataclass
class Found:
    """What one rank saw in a step."""

    loss: torch.Tensor
    grads: dict[str, torch.Tensor]
    input_grad: torch.Tensor
    x_adv: torch.Tensor


def images(seed: int) -> torch.Tensor:
    """(N, 3, SIDE, SIDE) in [0.2, 0.8], float64: every row another one, and no pixel near the bounds."""
    return 0.2 + 0.6 * torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class KeepsGradients(DdpBackend):
    """DDP that shows what it would step with."""

    def update(self) -> torch.Tensor:
        self.grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return super().update()


def run_step(world: World, norm: str, objective: str, attack: Attack, wrong: str = "") -> Found:
    """One training step on this rank's rows, by the code that trains."""
    config = Config(
        data=Data(image_size=SIDE),
        batch=Batch(global_size=N),
        optim=Optim(name="sgd", warmup_epochs=0),
        train=Train(precision="float64"),
    )
    with wrong_gather(wrong):
        backend = KeepsGradients(config, small_model(norm, 3, world.group), world)
        backend.model.train()
        run = Pretraining(
            world=world,
            attack=attack,
            objective=objective,
            temperature=TEMPERATURE,
            pixel_std=backend.model.std,
            augment=lambda batch: batch,
            attack_embed=backend.attack_embed,
            untouched=lambda: untouched_statistics(backend.model),
            attack_statistics=lambda: untouched_statistics(backend.model),
            backend=backend,
            timed=lambda name: nullcontext(),
        )
        mine = slice(world.rank * N // world.size, (world.rank + 1) * N // world.size)
        x, y = images(1)[mine], images(2)[mine]
        with untouched_statistics(backend.model):
            x_adv = adversarial_view(run, x, y).images
            x_try = x.clone().requires_grad_()
            z_try = backend.attack_embed(x_try, "adversarial")
            (input_grad,) = torch.autograd.grad(run.contrast(z_try.detach(), z_try), x_try)
        assert all(p.grad is None or not p.grad.any() for p in backend.model.parameters()), "the attack left a gradient"
        metrics = pretrain_step(run, (x, y), ALPHA)
    return Found(metrics.loss, backend.grads, input_grad, x_adv)


def expected(norm: str, objective: str, attack: Attack) -> Found:
    """The same by one process on the concatenated batch, with the double-loop objective and no backend."""
    model = small_model(norm, 3).train()
    contrast = reference.OBJECTIVES[objective]
    x, y = images(1), images(2)
    with untouched_statistics(model):
        x_try = (y if attack.anchor == "other" else x).clone().requires_grad_()
        anchor = model(x, "adversarial").detach()
        found = perturb(x_try.detach(), lambda image: contrast(anchor, model(image, "adversarial"), TEMPERATURE), EPSILON)
        own = x.clone().requires_grad_()
        (input_grad,) = torch.autograd.grad(contrast(anchor, model(own, "adversarial"), TEMPERATURE), own)
    a, b, c = model(x, "clean"), model(y, "clean"), model(found.images, "adversarial")
    loss = contrast(a, b, TEMPERATURE) + ALPHA * contrast(a, c, TEMPERATURE)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Found(loss.detach(), grads, input_grad, found.images)


def differences(world_size: int, found: list[Found], wanted: Found) -> dict[str, float]:
    """The largest absolute difference of each quantity, and the share of δ's signs that differ."""
    grads = [abs(rank.grads[name] - grad).max().item() for rank in found for name, grad in wanted.grads.items()]
    together = torch.cat([rank.input_grad for rank in found]) / world_size  # the contract's point 4
    x_adv = torch.cat([rank.x_adv for rank in found])
    return {
        "loss": abs(sum(rank.loss for rank in found) / world_size - wanted.loss).item(),
        "parameter gradients": max(grads),
        "input gradient": abs(together - wanted.input_grad).max().item(),
        "signs": (x_adv != wanted.x_adv).double().mean().item(),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_ranks_compute_the_gradient_of_one_process(ranks: RankPool, world_size: int, norm: str) -> None:
    attack = Attack(epsilon=EPSILON)
    found = ranks.run(world_size, run_step, norm, "nt_xent", attack)
    wanted = expected(norm, "nt_xent", attack)
    assert set(found[0].grads) == set(wanted.grads)
    got = differences(world_size, found, wanted)
    assert got.pop("signs") == 0
    assert max(got.values()) < TOLERANCE, got
    assert max(grad.abs().max() for grad in wanted.grads.values()) > 1e-3  # there is a gradient to compare


@pytest.mark.parametrize(
    ("objective", "attack"),
    [
        ("instance", Attack(epsilon=EPSILON)),
        ("nt_xent", Attack(epsilon=EPSILON, anchor="other")),
        ("nt_xent", Attack(epsilon=EPSILON, cost="original")),
    ],
    ids=["instance", "other anchor", "original cost"],
)
def test_variants_compute_the_gradient_of_one_process(ranks: RankPool, objective: str, attack: Attack) -> None:
    got = differences(2, ranks.run(2, run_step, "batch", objective, attack), expected("batch", objective, attack))
    assert got.pop("signs") == 0
    assert max(got.values()) < TOLERANCE, got


# ---- gathers that are wrong on purpose; the forward loss of each is right ----


class _AllReduceOwnSlot(gather._GatherRows):
    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = len(grads[0]) // dist.get_world_size(ctx.group)
        own = grads[0][dist.get_rank(ctx.group) * rows :][:rows].contiguous()
        dist.all_reduce(own, group=ctx.group)
        return own, None


class _OwnRowsOnly(gather._GatherRows):
    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = len(grads[0]) // dist.get_world_size(ctx.group)
        return grads[0][dist.get_rank(ctx.group) * rows :][:rows].contiguous(), None


_WRONG: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "detached": lambda rows, group: gather._GatherRows.apply(rows, group).detach(),
    "own rows only": _OwnRowsOnly.apply,
    "all-reduce of own slot": _AllReduceOwnSlot.apply,
}


@contextmanager
def wrong_gather(name: str) -> Iterator[None]:
    right = gather.gather_rows
    if name:
        gather.gather_rows = _WRONG[name]
    try:
        yield
    finally:
        gather.gather_rows = right


@pytest.mark.parametrize("wrong", list(_WRONG))
def test_a_wrong_gather_is_caught(ranks: RankPool, wrong: str) -> None:
    """Each leaves the forward loss as it is, so that only gradients can tell."""
    attack = Attack(epsilon=EPSILON)
    got = differences(4, ranks.run(4, run_step, "group", "nt_xent", attack, wrong), expected("group", "nt_xent", attack))
    assert got["parameter gradients"] > 1e-3
    assert got["input gradient"] > 1e-5
