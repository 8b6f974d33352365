"""Label-free geometry of representations: effective rank, decay of the spectrum, alignment, uniformity.

# n images, D width of features or projections, p pairs
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clae_dist.config import Augment
from clae_dist.config.rules import Section, setting
from clae_dist.contrast.spectrum import gram, rank_me
from clae_dist.data.augment import AUGMENT_DRAWS
from clae_dist.data.augment_views import augment_views
from clae_dist.data.draws import uniforms
from clae_dist.data.evaluation_set import Views
from clae_dist.data.views import CROP_DRAWS, crop_boxes, resized_crop
from clae_dist.evaluation.passes import over_batches
from clae_dist.evaluation.place import Place
from clae_dist.evaluation.protocol import EvaluationProtocol, Subject
from clae_dist.models import PretrainModel
from clae_dist.models.norms import set_route

_ROWS = 8192  # in float64 at once
_PAIR_ROWS = 1024
_RANKS = (11, 100)  # of the eigenvalues in the fit of α, from 1


@dataclass(frozen=True)
class Spectrum:
    """Exponent α of eigenvalues that fall like rank^-α, and the R² of the fit; NaN with fewer than three eigenvalues."""

    alpha: float
    r_squared: float


def alpha_req(rows_nD: torch.Tensor) -> Spectrum:
    """α-ReQ of the centred covariance. Reference: Agrawal et al. 2022; fitted over the eigenvalues 11 to 100."""
    gram_DD = gram(rows_nD, centre=True)
    return fit_power_law(torch.linalg.eigvalsh(gram_DD).flip(0) / len(rows_nD))


def fit_power_law(eigenvalue_D: torch.Tensor) -> Spectrum:
    """Least squares of log λ_i on -log i with weights 1/i, over `_RANKS` or, with fewer, all positive eigenvalues."""
    positive = eigenvalue_D[eigenvalue_D > 1e-14 * eigenvalue_D.max().clamp_min(1e-300)].double()
    first = min(_RANKS[0], max(1, len(positive) // 4))
    y = positive[first - 1 : _RANKS[1]].log()
    if len(y) < 3:
        return Spectrum(math.nan, math.nan)
    rank = torch.arange(first, first + len(y), dtype=torch.float64, device=y.device)
    weight, x = (1 / rank) / (1 / rank).sum(), -rank.log()
    x_mean, y_mean = (weight * x).sum(), (weight * y).sum()
    alpha = (weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean).square()).sum()
    residual = (weight * (y - y_mean - alpha * (x - x_mean)).square()).sum()
    total = (weight * (y - y_mean).square()).sum()
    return Spectrum(float(alpha), float(1 - residual / total) if total > 0 else math.nan)


def alignment(a_nD: torch.Tensor, b_nD: torch.Tensor) -> float:
    """Mean ‖a − b‖² of positive pairs on the unit sphere. Reference: Wang and Isola 2020."""
    total = sum(float((a_bD - b_bD).square().sum()) for a_bD, b_bD in zip(_unit_blocks(a_nD), _unit_blocks(b_nD), strict=True))
    return total / len(a_nD)


def uniformity(rows_nD: torch.Tensor) -> float:
    """log mean exp(−2‖u − v‖²) over all pairs within one view, on the unit sphere. Reference: Wang and Isola 2020.

    0 if all rows are equal; lower is more uniform.
    """
    blocks = [block.to(rows_nD.dtype) for block in _unit_blocks(rows_nD)]
    total, count = 0.0, len(rows_nD)
    for number, u_bD in enumerate(blocks):
        for other, v_bD in enumerate(blocks[number:]):
            for u_pD in u_bD.split(_PAIR_ROWS):
                spread = torch.exp(4 * (u_pD @ v_bD.T).double() - 4).sum()  # ‖u − v‖² = 2 − 2 u·v
                total += float(spread) * (2 if other else 1)
    return math.log((total - count) / (count * (count - 1)))


def _unit_blocks(rows_nD: torch.Tensor) -> Iterator[torch.Tensor]:
    for block_bD in rows_nD.split(_ROWS):
        yield F.normalize(block_bD.double(), dim=1)


# ---- the protocol ----


@dataclass(frozen=True)
class GeometrySettings(Section, prefix="geometry"):
    """Settings of the protocol `geometry`."""

    images: int = setting(25_600, ge=10, help="Train images; of more, a fixed random subset. RankMe: 25,600.")


class Geometry(EvaluationProtocol):
    """Effective rank, decay of the spectrum, alignment and uniformity of features and projections of train images."""

    name, title, unit = "geometry", "effective rank", ""
    uses_labels = False
    collective = True
    Settings = GeometrySettings

    def run(self, subject: Subject) -> dict[str, float]:
        """Alignment is of two views under the run's own augmentation; everything else of images as they are."""
        model, place = subject.parts()
        images, settings = place.images(place.config.data.train_split, self.own.images), place.config.augment

        def work(_: int, views: Views) -> dict[str, torch.Tensor]:
            plain = _rows(place, model, place.pixels(views.views, model))
            ids = views.positions.numpy()
            pair = (view_of(views.views, ids, subject.seed, view, settings, model.mean.device) for view in (0, 1))
            a, b = (_rows(place, model, pixels.to(model.mean)) for pixels in pair)
            unit = [{name: F.normalize(rows.double(), dim=1) for name, rows in one.items()} for one in (a, b)]
            distances = {f"{name} distance": (unit[0][name] - unit[1][name]).square().sum(1) for name in plain}
            return {**plain, **distances}

        key = {"geometry": repr(settings), "seed": subject.seed}
        (found,) = over_batches(subject, images, key, work, "geometry")
        metrics: dict[str, float] = place.world.run_on_main(lambda: _measures(found, subject.device))
        return metrics

    def describe(self, settings: Mapping[str, Any]) -> str:
        return f"RankMe of the features of up to {settings['images']:,} train images: a number of dimensions, not an accuracy"


