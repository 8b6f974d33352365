"""Measurements of a step: its first attack, and the geometry of clean and adversarial embeddings.

# B rows on this rank, N rows on all ranks, D embedding width. a, b, c embeddings of x, y, x_adv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from clae_dist.contrast.distributed import gather_rows
from clae_dist.contrast.look import Look, look
from clae_dist.contrast.spectrum import rank_me
from clae_dist.contrast.step import Pretraining

_ROWS_AT_A_TIME = 1024
_RANK_ROWS = 512  # at most, of the effective rank


def diagnose(run: Pretraining, batch: Any) -> dict[str, float]:
    """Measurements on one global batch, the same on every rank; nothing in the model changes. Collective.

    Returns:
        delta_linf, delta_l2 (mean over images, pixels of [0, 1]); attack_loss_before / _after; cosines of positive pairs and
        mean and hardest (largest, mean over anchors) cosines of negatives, between clean views and along the adversarial
        route; alignment and uniformity (Wang & Isola 2020, t = 2); rank_me of the clean embeddings of the batch;
        attack_loss_noise: the loss under random noise of the attack's size; zero_gradient_share: percent of pixels where the
        attack's gradient is exactly zero; wrong_sign_share: percent of pixel signs that the negatives of one rank alone would
        have got wrong. A method without an attack has those of the clean views only.
    """
    with run.encoding.backend.untouched():
        views = run.augment(batch)
        seen = look(run, batch, *views)
        values: dict[str, torch.Tensor] = {}
        for pair in seen.pairs:
            if pair.route == "clean" and "alignment" not in values:
                values.update(_geometry(run, pair.anchors.mine, pair.keys.mine, with_rank=True))
            elif pair.route != "clean" and "cos_positive_adversarial" not in values:
                geometry = _geometry(run, pair.anchors.mine, pair.keys.mine)
                values.update({f"{name}_adversarial": geometry[name] for name in geometry if name.startswith("cos_")})
        if "uniformity" not in values and seen.embedded:  # pairs are not all that the method contrasts
            a_BD = seen.embedded[0].rows.mine
            geometry = _geometry(run, a_BD, a_BD, with_rank=True)
            values.update({name: geometry[name] for name in ("rank_me", "cos_negative_mean", "uniformity")})
        if seen.attacks:
            values.update(_attack(run, seen, views, batch))
    if not values:  # a method with a loss of its own
        return {}
    mean = run.world.mean(torch.stack([v.detach().double() for v in values.values()]).to(run.world.device))
    return dict(zip(values, mean.tolist(), strict=True))


def _attack(run: Pretraining, seen: Look, views: Sequence[torch.Tensor], batch: Any) -> dict[str, torch.Tensor]:
    """Measurements of the first attack of a step."""
    attacked = seen.attacks[0]
    values = {
        **attacked.measures(),
        "attack_loss_after": seen.loss_after(attacked),
        "zero_gradient_share": 100 * (attacked.found.gradient == 0).double().mean(),
    }
    noisy = seen.loss_under_noise(attacked)
    if noisy is not None:
        values["attack_loss_noise"] = noisy
    if run.world.size > 1:
        alone = look(replace(run, contrast=run.contrast.of_this_rank_alone()), batch, *views).attacks[0]
        wrong = attacked.found.gradient.sign() != alone.found.gradient.sign()
        values["wrong_sign_share"] = 100 * wrong.double().mean()
    return values


def _geometry(run: Pretraining, a_BD: torch.Tensor, b_BD: torch.Tensor, *, with_rank: bool = False) -> dict[str, torch.Tensor]:
    """Cosines, alignment and uniformity of the rows a against the rows b of all ranks, in blocks of rows."""
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
    some_nD = all_b_ND[:: -(-len(all_b_ND) // _RANK_ROWS)]
    return {
        **({"rank_me": a_BD.new_tensor(rank_me(some_nD))} if with_rank else {}),
        "cos_positive": positive.mean(),
        "cos_negative_mean": total / num_negatives,
        "cos_negative_hardest": torch.cat(hardest).mean(),
        "alignment": (2 - 2 * positive).mean(),
        "uniformity": spread.log(),
    }
