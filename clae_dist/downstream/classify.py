"""A classifier on the encoder: its head alone, the last blocks, or the whole network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from clae_dist.config.method import name_of
from clae_dist.config.rules import setting
from clae_dist.contrast.method import Method, State, Terms
from clae_dist.downstream.task import TaskSettings, cross_entropy_each
from clae_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from clae_dist.config import Attack
    from clae_dist.config.method import TrainingSet
    from clae_dist.contrast.interface import Step


@dataclass(frozen=True)
class ClassifySettings(TaskSettings):
    """The keys `method.*` of the task `classify`."""

    title: ClassVar[str] = "fine-tuned classifier"
    name: str = name_of("classify")
    smoothing: float = setting(0.0, ge=0, lt=1, zero="none", help="Label smoothing: the share that all classes have alike.")
    balanced: bool = setting(
        False, help="All classes count alike: every image weighs as the inverse of its class's share of the training set."
    )
    class_counts: tuple[int, ...] = setting(
        (),
        ge=0,
        used_by="method.balanced",
        help="Images of each class of the training set. `clae finetune` takes them from the set.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            len(self.class_counts) in (0, self.classes), "class_counts", f"give {self.classes} numbers, as method.classes says."
        )

    def check_set(self, of_set: TrainingSet) -> None:
        super().check_set(of_set)
        counts = of_set.class_counts or self.class_counts  # a set without a record of them: as its user says
        if self.balanced and (not counts or list(counts) != list(self.class_counts)):
            raise ConfigError(
                f"method.class_counts is {list(self.class_counts)}, but method.balanced needs the images of each class of "
                f"{of_set.where}" + (f": {list(counts)}." if counts else "; count and name them.")
            )

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float | None:
        """Training the head alone costs a forward; of the last blocks it depends on the encoder."""
        return {-1: 3.0, 0: 1.0}.get(self.blocks)

    def weights(self) -> list[float]:
        """Weight of an image of each class; 1 on average over the images of the training set."""
        present = [count for count in self.class_counts if count]
        total = sum(present)
        return [total / (len(present) * count) if count else 0.0 for count in self.class_counts]


class Classify(Method):
    """The mean over the images of the cross-entropy of their labels; with method.balanced each weighs as its class asks."""

    Settings = ClassifySettings
    settings: ClassifySettings

    def state(self, embedding_dim: int, seed: int) -> State:
        """Weights of an image of each class, and 0 of one without a label, which is the last."""
        import torch

        balanced = self.settings.balanced and self.settings.class_counts
        return {"weights": torch.tensor([*self.settings.weights(), 0.0], dtype=torch.float64)} if balanced else {}

    def losses(self, s: Step, x: torch.Tensor, y: torch.Tensor) -> Terms:
        each_B = cross_entropy_each(s.classify(x), s.labels, self.settings.smoothing)
        if "weights" in s.state:
            each_B = each_B * s.state["weights"][s.labels]
        return {"clean": (1.0, each_B.mean())}