def _rows(place: Place, model: PretrainModel, pixels_b3SS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features (b, F) and, if there is a projector, projections (b, D), float32."""
    set_route(model.projector, model.evaluated_route)
    with place.autocast():
        features = model.features(pixels_b3SS)
        rows = {"features": features, **({"projections": model.projector(features)} if len(model.projector) else {})}
    return {name: value.float() for name, value in rows.items()}


def _measures(found: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in [name for name in ("features", "projections") if name in found]:
        rows_nD = found[name].to(device)
        spectrum = alpha_req(rows_nD)
        values = {
            "rank_me": rank_me(rows_nD),
            "alpha_req": spectrum.alpha,
            "alpha_req_r2": spectrum.r_squared,
            "alignment": float(found[f"{name} distance"].mean()),
            "uniformity": uniformity(rows_nD),
            "width": float(rows_nD.shape[1]),
        }
        metrics |= {f"{name}_{measure}": value for measure, value in values.items() if math.isfinite(value)}
    return {**metrics, "images": float(len(found["features"]))}


def view_of(
    images_n3SS: torch.Tensor, ids_n: np.ndarray, seed: int, view: int, settings: Augment, device: torch.device
) -> torch.Tensor:
    """Augmented float32 images in [0, 1] on `device`, of uint8 ones on the CPU: a pure function of image, id, seed and view."""
    side = images_n3SS.shape[2]
    draws = uniforms(CROP_DRAWS + AUGMENT_DRAWS, seed, 0x6765, view, ids_n)
    sides = np.full(len(ids_n), side)
    boxes = crop_boxes(draws[:, :CROP_DRAWS], sides, sides, settings.crop_scale, settings.crop_ratio)
    cuts = torch.stack([resized_crop(image, box, side) for image, box in zip(images_n3SS, boxes, strict=True)])
    rest = torch.from_numpy(draws[:, CROP_DRAWS:]).float().clamp_max(1 - 2**-24)
    return augment_views(cuts[None], rest[None], [settings], device, torch.float32)[0]
