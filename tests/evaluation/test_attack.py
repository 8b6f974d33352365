"""Attacks on classifiers: closed forms, order of strength, hidden gradients."""

from __future__ import annotations

import importlib
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyautoattack
import pytest
import torch
from PIL import Image
from torch import nn

from clae_dist.evaluation.attack import attack, autoattack, is_right
from tests.processes import ROOT

EPSILON = 8 / 255
CIFAR = ROOT.parent / "shared" / "data" / "cifar10-test.tar.gz"


class Linear(nn.Module):
    """A linear classifier of pixels."""

    def __init__(self, classes: int = 4, side: int = 4, margin: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn((3 * side**2, classes), generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([margin, *[0.0] * (classes - 1)], dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight + self.bias


def _images(count: int = 30, side: int = 4) -> torch.Tensor:
    """Away from 0 and 1, so that no bound of a pixel matters."""
    return 0.25 + 0.5 * torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_of_a_linear_classifier_of_two_classes_is_the_closed_form() -> None:
    model, images = Linear(classes=2), _images()
    labels = model(images).argmax(1)
    direction = (model.weight[:, labels] - model.weight[:, 1 - labels]).T.reshape(images.shape)
    expected = images - EPSILON * direction.sign()
    fgsm, zero = attack(model, images, labels, EPSILON, steps=1)
    pgd, _ = attack(model, images, labels, EPSILON, steps=20, step_length=EPSILON / 4, noise=torch.rand_like(images))
    torch.testing.assert_close(fgsm, expected)
    torch.testing.assert_close(pgd, expected)
    assert not zero.any()
    length = 0.5
    l2, _ = attack(model, images, labels, length, "l2", steps=1)
    torch.testing.assert_close(l2, images - length * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_stay_in_the_ball_and_are_valid(norm: str) -> None:
    model, images = Linear(), torch.rand((20, 3, 4, 4), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, _ = attack(
        model, images, model(images).argmax(1), 0.1, norm, steps=5, step_length=0.05, noise=torch.rand_like(images)
    )
    change = (found - images).flatten(1)
    assert (change.abs().amax() if norm == "linf" else change.norm(dim=1).max()) <= 0.1 + 1e-9
    assert 0 <= found.min() <= found.max() <= 1


def test_accuracy_falls_with_epsilon_and_with_steps() -> None:
    model, images = Linear(), _images(200)
    labels = model(images).argmax(1)

    def accuracy(epsilon: float, steps: int) -> float:
        found, _ = attack(model, images, labels, epsilon, steps=steps, step_length=epsilon / 4)
        return float(is_right(model, found, labels).double().mean())

    by_epsilon = [1.0, *(accuracy(epsilon / 255, 20) for epsilon in (1, 2, 4, 8, 16))]
    by_steps = [accuracy(EPSILON, steps) for steps in (1, 2, 4, 8)]
    for curve in (by_epsilon, by_steps):
        assert all(later <= earlier for earlier, later in pairwise(curve)), curve
    assert by_epsilon[-1] < 0.2
    assert by_steps[-1] < by_steps[0]


class Quantised(nn.Module):
    """A classifier whose input is rounded, so that its gradient is zero everywhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((images * 16).round() / 16)


def test_a_rounded_input_has_no_gradient_and_is_reported() -> None:
    model, images = Linear().float(), _images().float()
    labels = model(images).argmax(1)
    found, zero = attack(Quantised(model), images, labels, EPSILON, steps=1)
    assert zero.all()
    torch.testing.assert_close(found, images)
    assert not attack(model, images, labels, EPSILON, steps=1)[1].any()


@pytest.mark.slow
def test_autoattack_is_that_of_its_authors_image_by_image() -> None:
    model, images = Linear(margin=1.5).float(), _images(24).float()
    labels = model(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4  # wrong from the start
    ours, warnings = autoattack(model, images, labels, 0.02, "linf", num_classes=4, seed=5)
    theirs = pyautoattack.AutoAttack(model, eps=0.02, seed=5)
    theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 3
    _, found = theirs.run_standard_evaluation(images, labels, batch_size=24)
    assert torch.equal(ours, found == labels)
    assert 0 < int(ours.sum()) < 21
    assert warnings == []
    assert (ours <= is_right(model, images, labels)).all()


@pytest.mark.parametrize("classes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_autoattack_with_few_classes(classes: int) -> None:
    model, images = Linear(classes).float(), _images(6).float()
    labels = model(images).argmax(1)
    stands, _ = autoattack(model, images, labels, 0.9, "linf", classes, seed=0)
    assert not stands.any()
    assert autoattack(model, images, labels, 1e-5, "linf", classes, seed=0)[0].any()


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.is_file(), reason="needs CIFAR-10 in ../shared/data")
def test_a_standard_network_falls_to_pgd() -> None:
    """The CIFAR-10 network that pyautoattack comes with: right on most images, and on none within 8/255."""
    weights = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
    model = importlib.import_module("pyautoattack.examples.resnet").ResNet18()
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    model.eval()
    images, labels = _cifar(CIFAR, 16)
    clean = is_right(model, images, labels)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    moved, _ = attack(model, images, labels, EPSILON, steps=10, step_length=2 / 255, noise=noise)
    assert clean.sum() >= 10
    assert not is_right(model, moved, labels).any()


def _cifar(archive: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of every class folder, in turn."""
    with tarfile.open(archive) as tar:
        names = sorted(member.name for member in tar.getmembers() if member.isfile())
        classes = sorted({name.split("/")[-2] for name in names})
        first = {name: [one for one in names if one.split("/")[-2] == name] for name in classes}
        chosen = [first[classes[i % len(classes)]][i // len(classes)] for i in range(count)]
        pixels = [np.asarray(Image.open(tar.extractfile(name)).convert("RGB")) for name in chosen]
    labels = torch.tensor([classes.index(name.split("/")[-2]) for name in chosen])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255, labels
