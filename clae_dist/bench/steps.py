"""The training steps that `clae bench step` compares, and checks that each computes its algorithm.

# B images, both views, one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from clae_dist.bench.measure import assert_equal
from clae_dist.config import Attack, Batch, Config, Data, MethodSettings, Model, Objective, Optim, Train
from clae_dist.contrast.interface import Moment, evenly_spaced
from clae_dist.contrast.look import look
from clae_dist.contrast.step import Pretraining, pretrain_step
from clae_dist.methods.advcl import AdvCl
from clae_dist.methods.adversarial_term import AdversarialTerm
from clae_dist.methods.clae import Clae
from clae_dist.methods.clae_fused import ClaeFused
from clae_dist.methods.simclr import SimClr
from clae_dist.models import PretrainModel, build_model
from clae_dist.models.model import mlp
from clae_dist.models.norms import add_routes
from clae_dist.objectives.form import Rows
from clae_dist.parallel import make_backend
from clae_dist.recipe import recipe_names, resolve
from clae_dist.training.clock import Clock
from clae_dist.training.pretraining import make_pretraining
from clae_dist.world import World


@dataclass(frozen=True)
class Kind:
    """An encoder and what it is trained on."""

    name: str
    encoder: str  # as model.encoder, or "four_blocks/NAME", the first blocks of timm's ViT of that name
    image_size: int
    batch: int
    precision: str = "float32"
    compile: bool = False
    every_method: bool = False  # a row for each method of the recipes, besides CLAE's

    def title(self) -> str:
        compiled = ", compiled" if self.compile else ""
        return f"{self.name} at {self.image_size} px, batch {self.batch}, {self.precision}{compiled}"


@dataclass(frozen=True)
class Variant:
    """The settings of a compared step; encoder and projector are those of all others."""

    method: MethodSettings
    attack: Attack = field(default_factory=Attack)
    objective: Objective = field(default_factory=Objective)
    init: str = ""  # the weights that the method would begin with

    def units(self, *, shared_norms: bool) -> float | None:
        """See MethodSettings.units."""
        return self.method.units(self.attack, shared_norms=shared_norms)


@dataclass(frozen=True)
class Images:
    """A batch: three views (B, 3, S, S) of random images, and what methods may ask about them."""

    views: tuple[torch.Tensor, ...]
    ids: torch.Tensor
    labels: torch.Tensor


def variants(kind: Kind) -> dict[str, Variant]:
    """The compared steps by the names of their rows."""
    compared = {
        "plain": Variant(SimClr.Settings()),
        "original": Variant(Clae.Settings(cost="original")),
        "exact": Variant(Clae.Settings()),
        "fused": Variant(ClaeFused.Settings()),
        "fused_half": Variant(ClaeFused.Settings(fraction=0.5)),
    }
    return compared | (_of_recipes(compared, kind.batch) if kind.every_method else {})


def _of_recipes(compared: Mapping[str, Variant], batch: int) -> dict[str, Variant]:
    """The first of CIFAR-10's recipes for each method and cost that is not compared yet, by its name, and AdvCL with
    the cross-entropy that no recipe has."""
    seen = {(variant.method.name, variant.units(shared_norms=False)) for variant in compared.values()}
    found = {}
    for recipe in recipe_names():
        folder, _, name = recipe.rpartition("/")
        if folder != "cifar10":
            continue
        config = resolve(recipe).config
        variant = Variant(config.method.for_few_rows(batch), config.attack, config.objective, config.model.init)
        cost = (variant.method.name, variant.units(shared_norms=False))
        if cost not in seen:
            seen.add(cost)
            found[name] = variant
    found["advcl_pseudo_labels"] = replace(found["advcl"], method=AdvCl.Settings(pseudo_labels="made up"))
    return found


def make_images(kind: Kind, device: torch.device) -> Images:
    """Random images with pixels in [0.1, 0.9], in two classes."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, kind.batch, 3, kind.image_size, kind.image_size)
    dtype = torch.float64 if kind.precision == "float64" else torch.float32
    views = (0.1 + 0.8 * torch.rand(shape, generator=generator)).to(device, dtype).unbind()
    ids = torch.arange(kind.batch)
    return Images(views, ids, ids % 2)


