"""What CLAE is about, made visible: the attack, and the geometry of clean and adversarial embeddings.

# B rows on this rank, N rows on all ranks, D embedding width. a, b, c embeddings of x, y, x_adv.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from clae_dist.contrast.distributed import gather_rows
from clae_dist.contrast.step import Pretraining, adversarial_view

_ROWS_AT_A_TIME = 1024


def diagnose(run: Pretraining, batch: Any) -> dict[str, float]:
    """Measurements on one global batch, the same on every rank; nothing in the model changes.

    delta_linf, delta_l2 (mean over images, pixels of [0, 1]); attack_loss_before / _after; cosines of positive pairs and
    mean and hardest (largest, mean over anchors) cosines of negatives, between clean views and between the clean and the
    adversarial view; alignment and uniformity (Wang & Isola 2020, t = 2); wrong_sign_share: percent of pixel signs that
    the negatives of one rank alone would have got wrong. Every rank must call it.
    """
    with run.encoding.backend.untouched():
        x, y = run.augment(batch)
        a, b = run.encoding.constant(x, "clean"), run.encoding.constant(y, "clean")
        values = _geometry(run, a, b)
        if run.attack.name != "none":
            values.update(_attack(run, x, y, a, batch))
    mean = run.world.mean(torch.stack([v.double() for v in values.values()]).to(run.world.device))
    return dict(zip(values, mean.tolist(), strict=True))


def _attack(run: Pretraining, x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
    noise = run.noise(batch) if run.attack.random_start else None
    found = adversarial_view(run, x, y, noise=noise)
    start = y if run.attack.anchor == "other" else x
    delta = (found.images - start).flatten(1)
    anchor, c = run.encoding.constant(x, "adversarial"), run.encoding.constant(found.images, "adversarial")
    after = run.contrast(run.contrast.rows(anchor), run.contrast.rows(c))
    values = {
        "delta_linf": delta.abs().amax(1).mean(),
        "delta_l2": delta.norm(dim=1).mean(),
        "attack_loss_before": found.loss_before,
        "attack_loss_after": after,
        **{f"{name}_adversarial": value for name, value in _geometry(run, a, c).items() if name.startswith("cos_")},
    }
    if run.world.size > 1:
        # One step of the same attack, unclipped and of unit length, so that only signs are compared.
        settings = replace(run.attack, name="fgsm", norm="linf", epsilon=1.0, step_size=0.0, unit="pixel", clip=False)
        signs = replace(run, attack=settings)
        everyone = adversarial_view(signs, x, y).images - start
        local = adversarial_view(signs, x, y, contrast=run.contrast.of_this_rank_alone()).images - start
        values["wrong_sign_share"] = 100 * (everyone.sign() != local.sign()).double().mean()
    return values


def _geometry(run: Pretraining, a_BD: torch.Tensor, b_BD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the rows a against the rows b of all ranks, some rows at a time: the whole matrix may be larger than memory."""
    all_b_ND = gather_rows(b_BD, run.world.group)
    num_negatives = len(a_BD) * (len(all_b_ND) - 1)
    positive = (a_BD * b_BD).sum(1)
    total, spread, hardest = a_BD.new_zeros(()), a_BD.new_zeros(()), []
    first = run.world.rank * len(a_BD)
    for a_KD in a_BD.split(_ROWS_AT_A_TIME):
        cosine_KN = a_KD @ all_b_ND.T
        own = cosine_KN[:, first : first + len(a_KD)].diagonal()  # the positives
        total += cosine_KN.sum() - own.sum()
        own.fill_(-torch.inf)
        hardest.append(cosine_KN.amax(1))
        spread += torch.exp(-2 * (2 - 2 * cosine_KN)).sum()  # |a - b|² = 2 - 2·cosine for unit rows
        first += len(a_KD)
    # The uniformity is the log of a mean over all ranks' pairs.
    spread = run.world.mean(spread / num_negatives)
    return {
        "cos_positive": positive.mean(),
        "cos_negative_mean": total / num_negatives,
        "cos_negative_hardest": torch.cat(hardest).mean(),
        "alignment": (2 - 2 * positive).mean(),
        "uniformity": spread.log(),
    }
