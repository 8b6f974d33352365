"""Small networks for tests, as PretrainModel."""

from __future__ import annotations

import torch
from torch import nn

from clae_dist.models.model import PretrainModel, mlp
from clae_dist.models.norms import ROUTES, add_routes, use_global_statistics


class OneLayer(nn.Module):
    """Convolution, norm, ReLU, mean. `norm` is "batch" or "group" (no batch statistics)."""

    def __init__(self, norm: str, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x))).mean((2, 3))


def small_model(
    norm: str,
    seed: int,
    group: torch.distributed.ProcessGroup | None = None,
    mean: float = 0.5,
    std: float = 0.5,
    clusters: int = 0,
) -> PretrainModel:
    """A float64 model; with norm "batch" it has two routes and the global batch's statistics over `group`.

    With classifiers of so many `clusters` it has three.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PretrainModel(OneLayer(norm), 8, mlp(8, 8, 6), 6, (mean,) * 3, (std,) * 3)
        for parameter in model.parameters():  # norm layers do not start at 1 and 0, where mistakes would hide
            nn.init.normal_(parameter, std=0.5)
        model.classifiers = nn.Linear(8, clusters) if clusters else None
    if norm == "batch":
        add_routes(model.encoder, 0.01, ROUTES if clusters else ROUTES[:2])
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed + 1)
            for parameter in model.encoder.norm.adversarial.parameters():  # type: ignore[union-attr]
                parameter.normal_(std=0.5)
        use_global_statistics(model.encoder, group)
    return model.double()
