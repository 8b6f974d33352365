"""ClusterNS: hard negatives and false negatives from an online clustering of the embeddings, here of images.

Reference: Deng et al. 2023, Clustering-aware negative sampling for unsupervised sentence representation, and its public code.

# B rows on this rank, N rows on all ranks, C centroids, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from clae_dist.config import Attack, MethodSettings
from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, State, Terms
from clae_dist.errors import ConfigError
from clae_dist.methods.labelled import check_no_objective

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Config
    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class ClusterNsSettings(MethodSettings):
    """The keys `method.*` of ClusterNS."""

    title: ClassVar[str] = "ClusterNS"
    name: str = name_of("clusterns")
    clusters: int = setting(40, ge=2, hint="about four for each class", help="Number of centroids.")
    start_similarity: float = setting(
        0.4, ge=-1, le=1, help="Clustering starts when the mean similarity of a batch's embeddings is no larger."
    )
    rate: float = setting(1e-3, gt=0, le=1, help="Weight of the sum of a cluster's new members in its moved centroid.")
    false_weight: float = setting(1e-3, ge=0, zero="none", help="Weight of the margins of false negatives.")
    near: float = setting(
        0.1, ge=0, used_by="method.false_weight", help="False negatives are at least so much less similar than the positive."
    )
    far: float = setting(0.5, ge=0, used_by="method.false_weight", help="False negatives are at most so much less similar.")

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float:
        return 6

    def check_run(self, config: Config) -> None:
        check_no_objective(config)
        size = config.batch.global_size
        if self.clusters > size:
            raise ConfigError(
                f"method.clusters is {self.clusters}, but the first centroids are of one batch, and batch.global_size is "
                f"{size}; use at most {size}."
            )

    def check(self, attack: Attack) -> None:
        self.require(self.near <= self.far, "near", f"method.far is {self.far:g}; use near <= far.")

    def from_the_start(self) -> Self:
        return replace(super().from_the_start(), start_similarity=1.0)

    def for_few_rows(self, global_size: int) -> Self:
        return replace(super().for_few_rows(global_size), clusters=min(self.clusters, global_size // 2))


class ClusterNs(Method):
    """InfoNCE(z(x), z(y)), x as the anchors, with a hard negative of each image as a further column, plus w · margins.

    The hard negative of image i is the second nearest centroid of z(x_i). Images of one cluster are false negatives, whose
    similarity s_ij is kept between s_ii - far and s_ii - near. Centroids are constant in a step and follow all images of the
    global batch after it.
    """

    Settings = ClusterNsSettings
    settings: ClusterNsSettings

    def state(self, embedding_dim: int, seed: int) -> State:
        import torch

        return {"centroids": torch.zeros(self.settings.clusters, embedding_dim), "started": torch.zeros(1, dtype=torch.bool)}

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        settings = self.settings
        a, b = s.embed_views(x, y)
        s.kept["rows"] = a.all.detach()
        clean, margins = s.contrast_clusters(
            a, b, s.state["centroids"], s.state["started"], margin=(settings.near, settings.far)
        )
        terms: Terms = {"clean": (1.0, clean)}
        if settings.false_weight:
            terms["false_negatives"] = (settings.false_weight, margins)
        return terms

    def after_update(self, s: Step) -> None:
        from clae_dist.objectives.clusters import farthest_points, mean_similarity, moved

        rows_ND, centroids_CD, started = s.kept["rows"].to(s.state["centroids"].dtype), s.state["centroids"], s.state["started"]
        if started:
            centroids_CD.copy_(moved(centroids_CD, rows_ND, self.settings.rate))
        elif mean_similarity(rows_ND) <= self.settings.start_similarity:
            centroids_CD.copy_(farthest_points(rows_ND, len(centroids_CD)))
            started.fill_(True)
