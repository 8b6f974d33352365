"""A method's losses and attacks on one process, for comparison with the paper's formulas written out."""

from __future__ import annotations

import torch

from clae_dist.config import Attack, Batch, Config, Data, MethodSettings, Model, Objective, Optim, Train
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.method import Terms
from clae_dist.contrast.step import TrainingStep
from clae_dist.models import PretrainModel
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.world import World
from tests import steps
from tests.networks import small_model

N, SIDE, TEMPERATURE = 6, 8, 0.5
PGD = Attack("pgd", epsilon=0.03, steps=3, step_size=0.012, random_start=True, statistics="running")


def noise(view: int) -> torch.Tensor:
    return torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(50 + view), dtype=torch.float64)


class Pair(tuple[torch.Tensor, ...]):
    """Two views as a batch, with the ids of its images."""

    ids: torch.Tensor


class Tried:
    """A method in its first step on one process, with `model`, the terms of its loss and its attacked images."""

    def __init__(
        self,
        method: MethodSettings,
        attack: Attack = PGD,
        norm: str = "batch",
        order: list[int] | None = None,
        *,
        swap: bool = False,
        same: bool = False,
        objective: Objective | None = None,
    ) -> None:
        config = Config(
            data=Data(image_size=SIDE),
            batch=Batch(global_size=N),
            model=Model(init="pretrained"),  # read nowhere here, and required by a method that starts from weights
            method=method,
            attack=attack,
            objective=objective or Objective(temperature=TEMPERATURE),
            optim=Optim(name="sgd", learning_rate=0.1, scaling="none", warmup_epochs=0),
            train=Train(precision="float64"),
        )
        clusters = sum(method.cluster_counts)
        self.backend = DdpBackend(config, small_model(norm, 3, clusters=clusters), World.single("cpu"))
        self.model = self.backend.model.train()
        for buffer in self.model.buffers():  # running statistics as after some training
            if buffer.dtype == torch.float64 and buffer.dim() == 1:
                buffer.copy_(
                    0.3 + 0.2 * torch.rand(buffer.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
                )
        chosen = slice(None) if order is None else order
        self.x, self.y = (steps.images(view, N, SIDE)[chosen] for view in ((1, 0) if swap else (0, 1)))
        if same:  # two equal views, with equal perturbations
            self.y = self.x
        run = steps.pretraining(config, self.backend.world, self.backend)
        noises = [noise(0 if same else 1 - view if swap else view)[chosen] for view in (0, 1)] + [noise(2)[chosen]]
        self.third = steps.images(9, N, SIDE)[chosen]
        run.__dict__["noise"] = lambda _, view: noises[view]
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        batch = Pair((self.x, self.y))
        batch.ids = torch.arange(N)[chosen]
        self.step = TrainingStep(run, batch, Moment())
        self.step.more_views = [self.third] if method.third_view != "none" else []
        self.terms: Terms = run.method.losses(self.step, self.x, self.y)

    def as_before(self) -> PretrainModel:
        """The model as the attack saw it, in evaluation mode."""
        self.model.load_state_dict(self.before)
        return self.model.eval()

    @property
    def attacked(self) -> list[torch.Tensor]:
        return [one.found.images for one in self.step.attacks]


def nt_xent(a: torch.Tensor, b: torch.Tensor, *, constant: bool = False) -> torch.Tensor:
    """NT-Xent of two views as one sum over anchors; `constant`: the rows that an anchor is compared with have no gradient."""
    z = torch.cat([a, b])
    columns = z.detach() if constant else z
    s = (z @ columns.T / TEMPERATURE).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    own = torch.arange(len(z))
    return (s.logsumexp(1) - s[own, (own + len(a)) % len(z)]).mean()
