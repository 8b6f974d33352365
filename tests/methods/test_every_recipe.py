"""Every recipe of the package: W ranks train as one process does, and what a step leaves behind is saved and loaded whole.

A method is tested here as soon as it has a recipe.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clae_dist.config import Config
from clae_dist.methods import KNOWN
from clae_dist.models import build_model
from clae_dist.parallel import make_backend
from clae_dist.parity.compare import Parity, compare_steps
from clae_dist.parity.observe import SyntheticRun, observe, reference
from clae_dist.parity.run import alone, tiny
from clae_dist.recipe import recipe_names, resolve
from clae_dist.world import World
from tests.ranks import RankPool

SMALL = ["model.encoder=small_resnet", "data.image_size=16", "model.projector_dim=16", "train.threads=1"]
CASES = {name: [name] for name in recipe_names() if name.startswith(("cifar10/", "finetune/"))} | {
    "clae_fused": ["cifar10/clae", "method.name=clae_fused"],
    "simclr, small crops": ["cifar10/simclr", "views.local_crops=2"],
    "clae, small crops": ["cifar10/clae", "views.local_crops=2"],
    "dscl, no patches": ["cifar10/dscl", "method.patches=0"],
    "acl, mixed": ["cifar10/acl", "method.form=mixed"],
    "acl, adversarial": ["cifar10/acl", "method.form=adversarial"],
    "advcl, pseudo-labels": ["cifar10/advcl", "method.pseudo_labels=somewhere"],
    "adversarial, two norms": ["finetune/adversarial", "method.norms=two"],
    "adversarial, at": ["finetune/adversarial", "method.form=at"],
    "domain, cdan_e": ["finetune/domain", "method.form=cdan_e", "method.norms=separate"],
    "classify, last block": ["finetune/classify", "method.blocks=1", "optim.layer_decay=0.7"],
}
FIRST = tuple(name for name in CASES if name.rpartition("/")[2] in KNOWN)  # one for each method
STATEFUL = [
    f"cifar10/{name}" for name in ("moco", "dynacl", "clusterns", "dscl")
]  # one for each kind of state; every second is quick
PARITY = [pytest.param(case, marks=[] if case in (*STATEFUL[::2], "cifar10/acl") else pytest.mark.slow) for case in FIRST]
RESUMED = [
    pytest.param(case, backend, marks=[] if case in STATEFUL[::2] and backend == "ddp" else pytest.mark.slow)
    for case in FIRST
    for backend in ("ddp", "fsdp2")
]

COPIED = [
    pytest.param(case, backend, marks=[] if (case, backend) == ("cifar10/moco", "ddp") else pytest.mark.slow)
    for case in FIRST
    for backend in ("ddp", "fsdp2", *(["deepspeed"] if case in ("cifar10/moco", "cifar10/clae") else []))
]


def small(case: str, world_size: int, *settings: str) -> Config:
    recipe, *more = CASES[case]
    overrides = [*SMALL, *more, *settings]
    if resolve(recipe, overrides).config.model.projector != "linear":
        overrides.append("model.projector_hidden=16")
    return tiny(resolve(recipe, overrides), world_size=world_size, rows=4)


def on_ranks(world: World, config: Config) -> Parity:
    one, starts = reference(alone(config), World.single("cpu"), 2, "float64")
    return compare_steps(config, world.size, "float64", observe(config, world, 2, starts), one, one)


def check(ranks: RankPool, case: str, world_size: int, backend: str) -> None:
    found = ranks.run(world_size, on_ranks, small(case, world_size, f"parallel.backend={backend}"))[0]
    assert found.passed, found
    assert max(found.param_grad.absolute, found.input_grad.absolute, found.loss.absolute) < 1e-10
    assert found.delta_sign_agreement == 1


def written_too_early(world: World, config: Config) -> tuple[int, list[str], bool]:
    """Of the tensors that a checkpoint copies while a step runs: the number of waits for the copy, those that the step wrote to
    before it, and whether it wrote to any afterwards."""
    run = SyntheticRun(config, world)
    run.step(0)
    backend, early, waits = run.backend, [], []
    parts = [piece for piece in backend.pieces() if not piece.changes_in_forward]
    copied = [(piece.name, piece.tensor, piece.tensor.clone(), piece.tensor._version) for piece in parts]

    def changed() -> list[str]:
        """By value, and by torch's count of writes: weights that give place to others are back in theirs afterwards."""
        written = [name for name, tensor, _, version in copied if tensor._version != version]
        return written + [name for name, tensor, before, _ in copied if not torch.equal(tensor, before)]

    def wait() -> None:
        waits.append(True)
        early.extend(changed())

    backend.wait_for_copy = wait
    run.step(1)
    return len(waits), early, bool(changed())


@pytest.mark.parametrize(("case", "backend"), COPIED)
def test_a_step_waits_for_the_copy_before_it_writes(ranks: RankPool, case: str, backend: str) -> None:
    """On a GPU a checkpoint is copied beside the next step. MoCo's key encoder takes the weights' place before the update."""
    size = 4 if backend == "deepspeed" else 2  # all ranks of the pool
    config = small(case, size, f"parallel.backend={backend}", "train.precision=float32")
    assert ranks.run(size, written_too_early, config) == [(1, [], True)] * size


def test_every_method_has_a_recipe() -> None:
    assert {resolve(*_parts(case)).config.method.name for case in FIRST} == set(KNOWN)


def _parts(case: str) -> tuple[str, list[str]]:
    recipe, *more = CASES[case]
    return recipe, more


@pytest.mark.parametrize("case", PARITY)
def test_three_ranks_train_as_one_process(ranks: RankPool, case: str) -> None:
    check(ranks, case, 3, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "backend"), [(1, "ddp"), (2, "ddp"), (2, "fsdp2"), (3, "fsdp2")])
@pytest.mark.parametrize("case", list(CASES))
def test_all_recipes_on_other_ranks_and_backends(ranks: RankPool, case: str, world_size: int, backend: str) -> None:
    check(ranks, case, world_size, backend)


def two_steps(world: World, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state after one step and after the next."""
    run = SyntheticRun(config, world)
    run.step(0)
    first = _copied(run.state())
    run.step(1)
    return first, run.state()


def one_more(world: World, config: Config, first: dict[str, Any]) -> dict[str, Any]:
    """The state one step after `first`, in a process that knows nothing else."""
    run = SyntheticRun(config, world)
    run.load(first)
    run.step(1)
    return run.state()


def loaded(world: World, config: Config, state: dict[str, Any]) -> dict[str, Any]:
    backend = make_backend(config, build_model(config, world.group), world)
    backend.load_state(state)
    return backend.state()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else {key: _copied(part) for key, part in value.items()}


def assert_same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
        return
    assert set(one) == set(other), where
    for key, value in one.items():
        assert_same(value, other[key], f"{where}/{key}")


@pytest.mark.parametrize(("case", "backend"), RESUMED)
def test_a_step_after_loading_is_the_step_that_would_have_followed(ranks: RankPool, case: str, backend: str) -> None:
    """Bit for bit on as many ranks; on others the same state is loaded, in which momentum, queues and averages are."""
    config = small(case, 2, f"parallel.backend={backend}")
    first, second = ranks.run(2, two_steps, config)[0]
    assert_same(second, ranks.run(2, one_more, config, first)[0])
    assert_same(second, ranks.run(1, loaded, config, second)[0])
