"""`Step`: all that a method may use to embed, contrast and attack images.

# B rows on this rank, N rows on all ranks, D embedding width. x, y two views of the images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from clae_dist.config.method import Route
from clae_dist.contrast.attacks import ALL, Attacking, Attacks
from clae_dist.contrast.method import State
from clae_dist.objectives.form import Rows
from clae_dist.objectives.multi_view import ViewPairs


@dataclass(frozen=True)
class Moment:
    """Where in a run a step is: `step` steps were taken before."""

    step: int = 0
    steps_per_epoch: int = 1
    epochs: float = 1.0  # of the whole run


class Step(Attacks, ABC):
    """One step as a method sees it. What it did is recorded for the tools that look at a step."""

    def __init__(self, run: Attacking, batch: Any, moment: Moment) -> None:
        super().__init__(run, batch)
        self.moment = moment
        self.more_views: list[torch.Tensor] = []
        self.kept: State = {}  # by `losses` for `after_update`

    @property
    def state(self) -> State:
        """The method's tensors that outlive a step (see Method.state)."""
        return self.run.state

    @property
    def step(self) -> int:
        """Number of steps taken before this one."""
        return self.moment.step

    @property
    def epoch(self) -> float:
        """Number of epochs before this step."""
        return self.moment.step / self.moment.steps_per_epoch

    @property
    def epochs(self) -> float:
        """Number of epochs of the whole run."""
        return self.moment.epochs

    def steps(self, epochs: float) -> int:
        """Number of steps in so many epochs."""
        return round(epochs * self.moment.steps_per_epoch)

    @property
    def temperature(self) -> float:
        """The objective's."""
        return self.run.contrast.temperature

    @property
    def augmentation(self) -> float:
        """Share of the augmentation's full strength (augment.anneal_epochs), 1 at the start of a run."""
        return float(getattr(self._batch, "strength", 1.0))

    @property
    def third(self) -> torch.Tensor:
        """The third view of the images, (B, 3, S, S), where `MethodSettings.third_view` asks for one."""
        return self.more_views[0]

    @property
    def local(self) -> list[torch.Tensor]:
        """The small crops of the images, each (B, 3, s, s), where views.local_crops asks for them."""
        return self.more_views[self.run.method.settings.third_view != "none" :]

    @property
    def ids(self) -> torch.Tensor:
        """Index of each sample in its split, (B,)."""
        ids: torch.Tensor = self._batch.ids
        return ids

    @property
    def labels(self) -> torch.Tensor:
        """Label of each sample, -1 without one, (B,)."""
        labels: torch.Tensor = self._batch.labels
        return labels.to(self.run.pixel_std.device, non_blocking=True)

    @property
    def pseudo_labels(self) -> torch.Tensor:
        """Each image's cluster in every clustering of MethodSettings.cluster_counts, (B, clusterings); -1: not clustered."""
        return self.run.pseudo_labels[self.ids.cpu()].long().to(self.run.pixel_std.device, non_blocking=True)

    # ---- embeddings and losses ----

    @abstractmethod
    def embed(self, images: torch.Tensor, route: Route = "clean", *, image_gradient: bool = False) -> Rows:
        """Rows of `images`, trained: gradients of every loss on them reach the encoder. Collective.

        They are projections of unit length, or features as they are (MethodSettings.embeds).
        With `image_gradient` the rows can serve `attack(through=…)` or `image_gradient` later.
        """

    def embed_views(self, *clean: torch.Tensor, adversarial: Sequence[torch.Tensor] = ()) -> list[Rows]:
        """`embed` of several views along the clean route, and of those along the adversarial one, in this order. Collective.

        They are embedded in one forward where that costs less: each batch norm then communicates once for all of them, and
        sharded parameters are gathered once. Each view keeps its own batch statistics.
        """
        return [self.embed(images) for images in clean] + [self.embed(images, "adversarial") for images in adversarial]

    @abstractmethod
    def classify(self, images: torch.Tensor, route: Route = "clean") -> torch.Tensor:
        """Logits (B, classes) of this rank's images by the classifiers on the features, trained. Collective with sharded
        parameters. An `embed` comes before it, unless MethodSettings.embeds is "logits"."""

    def embed_constant(self, images: torch.Tensor, route: Route = "clean", *, momentum: bool = False) -> Rows:
        """Rows of `images` without gradients; running statistics are not updated. Collective.

        With `momentum`, by the momentum encoder, or the frozen one (MethodSettings.key_decay). It uses no batch statistics, or
        (key_statistics "own") its batch's, which then change its running ones. It comes before every `embed` of the step, whose
        graph would not outlive the exchange of weights.
        """
        if momentum:
            return self.run.contrast.rows(self.run.encoding.keys(images, route))
        with self.run.encoding.backend.untouched():
            return self.run.contrast.rows(self.run.encoding.constant(images, route))

    def classify_constant(self, images: torch.Tensor, route: Route = "clean") -> torch.Tensor:
        """The logits of `classify` without gradients; running statistics are not updated. Collective with sharded
        parameters."""
        with self.run.encoding.backend.untouched():
            return self.run.encoding.constant(images, route, "logits")

    def reverse_gradients(self, weight: float) -> None:
        """From now on, gradients of the domain's logit reach the features times -`weight` (models/domain_head.py). A step that
        trains nothing takes no gradients."""

    def features(self, images: torch.Tensor, route: Route = "clean") -> torch.Tensor:
        """The encoder's features (B, F) of this rank's images, without gradients; running statistics are not updated.
        Collective with sharded parameters."""
        with self.run.encoding.backend.untouched():
            return self.run.encoding.constant(images, route, "features")

    def regions(self, images: torch.Tensor, boxes_BL4: torch.Tensor, route: Route = "clean") -> torch.Tensor:
        """Rows (B, L, D) of regions of this rank's images, from the map that the encoder pools, without gradients; running
        statistics are not updated. Collective with sharded parameters.

        Args:
            boxes_BL4: left, top, right and bottom as shares of an image's side.
        """
        with self.run.encoding.backend.untouched():
            return self.run.encoding.regions(images, boxes_BL4, route)

    def uniform(self, count: int) -> torch.Tensor:
        """`count` uniform numbers in [0, 1) for each image, (B, count), a function of the seed, the epoch and the sample."""
        noise: torch.Tensor = self.run.noise(self._batch, 0)
        return noise.flatten(1)[:, :count]

    def contrast(self, anchors: Rows, keys: Rows) -> torch.Tensor:
        """The objective of the run: this rank's share, the mean over its anchors. Collective."""
        return self.run.contrast(anchors, keys)

    def spread_positives(self, a: Rows, b: Rows, groups_B: torch.Tensor) -> torch.Tensor:
        """The change of NT-Xent between a and b when all images of a group, such as a class, are each other's positives: this
        rank's share. An image of a negative group has no others. Collective."""
        return self.run.contrast.spread_positives(a, b, groups_B)

    def contrast_clusters(
        self, a: Rows, b: Rows, centroids_CD: torch.Tensor, started: torch.Tensor, margin: tuple[float, float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The InfoNCE of a to b with each image's second nearest centroid as a further column, and the margins that rows of
        one cluster are outside of (objectives/clusters.py): this rank's shares. Collective, in the backward as well.

        Args:
            started: (1,), false while there are no centroids yet.
            margin: least and largest difference of a false negative's similarity to the positive's.
        """
        return self.run.contrast.clusters(a, b, centroids_CD, started, margin)

    def contrast_views(self, views: Sequence[Rows], pairs: ViewPairs) -> torch.Tensor:
        """The loss `pairs` on V views: this rank's share, the mean over its images. Collective if pairs are live.

        It has the temperature of the run's objective, and no other of its settings.
        """
        return self.run.contrast.of_views(pairs, views)

    def decided(self, decide: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The result of `decide` on rank 0, on every rank, on the CPU: for libraries whose last bits differ between machines.
        Collective."""
        return self.run.world.run_on_main(decide)

    def everyones(self, values: torch.Tensor) -> torch.Tensor:
        """(B, …) of this rank to (N, …) of all, with gradient: for a loss of the whole batch that every rank computes alike.
        Collective, in the backward as well."""
        return self.run.contrast.everyones(values)

    def match(
        self,
        queries: Rows,
        keys: Rows,
        queue_KD: torch.Tensor | None,
        *,
        with_batch: bool,
        index: Any = ALL,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean over this rank's queries of the cross-entropy of a query's similarity to its own key, among that key, the
        rows of the queue and, `with_batch`, the keys of all other images of the global batch.

        Keys and queue are constants: a query has the gradient of its own term alone, and no gradient returns from other ranks.

        Args:
            index: the images of `keys` that the queries are of (see `choose`).
            targets: the wanted shares of a query's own key and of the rows of the queue, (queries, 1 + K), constant; without
                them the own key has all.
        Reference: He et al. 2020, equation 1.
        """
        return self.run.contrast.match(queries.mine, keys, queue_KD, with_batch=with_batch, index=index, targets=targets)

    def shares(self, rows_BD: torch.Tensor, keys: Rows, queue_KD: torch.Tensor) -> torch.Tensor:
        """The softmax (B, 1 + K) of this rank's rows over their own key and the queue: constant `targets` of `match`."""
        return self.run.contrast.shares(rows_BD, keys, queue_KD)

    def match_groups(
        self, queries: Rows, keys: Rows, groups_N: torch.Tensor, queue: tuple[torch.Tensor, torch.Tensor], others: float
    ) -> torch.Tensor:
        """The cross-entropy of this rank's queries to their own key and, with the weight `others` in relation to it, to all
        other rows of their group among queries, keys and queue. Collective, in the backward as well: queries are columns.

        Args:
            groups_N: of all images of the global batch; negative ones are no group.
            queue: rows (K, D) and their groups, UNWRITTEN for rows that are no columns.
        """
        return self.run.contrast.match_groups(queries, keys, groups_N, queue, others)

    def choose(self, count: int, num_rows: int) -> Any:
        """An index of `count` of this rank's `num_rows` rows, evenly spaced: the same images for every number of ranks."""
        return evenly_spaced(count, num_rows, self.run.pixel_std.device)

    def select(self, rows: Rows, index: Any) -> Rows:
        """The rows at `index` (see `choose`) of every rank."""
        if isinstance(index, slice):
            return rows
        all_ND = rows.all.view(-1, len(rows.mine), rows.all.shape[1])[:, index]
        return Rows(rows.mine[index], all_ND.reshape(-1, rows.all.shape[1]))

    @abstractmethod
    def image_gradient(self, loss: torch.Tensor, rows: Rows) -> torch.Tensor:
        """∂ loss / ∂ images of `rows`, from the backward of `loss` that the step needs anyway. Use within `reduction_held`.

        The weight of `loss` in the step's total must be 1.
        """

    def reduction_held(self) -> AbstractContextManager[Any]:
        """Inside, an early backward (`image_gradient`) reduces no gradients over ranks: the step's last one does, once."""
        return nullcontext()


def two_views(views: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The views of a batch, of which the second is the first again for a method of one view."""
    return views if len(views) > 1 else (views[0], views[0])


def evenly_spaced(count: int, num_rows: int, device: torch.device | None = None) -> Any:
    """Row i where (i + 1) · count / num_rows reaches the next integer; made on the device, so that nothing waits for it."""
    if count == num_rows:
        return ALL
    return (torch.arange(1, count + 1, device=device) * num_rows + count - 1) // count - 1
