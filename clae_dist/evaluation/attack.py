"""FGSM and PGD on a classifier, and AutoAttack by the package of its authors.

# n images, C classes
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from clae_dist.contrast.adversary import Ball, perturb
from clae_dist.errors import ConfigError

Norm = Literal["linf", "l2"]
STANDARD_TARGETS = 9  # classes that the targeted attacks of AutoAttack's standard version try


def attack(
    classifier: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    norm: Norm = "linf",
    steps: int = 20,
    step_length: float | None = None,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Valid images of high cross entropy within `epsilon` of `images`, by projected gradient ascent (Madry et al. 2018).

    One step of ε without noise is FGSM. `noise`: uniform in [0, 1), for a random start. `step_length`: ε by default.
    Returns the images, and a bool (n,) that is true where the gradient at the start is zero.
    """
    zero = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    first = True

    def gradient_of(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal first
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            loss = F.cross_entropy(classifier(at), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, at) if loss.requires_grad else (torch.zeros_like(at),)
        if first:
            zero.copy_(gradient.flatten(1).abs().amax(1) == 0)
            first = False
        return loss.detach(), gradient

    found = perturb(images, gradient_of, Ball(epsilon, norm), steps=steps, step_length=step_length, noise=noise)
    return found.images, zero


def is_right(classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """bool (n,): the largest logit is the label's."""
    with torch.no_grad():
        return classifier(images).argmax(1) == labels


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def _warnings_of(logger: logging.Logger) -> Iterator[list[str]]:
    """The warnings that a logger gets inside, which are not printed."""
    handler, before = _Warnings(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def import_autoattack() -> Any:
    """pyautoattack, the package of AutoAttack's authors. Raises ConfigError where it is not installed."""
    try:
        import pyautoattack
    except ImportError as error:
        raise ConfigError(
            f"robust.attacks has autoattack, but pyautoattack cannot be imported ({error}); pip install "
            "'pyautoattack>=0.2', or use robust.attacks=[fgsm, pgd]."
        ) from None
    return pyautoattack


def autoattack(
    classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor, epsilon: float, norm: Norm, num_classes: int, seed: int
) -> tuple[torch.Tensor, list[str]]:
    """AutoAttack's standard version (Croce & Hein 2020): bool (n,), true for images that stay right, and its warnings.

    With C < 10 classes the targeted attacks try all C - 1 others. With C < 4 their loss (DLR) is not defined: untargeted FAB
    replaces them, for which the authors have no standard.
    """
    package = import_autoattack()
    shown = {"linf": "Linf", "l2": "L2"}[norm]
    arguments = {"norm": shown, "eps": epsilon, "seed": seed, "device": images.device}
    if num_classes < 4:
        adversary = package.AutoAttack(classifier, version="custom", attacks=["apgd-ce", "fab", "square"], **arguments)
        adversary.apgd.n_restarts = adversary.fab.n_restarts = 1
    else:
        adversary = package.AutoAttack(classifier, version="standard", **arguments)
        targets = min(STANDARD_TARGETS, num_classes - 1)
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
    with _warnings_of(adversary.logger) as warnings:
        _, found = adversary.run_standard_evaluation(images, labels, batch_size=len(images))
    return found == labels, warnings
