"""The term of small crops (views.local_crops), for methods on two views.

Reference: Caron et al. 2020, Unsupervised learning of visual features by contrasting cluster assignments, section 3.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clae_dist.objectives.multi_view import ViewPairs

if TYPE_CHECKING:
    from clae_dist.contrast.interface import Step
    from clae_dist.contrast.method import Terms
    from clae_dist.objectives.form import Rows


def local_terms(s: Step, a: Rows, b: Rows) -> Terms:
    """{"local": (1, the mean over small crops and the two views of a crop's loss towards that view)}; {} without crops.

    Crops are anchors alone; the rows of both views and of all crops, of all images, are in the denominators.
    """
    crops = [s.embed(images) for images in s.local]
    pairs = {(2 + crop, view): 1 / (2 * len(crops)) for crop in range(len(crops)) for view in (0, 1)}
    return {"local": (1.0, s.contrast_views([a, b, *crops], ViewPairs(live=pairs)))} if crops else {}
