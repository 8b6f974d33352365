"""W ranks compute what one would: loss, parameter gradients, input gradient and δ, against a float64 double loop.

Every rank holds different images. N rows of the global batch, B = N / W a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clae_dist import collectives
from clae_dist.config import Batch, Config, Data, Optim, Train
from clae_dist.contrast import distributed
from clae_dist.contrast.interface import Moment, evenly_spaced
from clae_dist.contrast.look import look
from clae_dist.contrast.step import pretrain_step
from clae_dist.methods.clae_fused import ClaeFused
from clae_dist.models import PretrainModel
from clae_dist.models.norms import untouched_statistics
from clae_dist.objectives import names
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.world import World
from tests import reference, steps
from tests.networks import small_model
from tests.ranks import RankPool

N, SIDE, TEMPERATURE, ALPHA = 12, 8, 0.2, 0.7
EPSILON = 0.03
TOLERANCE = 1e-10  # float64: only the order of summation differs
X, Y = steps.images(1, N, SIDE), steps.images(2, N, SIDE)
NOISE = torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@dataclass
class Found:
    """What one rank saw in a step."""

    loss: torch.Tensor
    grads: dict[str, torch.Tensor]
    input_grad: torch.Tensor
    x_adv: torch.Tensor


class KeepsGradients(DdpBackend):
    """DDP that shows what it would step with."""

    def update(self) -> torch.Tensor:
        self.grads = self.gradients()
        return super().update()


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
        seen: list[torch.Tensor] = []
        embed = run.encoding.embed

        def watched(images: torch.Tensor, *settings: Any, **more: Any) -> Any:
            seen.append(images)
            return embed(images, *settings, **more)

        run.encoding.embed = watched  # type: ignore[method-assign]
        metrics = pretrain_step(run, (x, y), Moment())
    return Found(metrics.loss, backend.grads, input_grad, seen[2].detach())


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("gather", ["log_sum_exp", "reduce_scatter"])
def test_ranks_compute_the_gradient_of_one_process(ranks: RankPool, gather: str, norm: str, world_size: int) -> None:
    config = settings(FGSM, gather=gather)
    assert_equal(world_size, ranks.run(world_size, run_step, norm, config), expected(norm, config))


VARIANTS = {
    "other anchor": steps.variant(anchor="other"),
    "original cost": steps.variant(cost="original"),
    "fused": steps.variant(ClaeFused.Settings),
    "pgd": steps.variant(attack_name="pgd", steps=3),
    "pgd from a random start": steps.variant(attack_name="pgd", steps=2, step_size=0.02, random_start=True),
    "pgd of the other view": steps.variant(attack_name="pgd", steps=2, anchor="other"),
    "l2": steps.variant(norm="l2"),
    "pgd in l2": steps.variant(attack_name="pgd", steps=3, norm="l2"),
    "half of the batch": steps.variant(fraction=0.5),
    "fused on half of the batch": steps.variant(ClaeFused.Settings, fraction=0.5),
}


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_of_the_attack(ranks: RankPool, variant: str, norm: str) -> None:
    for way in ("log_sum_exp", "reduce_scatter"):
        config = settings(VARIANTS[variant], gather=way)
        assert_equal(2, ranks.run(2, run_step, norm, config), expected(norm, config))


@pytest.mark.parametrize("gather", ["log_sum_exp", "reduce_scatter"])
@pytest.mark.parametrize("objective", [name for name in names() if name != "nt_xent"])  # that one is in all other tests
def test_other_objectives(ranks: RankPool, objective: str, gather: str) -> None:
    fused = settings(VARIANTS["fused"], objective, gather)
    assert_equal(2, ranks.run(2, run_step, "batch", fused), expected("batch", fused))
    config = settings(FGSM, objective, gather)
    one_process = expected("batch", config)
    for world_size in (1, 2, 3, 4) if gather == "log_sum_exp" else (2,):
        assert_equal(world_size, ranks.run(world_size, run_step, "batch", config), one_process)


@pytest.mark.parametrize("variant", ["fgsm", "fused", "pgd", "other anchor", "half of the batch"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_keep_all_negatives(ranks: RankPool, variant: str, world_size: int) -> None:
    """Without batch statistics the embedding cache is exact; naive accumulation would see only a micro-batch's negatives."""
    config = settings(VARIANTS.get(variant, FGSM), micro=3)
    assert_equal(world_size, ranks.run(world_size, run_step, "group", config), expected("group", config))


