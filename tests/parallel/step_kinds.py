"""Every pattern of forwards and backwards that training asks of a backend (what they should give: expected_steps.py).

# N rows of the global batch, B = N / W a rank, which are 2 or 3 chunks.

The loss compares row with row, so that ranks share only what a backend (and a global batch norm) makes them share.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from clae_dist.config import Attack, Config, Optim, Parallel, Train
from clae_dist.models.model import PretrainModel, mlp
from clae_dist.models.norms import Route, add_routes, use_global_statistics
from clae_dist.parallel import Backend, make_backend
from clae_dist.world import World

N, SIDE, ALPHA, EPSILON = 12, 8, 0.7, 0.03

# chunked ends with a chunk on the adversarial route only, chunked_clean with one on the clean route only.
KINDS = ("exact", "plain", "fused", "chunked", "chunked_clean")


class Residual(nn.Module):
    """x + norm(conv(x)), then ReLU. `norm` is "batch" or "group"."""

    def __init__(self, norm: str, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Blocks(nn.Module):
    """A stem and two residual blocks. No width is a multiple of 4, so that parts of parameters differ in size."""

    def __init__(self, norm: str, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width)
        self.layers = nn.Sequential(Residual(norm, width), Residual(norm, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.relu(self.norm(self.stem(x)))).mean((2, 3))


def blocks_model(norm: str, group: torch.distributed.ProcessGroup | None = None, seed: int = 3) -> PretrainModel:
    """With norm "batch": two routes, which differ, and the global batch's statistics over `group`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PretrainModel(Blocks(norm), 6, mlp(6, 7, 5), 5, (0.5,) * 3, (0.5,) * 3)
        if norm == "batch":
            add_routes(model.encoder, adversarial_momentum=0.01)
        for parameter in model.parameters():  # norm layers do not start at 1 and 0, where mistakes would hide
            nn.init.normal_(parameter, std=0.5)
    if norm == "batch":
        use_global_statistics(model.encoder, group)
    return model.train()


