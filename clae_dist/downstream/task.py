"""Base of the tasks: a head on the encoder's features, trained with labels.

# B rows on this rank, C classes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from clae_dist.config import MethodSettings
from clae_dist.config.rules import setting
from clae_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from clae_dist.config import Attack, Config
    from clae_dist.config.method import TrainingSet


@dataclass(frozen=True)
class TaskSettings(MethodSettings):
    """The keys `method.*` that all tasks have."""

    embeds: ClassVar[Literal["projections", "features", "logits"]] = "logits"
    one_view: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    classes: int = setting(
        10, ge=2, help="Classes of the head: those of the training set. `clae finetune` takes their number from the set."
    )
    blocks: int = setting(
        -1,
        ge=-1,
        hint="-1 trains the whole encoder, 0 the head alone",
        help="Blocks of the encoder that are trained besides the head, counted from the encoder's end; -1: all of it. Batch "
        "norms before them keep their running statistics.",
    )

    @property
    def num_classes(self) -> int:
        return self.classes

    @property
    def trained_blocks(self) -> int:
        return self.blocks

    def make_classifiers(self, width: int) -> nn.Module:
        """A linear layer that starts at zero, so that no random head moves the encoder at first."""
        return zero_head(width, self.classes)

    def check_run(self, config: Config) -> None:
        super().check_run(config)
        if self.blocks >= 0 and config.parallel.backend == "deepspeed" and config.parallel.zero_stage:
            raise ConfigError(
                f"method.blocks is {self.blocks}, but ZeRO of parallel.zero_stage={config.parallel.zero_stage} shards the "
                "state of all parameters; use parallel.backend=ddp or fsdp2, or method.blocks=-1."
            )

    def check_set(self, of_set: TrainingSet) -> None:
        super().check_set(of_set)
        if self.classes != len(of_set.classes):
            some = ", ".join(of_set.classes[:5]) + (", …" if len(of_set.classes) > 5 else "")
            raise ConfigError(
                f"method.classes is {self.classes}, but {of_set.where} has {len(of_set.classes)} classes ({some}); use "
                f"method.classes={len(of_set.classes)}."
            )

    def describe(self, attack: Attack) -> str:
        trained = {-1: "the whole encoder", 0: "the head alone"}.get(self.blocks, f"the last {self.blocks} blocks and the head")
        return f"task: {self.name}, {self.classes} classes; trained: {trained}"


def zero_head(width: int, classes: int) -> nn.Linear:
    """A linear layer (B, width) to (B, classes) of zeros."""
    from torch import nn

    head = nn.Linear(width, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def cross_entropy_each(logits: torch.Tensor, labels_B: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Losses (B,) of logits (B, C); an image without a label (-1) has the loss 0.

    Args:
        smoothing: share of the wanted distribution that all classes have alike (Szegedy et al. 2016, section 7).
    """
    import torch.nn.functional as F

    return F.cross_entropy(logits, labels_B, ignore_index=-1, label_smoothing=smoothing, reduction="none")
