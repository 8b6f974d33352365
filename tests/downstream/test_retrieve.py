"""The task `retrieve`: its loss against a double loop, and the mining of positives.

# B rows, M images, K images of a pool, D embedding width
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clae_dist.config.method import TrainingSet
from clae_dist.downstream.retrieve import NOBODY, RetrieveSettings, memory_loss, mined
from clae_dist.errors import ConfigError


def unit(seed: int, count: int, dim: int = 6) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def groups(copies: int, count: int, noise: float, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` groups of `copies` near rows, in a shuffled order, and the group of each."""
    draw = torch.Generator().manual_seed(4)
    centres = F.normalize(torch.randn(count, dim, generator=draw), dim=1)
    order = torch.randperm(copies * count, generator=draw)
    rows = centres.repeat_interleave(copies, 0) + noise * torch.randn(copies * count, dim, generator=draw)
    return F.normalize(rows, dim=1)[order], torch.arange(count).repeat_interleave(copies)[order]


def test_the_loss_is_that_of_a_double_loop() -> None:
    memory, z = unit(1, 9), unit(2, 3).requires_grad_()
    memory[7] = 0  # never embedded
    own, positives = torch.tensor([0, 4, 8]), torch.tensor([[1, 2], [NOBODY, 5], [NOBODY, NOBODY]])
    undecided, margin = torch.tensor([[3, NOBODY], [6, NOBODY], [NOBODY, NOBODY]]), 0.1
    expected = []
    for row in range(3):
        total = z.new_zeros(())
        for place in range(9):
            similar = z[row] @ memory[place]
            if place in (own[row], 7) or place in undecided[row]:
                continue
            if place in positives[row]:
                total = total + 1 - similar
            elif similar > margin:
                total = total + similar
        expected.append(total)
    found = memory_loss(z, own, memory, positives, undecided, margin)
    torch.testing.assert_close(found, torch.stack(expected))
    ours, theirs = (torch.autograd.grad(one, z, retain_graph=True)[0] for one in (found.sum(), torch.stack(expected).sum()))
    torch.testing.assert_close(ours, theirs)
    assert ours.any()


def test_a_copy_of_the_image_pulls_nothing_and_a_large_margin_pushes_nothing() -> None:
    memory, nobody = unit(1, 4), torch.full((1, 1), NOBODY)
    assert memory_loss(memory[:1], torch.tensor([3]), memory, torch.tensor([[0]]), nobody, 0.999).item() == 0


def test_copies_are_found_and_nobody_else() -> None:
    rows, group = groups(4, 25, noise=0.0)
    positives, undecided = mined(rows, torch.full((100,), 0.999), RetrieveSettings(images=100, pool=10, rounds=0))
    assert not (group[undecided.clamp_min(0)] == group[:, None])[undecided != NOBODY].any()
    for image, places in enumerate(positives):
        found = places[places != NOBODY]
        assert set(found.tolist()) == {n for n in range(100) if group[n] == group[image] and n != image}


def test_rounds_reach_what_is_near_to_the_positives_alone() -> None:
    """A chain: each row is near to the next; those two apart are not alike, and one round each brings them in."""
    angles = torch.arange(5) * 0.35
    rows = torch.stack([angles.cos(), angles.sin(), torch.zeros(5)], 1)
    far = F.normalize(torch.tensor([[0.0, 0.0, 1.0], [0.0, -1.0, 0.5], [-1.0, 0.0, 0.3]]), dim=1)
    memory = torch.cat([rows, far])
    alike = torch.full((8,), float(torch.tensor(0.36).cos()))
    reached = []
    for rounds in (0, 1, 2):
        settings = RetrieveSettings(images=8, pool=5, rounds=rounds, take=1, negative=0.5)
        places = mined(memory, alike, settings)[0, 0]
        reached.append(sorted(places[places != NOBODY].tolist()))
    assert reached == [[1], [1, 2], [1, 2, 3]]


def test_mining_knows_no_order_of_images() -> None:
    rows, _ = groups(4, 10, noise=0.2)
    alike, settings = torch.full((40,), 0.9), RetrieveSettings(images=40, pool=8, negative=0.5)
    first = mined(rows, alike, settings)[0]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    again = mined(rows[order], alike[order], settings)[0]
    place = torch.empty_like(order)
    place[order] = torch.arange(40)
    same = 0
    for image in range(40):
        one = {n for n in first[image].tolist() if n != NOBODY}
        other = {int(order[n]) for n in again[place[image]].tolist() if n != NOBODY}
        same += one == other
    assert same >= 38  # the similarity of strangers is that of other random pairs


def test_an_image_without_an_embedding_is_nobodys_positive() -> None:
    rows, _ = groups(4, 5, noise=0.0)
    rows[3] = 0
    found = mined(rows, torch.ones(20), RetrieveSettings(images=20, pool=6))
    assert (found[:, 3] == NOBODY).all()
    assert not (found == 3).any()


def test_a_pool_larger_than_the_set_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.pool is 50, but set has 40 images"):
        RetrieveSettings(images=40).check_set(TrainingSet("set", 40, (), ()))
