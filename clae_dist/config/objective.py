"""Settings of the objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clae_dist import objectives
from clae_dist.config.rules import Section, setting


@dataclass(frozen=True)
class Objective(Section, prefix="objective"):
    """The contrastive loss."""

    name: str = setting(
        "nt_xent",
        help="The loss: nt_xent (SimCLR), instance (one direction across views), decoupled, debiased, hard, ifm, uel, or "
        "package.module:function for one of your own.",
    )
    temperature: float = setting(0.5, gt=0, hint="0.1 to 0.5 is usual", help="Divisor of the cosines.")
    tau_plus: float = setting(
        0.1,
        ge=0,
        lt=1,
        used_by="objective.name=debiased or hard",
        help="Assumed share of negatives that are of the anchor's class.",
    )
    beta: float = setting(
        1.0, ge=0, used_by="objective.name=hard", help="Concentration on similar negatives; 0 weights all the same."
    )
    margin: float = setting(
        0.1, ge=0, used_by="objective.name=ifm", help="Length of the adversarial step on the embeddings, in cosines."
    )
    mix: float = setting(
        0.5, ge=0, le=1, used_by="objective.name=ifm", help="Weight of the modified loss; the plain one has the rest."
    )
    gather: Literal["auto", "log_sum_exp", "reduce_scatter"] = setting(
        "auto",
        no_effect=True,
        help="How ranks share negatives. log_sum_exp: embeddings and one or two numbers per row; reduce_scatter: embeddings "
        "and their gradients, for any objective, on the whole similarity matrix. auto: log_sum_exp if the objective allows it.",
    )
    chunk: int = setting(
        0,
        ge=0,
        zero="automatic",
        hint="2048 is usual",
        no_effect=True,
        help="Columns of the similarity matrix computed at a time.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        objectives.check_name(self.name)
        if ":" in self.name:
            return  # imported, and known, when a run starts
        uses = objectives.find(self.name).uses
        for key in ("tau_plus", "beta", "margin", "mix"):
            default = type(self).__dataclass_fields__[key].default
            unused = f"objective.name={self.name} does not use it; remove it, or use another objective."
            self.require(key in uses or getattr(self, key) == default, key, unused)