def prepare(kind: Kind, variant: Variant, device: torch.device) -> Pretraining:
    """Make the parts of a step, under the DDP backend in a single process."""
    config = Config(
        data=Data(image_size=kind.image_size),
        batch=Batch(global_size=kind.batch),
        model=Model(encoder="small_resnet" if _few_blocks(kind) else kind.encoder, init=variant.init),
        method=variant.method,
        attack=variant.attack,
        objective=variant.objective,
        # Plain descent in float64, so that the parameters after a step determine its gradients.
        optim=Optim(name="sgd" if kind.precision == "float64" else "adamw", learning_rate=1e-3, momentum=0.0, weight_decay=0.0),
        train=Train(precision=kind.precision, compile=kind.compile),  # type: ignore[arg-type]
    )
    world = World.single(device)
    model = _small_vit(config, _few_blocks(kind)) if _few_blocks(kind) else build_model(config)
    backend = make_backend(config, model, world)
    run = make_pretraining(config, world, backend, Clock(device))
    num_views = 2 if variant.method.third_view == "none" else 3
    return replace(
        run, augment=lambda batch: batch.views[:num_views], noise=lambda batch, view: torch.rand_like(batch.views[view])
    )


def _few_blocks(kind: Kind) -> str:
    """The name of timm's ViT whose first blocks are the encoder, or ""."""
    family, _, name = kind.encoder.partition("/")
    return name if family == "four_blocks" else ""


def _small_vit(config: Config, name: str) -> PretrainModel:
    """A ViT (Touvron et al. 2021) with patches of 4 pixels and 4 blocks: 64 tokens at 32 pixels."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        size = config.data.image_size
        encoder = timm.create_model(name, img_size=size, patch_size=4, depth=4, num_classes=0)
        width = encoder.num_features
        model = PretrainModel(
            encoder,
            width,
            mlp(width, width, config.model.projector_dim),
            config.model.projector_dim,
            config.model.mean,
            config.model.std,
        )
    add_routes(model.encoder, config.model.adversarial_norm_momentum)
    return model.double() if config.train.precision == "float64" else model


# ---- comparison ----


def check(kind: Kind, device: torch.device) -> None:
    """Compare exact with original, bit for bit, and fused with the same step in one graph with an attack of its own.

    In float64, by perturbation, loss, gradient norm and the parameters after a step of plain descent. Raises UnequalError.
    """
    title, images, made = kind.title(), make_images(kind, device), variants(kind)
    # On a GPU, unlike on a CPU, the rounding of products depends on their number.
    bit_for_bit = 0.0 if device.type == "cpu" else 1e-12
    views_of = {name: _perturbed(prepare(kind, made[name], device), images) for name in ("original", "exact")}
    assert_equal(title, "exact's perturbation", [views_of["exact"]], [views_of["original"]], bit_for_bit)
    shared = prepare(kind, made["exact"], device).shared_norms
    # If the attack reuses the clean forward, gradients are added in another order.
    result, expected = (_after(prepare(kind, made[name], device), images) for name in ("exact", "original"))
    assert_equal(title, "exact", result, expected, 1e-12 if shared else bit_for_bit)
    for name in ("fused", "fused_half"):
        result = _after(prepare(kind, made[name], device), images)
        settings = made[name].method
        assert isinstance(settings, AdversarialTerm)
        by_hand = _fused_by_hand(prepare(kind, made[name], device), images, settings)
        assert_equal(title, name, result, by_hand, 1e-9)  # float64: one graph adds in another order


def _perturbed(run: Pretraining, images: Images) -> torch.Tensor:
    with run.attack_forwards():
        return look(run, images, *images.views[:2]).attacks[0].found.images - images.views[0]


def _after(run: Pretraining, images: Images) -> list[torch.Tensor]:
    """Loss, gradient norm and parameters after a step."""
    metrics = pretrain_step(run, images, Moment())
    return [metrics.loss, metrics.grad_norm, *_parameters(run)]


def _parameters(run: Pretraining) -> Iterator[torch.Tensor]:
    return (parameter.detach() for parameter in run.encoding.backend.parameters())


def _fused_by_hand(run: Pretraining, images: Images, settings: AdversarialTerm) -> list[torch.Tensor]:
    """The fused step by its definition: an attack of its own on the clean route, then one graph and one backward."""
    backend: Any = run.encoding.backend
    chosen = evenly_spaced(settings.num_attacked(len(images.ids)), len(images.ids))
    x, clean_y = images.views[:2]
    y = clean_y.clone().requires_grad_()

    def rows(images: torch.Tensor, route: str) -> Rows:
        return run.contrast.rows(backend.embed(images, route))

    loss = run.contrast(rows(x, "clean"), rows(y, "clean"))
    (gradient,) = torch.autograd.grad(loss, y)
    y_adv = run.ball.step(clean_y, clean_y, gradient, run.step_length)[chosen]
    a, b, c = rows(x, "clean"), rows(clean_y, "clean"), rows(y_adv, "adversarial")
    loss = run.contrast(a, b) + settings.alpha * run.contrast(Rows(a.mine[chosen], a.all[chosen]), c)
    backend.backward(loss)
    return [loss.detach(), backend.update().norm, *_parameters(run)]