def images(seed: int) -> torch.Tensor:
    """(N, 3, SIDE, SIDE) in [0.2, 0.8], float64: every row another one."""
    return 0.2 + 0.6 * torch.rand(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chunk_rows(world_size: int) -> int:
    return N // world_size // 2 if N // world_size % 2 == 0 else 1


def compare(a_BD: torch.Tensor, b_BD: torch.Tensor) -> torch.Tensor:
    """A mean over rows whose gradient does not vanish at a = b."""
    return ((a_BD * b_BD).sum(1) - 0.3).square().mean() + (a_BD[:, 0] * b_BD[:, 1]).mean()


_ADAMW = Optim(name="adamw", learning_rate=0.01, weight_decay=0.1, scaling="none", warmup_epochs=0)
_FLOAT64 = Train(precision="float64")
_FSDP2 = Parallel(backend="fsdp2")


@dataclass(frozen=True)
class Setup:
    """A backend and its options, by what they are called in a Config."""

    norm: str = "batch"
    optim: Optim = _ADAMW
    train: Train = _FLOAT64
    parallel: Parallel = _FSDP2
    attack: Attack = field(default_factory=Attack)

    def config(self) -> Config:
        return Config(optim=self.optim, train=self.train, parallel=self.parallel, attack=self.attack)

    def model(self, group: torch.distributed.ProcessGroup | None = None) -> PretrainModel:
        model = blocks_model(self.norm, group)
        return model.double() if self.train.precision == "float64" else model

    def backend(self, world: World) -> Backend:
        return make_backend(self.config(), self.model(world.group), world)


@dataclass(frozen=True)
class Seen:
    """What a step did, on the CPU."""

    x_adv: torch.Tensor
    gradients: dict[str, torch.Tensor]
    norm: torch.Tensor


def attacked(backend: Backend, x: torch.Tensor) -> torch.Tensor:
    """Two steps along the sign of the input's gradient."""
    with backend.untouched(), backend.frozen():
        anchor = None
        x_try = x.detach()
        for _ in range(2):
            x_try = x_try.detach().requires_grad_()
            z = backend.attack_embed(x_try, "adversarial")
            anchor = z.detach() if anchor is None else anchor
            (gradient,) = torch.autograd.grad(compare(anchor, z), x_try)
            assert gradient.dtype == x.dtype
            x_try = x_try + EPSILON * gradient.sign()
    return x_try.detach()


def _exact(backend: Backend, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x_adv = attacked(backend, x)
    a, b, c = backend.embed(x, "clean"), backend.embed(y, "clean"), backend.embed(x_adv, "adversarial")
    backend.backward(compare(a, b) + ALPHA * compare(a, c))
    return x_adv


def _plain(backend: Backend, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    backend.backward(compare(backend.embed(x, "clean"), backend.embed(y, "clean")))
    return x


def _shared(backend: Backend, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The clean forward of x serves the attack, and the training."""
    assert backend.shares_forward()
    x_try = x.clone().requires_grad_()
    a = backend.embed(x_try, "clean")
    (gradient,) = torch.autograd.grad(compare(a.detach(), a), x_try, retain_graph=True)
    x_adv = x + EPSILON * gradient.sign()
    b, c = backend.embed(y, "clean"), backend.embed(x_adv, "adversarial")
    backend.backward(compare(a, b) + ALPHA * compare(a, c))
    return x_adv


def _fused(backend: Backend, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with backend.reduction_held():
        y_try = y.clone().requires_grad_()
        a, b = backend.embed(x, "clean"), backend.embed(y_try, "clean")
        a_leaf, b_leaf = a.detach().requires_grad_(), b.detach().requires_grad_()
        g_a, g_b = torch.autograd.grad(compare(a_leaf, b_leaf), (a_leaf, b_leaf))
        backend.backward((b * g_b).sum())
    assert y_try.grad is not None
    y_adv = y + EPSILON * y_try.grad.sign()
    c = backend.embed(y_adv, "adversarial")
    backend.backward((a * g_a).sum() + ALPHA * compare(a, c))
    return y_adv


def _chunked(backend: Backend, x: torch.Tensor, y: torch.Tensor, last: Route = "adversarial") -> torch.Tensor:
    size = chunk_rows(backend.world.size)
    x_adv = torch.cat([attacked(backend, chunk) for chunk in x.split(size)])
    views: list[tuple[torch.Tensor, Route]] = [(x, "clean"), (y, "clean"), (x_adv, "adversarial")]
    leaves = []
    with torch.no_grad(), backend.untouched():
        for view, route in views:
            leaves.append(torch.cat([backend.attack_embed(chunk, route) for chunk in view.split(size)]))
    for leaf in leaves:
        leaf.requires_grad_()
    a, b, c = leaves
    (compare(a, b) + ALPHA * compare(a, c)).backward()
    work = [
        (chunk, route, g)
        for (view, route), leaf in zip(views, leaves, strict=True)
        for chunk, g in zip(view.split(size), gradient_of(leaf).split(size), strict=True)
    ]
    work.sort(key=lambda item: item[1] == last)
    for chunk, route, g in work[:-1]:
        with backend.reduction_held():
            backend.backward((backend.embed(chunk, route) * g).sum())
    chunk, route, g = work[-1]
    backend.backward((backend.embed(chunk, route) * g).sum())
    return x_adv


def gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _chunked_clean(backend: Backend, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _chunked(backend, x, y, "clean")


STEPS = {
    "exact": _exact,
    "plain": _plain,
    "shared": _shared,
    "fused": _fused,
    "chunked": _chunked,
    "chunked_clean": _chunked_clean,
}


def mine(world: World, rows: torch.Tensor) -> torch.Tensor:
    """This rank's B rows."""
    return rows[world.rank * N // world.size : (world.rank + 1) * N // world.size]


def views(world: World, number: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of step `number`, this rank's rows."""
    return mine(world, images(2 * number)).to(dtype), mine(world, images(2 * number + 1)).to(dtype)


def take_step(backend: Backend, kind: str, number: int) -> Seen:
    """One training step of that kind on the images of step `number`."""
    x, y = views(backend.world, number, torch.float64 if backend.precision == "float64" else torch.float32)
    x_adv = STEPS[kind](backend, x, y)
    gradients = backend.gradients()
    return Seen(x_adv, gradients, backend.update().norm)
