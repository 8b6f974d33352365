"""W ranks compute what one would: loss, parameter gradients, input gradient and δ, against a float64 double loop.

Every rank holds different images. N rows of the global batch, B = N / W a rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from clae_dist import collectives
from clae_dist.config import Config
from clae_dist.contrast.interface import Moment, evenly_spaced
from clae_dist.contrast.look import look
from clae_dist.contrast.step import pretrain_step
from clae_dist.methods.clae_fused import ClaeFused
from clae_dist.objectives import names
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.world import World
from tests import steps
from tests.contrast.one_step import (
    _WRONG,
    FGSM,
    TOLERANCE,
    KeepsGradients,
    X,
    Y,
    assert_equal,
    differences,
    expected,
    run_step,
    settings,
)
from tests.networks import small_model
from tests.ranks import RankPool


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("norm", [pytest.param("group", marks=pytest.mark.slow), "batch"])
@pytest.mark.parametrize("gather", ["log_sum_exp", pytest.param("reduce_scatter", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_of_the_attack(ranks: RankPool, variant: str, gather: str, norm: str) -> None:
    config = settings(VARIANTS[variant], gather=gather)
    assert_equal(2, ranks.run(2, run_step, norm, config), expected(norm, config))


@pytest.mark.parametrize(
    ("gather", "world_sizes"),
    [
        pytest.param("log_sum_exp", (3,), id="log_sum_exp, 3 ranks"),
        pytest.param("log_sum_exp", (1, 2, 4), id="log_sum_exp, other ranks", marks=pytest.mark.slow),
        pytest.param("reduce_scatter", (2,), id="reduce_scatter", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("objective", [name for name in names() if name != "nt_xent"])  # that one is in all other tests
def test_other_objectives(ranks: RankPool, objective: str, gather: str, world_sizes: tuple[int, ...]) -> None:
    fused = settings(VARIANTS["fused"], objective, gather)
    assert_equal(2, ranks.run(2, run_step, "batch", fused), expected("batch", fused))
    config = settings(FGSM, objective, gather)
    one_process = expected("batch", config)
    for world_size in world_sizes:
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
    backend.embed = lambda images, *how: (seen.append(images.detach()), embed(images, *how))[1]  # type: ignore[method-assign]
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


@pytest.mark.parametrize("wrong", [*_WRONG, "own shifts for everyone's"])
def test_a_wrong_gather_is_caught(ranks: RankPool, wrong: str) -> None:
    """Each leaves the forward loss as it is, so that only gradients can tell."""
    config = settings(FGSM, gather="reduce_scatter" if wrong in _WRONG else "log_sum_exp")
    got = differences(4, ranks.run(4, run_step, "group", config, wrong), expected("group", config))
    # Another's shift is close to one's own: that error is smaller, and still a thousand times the bar above.
    subtle = wrong not in _WRONG
    assert got["parameter gradients"] > (1e-4 if subtle else 1e-3)
    assert got["input gradient"] > (1e-7 if subtle else 1e-5)