@pytest.mark.parametrize("variant", ["fgsm", "fused"])
def test_batch_statistics_of_micro_batches_are_those_of_all_ranks(ranks: RankPool, variant: str) -> None:
    config = settings(VARIANTS.get(variant, FGSM), micro=3)
    found, wanted = ranks.run(2, run_step, "batch", config), expected("batch", config, world_size=2)
    got = differences(2, found, wanted)
    del got["input gradient"]  # that one is taken without the cache
    assert max(got.values()) < TOLERANCE, got


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_exact_is_original_bit_for_bit(ranks: RankPool, norm: str) -> None:
    exact, original = (
        ranks.run(2, run_step, norm, settings(steps.variant(cost=cost)))  # type: ignore[arg-type]
        for cost in ("exact", "original")
    )
    for one, other in zip(exact, original, strict=True):
        assert torch.equal(one.loss, other.loss)
        assert torch.equal(one.x_adv, other.x_adv)
        for name, grad in one.grads.items():
            assert torch.equal(grad, other.grads[name]), name


def test_which_rows_are_attacked_does_not_depend_on_the_ranks() -> None:
    whole = evenly_spaced(6, 12).tolist()
    assert whole == steps.attacked(steps.variant(fraction=0.5), 12)
    for world_size in (2, 3):
        rows = 12 // world_size
        assert [r * rows + i for r in range(world_size) for i in evenly_spaced(rows // 2, rows).tolist()] == whole


def standalone_view(world: World, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    backend = KeepsGradients(config, small_model("batch", 3, world.group), world)
    backend.model.train()
    run = steps.pretraining(config, world, backend)
    x, y = steps.share(world, X), steps.share(world, Y)
    with backend.untouched():
        alone = look(run, (x, y), x, y).attacks[0].found.images
    seen: list[torch.Tensor] = []
    embed = backend.embed
    backend.embed = lambda images, route: (seen.append(images.detach()), embed(images, route))[1]  # type: ignore[method-assign]
    pretrain_step(run, (x, y), Moment())
    return alone, seen[2]


def test_the_fused_attack_of_diagnostics_is_that_of_training(ranks: RankPool) -> None:
    for alone, trained in ranks.run(2, standalone_view, settings(VARIANTS["fused"])):
        assert torch.equal(alone, trained)


# ---- how often ranks talk ----


def count_reductions(world: World, config: Config) -> tuple[int, int]:
    """Collectives of the gradient in one step, and those of the gather's backward."""
    backend = DdpBackend(config, small_model("group", 3, world.group), world)
    backend.model.train()
    run = steps.pretraining(config, world, backend)
    reduced = 0

    def hook(state: Any, bucket: Any) -> Any:
        nonlocal reduced
        reduced += 1
        return (
            dist.all_reduce(bucket.buffer().div_(world.size), group=world.group, async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    hook.__annotations__ = {}  # DDP reads them and would want them evaluated
    backend._wrapped.register_comm_hook(None, hook)  # type: ignore[operator]
    scattered, right = 0, collectives.reduce_scatter

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal scattered
        scattered += 1
        return right(*args, **kwargs)

    collectives.reduce_scatter = counted
    try:
        pretrain_step(run, (steps.share(world, X), steps.share(world, Y)), Moment())
    finally:
        collectives.reduce_scatter = right
    return reduced, scattered


@pytest.mark.parametrize("variant", ["fgsm", "fused", "pgd", "original cost", "half of the batch"])
def test_gradients_are_reduced_once_a_step(ranks: RankPool, variant: str) -> None:
    """Of half of 6 rows, 3 fit into one part, and the others' 6 into two: all are embedded twice, or none."""
    for micro in {"original cost": (0,), "half of the batch": (0, 3)}.get(variant, (0, 2)):
        config = settings(VARIANTS.get(variant, FGSM), micro=micro)
        assert ranks.run(2, count_reductions, config) == [(1, 0)] * 2  # the model is one bucket


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


@pytest.mark.parametrize("wrong", [*_WRONG, "own shifts for everyone's"])
def test_a_wrong_gather_is_caught(ranks: RankPool, wrong: str) -> None:
    """Each leaves the forward loss as it is, so that only gradients can tell."""
    config = settings(FGSM, gather="reduce_scatter" if wrong in _WRONG else "log_sum_exp")
    got = differences(4, ranks.run(4, run_step, "group", config, wrong), expected("group", config))
    # Another's shift is close to one's own: that error is smaller, and still a thousand times the bar above.
    subtle = wrong not in _WRONG
    assert got["parameter gradients"] > (1e-4 if subtle else 1e-3)
    assert got["input gradient"] > (1e-7 if subtle else 1e-5)
