"""The actions of a training step whose kernels, collectives and host waits `clae bench gpu-counts` counts.

Each runs the code of the package on the meta device or on stand-ins (stand_in.py), and returns counts.

# V views of n images, S side; W ranks.
"""

from __future__ import annotations

import io
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from clae_dist.bench.measure import replaced
from clae_dist.bench.stand_in import DEVICE, count_as_on_gpu, counting_as_on_gpu, stand_in_ranks
from clae_dist.bench.steps import Images
from clae_dist.config import Augment, Batch, Checkpointing, Config, Data, Model, Objective, Optim, Parallel, Tracking, Train
from clae_dist.contrast import distributed
from clae_dist.contrast.distributed import Contrast
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import pretrain_step
from clae_dist.counts import Counts, counted
from clae_dist.data.augment import AUGMENT_DRAWS
from clae_dist.data.augment_views import augment_views
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.models import build_model
from clae_dist.models.blocks import encoder_blocks
from clae_dist.objectives import softmax
from clae_dist.objectives.form import Rows
from clae_dist.parallel import Backend, make_backend
from clae_dist.recipe import Recipe
from clae_dist.training import pretraining, train
from clae_dist.training.clock import Clock
from clae_dist.training.pretraining import make_pretraining
from clae_dist.world import World

_META = torch.device("meta")


@dataclass(frozen=True)
class Shape:
    """The step that is counted: an encoder, and the ranks that stand in for others."""

    encoder: str = "timm/resnet50"
    num_ranks: int = 8
    images: int = 4  # a rank
    image_size: int = 32

    def config(self, **sections: Any) -> Config:
        return Config(
            data=Data(image_size=self.image_size),
            batch=Batch(global_size=self.images * self.num_ranks),
            train=Train(precision="bfloat16"),
            **{"model": Model(encoder=self.encoder), **sections},
        )


# ---- augmentation ----


def augmentation(images: int = 128, side: int = 224, *, fused: bool = False) -> tuple[Counts, float]:
    """Counts of augmenting both views, and the bytes moved, in multiples of reading uint8 and writing float32 once."""
    draws = torch.rand(2, images, AUGMENT_DRAWS, generator=torch.Generator().manual_seed(0)) * 0.999
    views = torch.empty(2, images, side, side, 3, dtype=torch.uint8, device=_META).permute(0, 1, 4, 2, 3)
    settings = [Augment(blur=0.5)] * 2

    def augment() -> Any:
        return augment_views(views, draws, settings, _META, torch.float32)

    once = views.numel() * (1 + 4)
    if fused:
        launches, num_bytes = _launches(views, draws, settings)
        return Counts(kernels=launches, bytes=num_bytes), num_bytes / once
    augment()  # a first time: what is kept for the next steps
    counts = counted(augment, "meta")
    return counts, counts.bytes / once


def _launches(views: torch.Tensor, draws: torch.Tensor, settings: list[Augment]) -> tuple[int, int]:
    """The Triton kernels of the fused augmentation, and the bytes of the images and parameters that each is given."""
    from clae_dist.data import augment_triton

    given: list[int] = []

    class Launch:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **_: given.append(
                sum(one.numel() * one.element_size() for one in args if isinstance(one, torch.Tensor))
            )

    with replaced(augment_triton, _grey_means=Launch(), _augment_tiles=Launch()):
        counts = counted(lambda: augment_triton.augment_fused(views, draws, settings), "meta")
    return counts.kernels + len(given), counts.bytes + sum(given)


# ---- a step ----


def step(shape: Shape, backend: Literal["ddp", "fsdp2"] = "ddp") -> Counts:
    """A training step of CLAE exact, without augmentation, on one of the ranks."""
    with stand_in_ranks(shape.num_ranks) as world:
        take = _step_on(world, shape.config(parallel=Parallel(backend=backend)))
        take()  # a first time: buckets, the optimiser's state
        return count_as_on_gpu(take)


def _step_on(world: World, config: Config) -> Any:
    images = torch.rand(2, config.rows_per_rank(world.size), 3, config.data.image_size, config.data.image_size)
    ids = torch.arange(images.shape[1])
    batch = Images(images.unbind(), ids, ids % 2)
    with counting_as_on_gpu():
        run = make_pretraining(config, world, _backend(world, config), Clock(world.device))
    run = replace(run, augment=lambda batch: batch.views)
    return lambda: pretrain_step(run, batch, Moment())


def _backend(world: World, config: Config) -> Backend:
    return make_backend(config, build_model(config, world.group), world)


def save(shape: Shape) -> Counts:
    """The collectives before a save, of a model whose running statistics differ between the ranks."""
    config = shape.config(model=Model(encoder=shape.encoder, norm="local"))
    with stand_in_ranks(shape.num_ranks) as world:
        backend = _backend(world, config)
        return count_as_on_gpu(backend.average_local_statistics)


def graph_breaks(shape: Shape) -> int:
    """Graph breaks of torch.compile in a block of the encoder that shares batch statistics with all ranks."""
    with stand_in_ranks(shape.num_ranks) as world:
        config = shape.config()
        model = build_model(config, world.group)
        block = encoder_blocks(model.encoder)[0]
        inputs: list[torch.Tensor] = []
        handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        model(torch.rand(shape.images, 3, shape.image_size, shape.image_size))
        handle.remove()
        return int(torch._dynamo.explain(block)(*inputs).graph_break_count)


# ---- the loss ----


def loss(name: str, num_ranks: int = 512, images: int = 128, dim: int = 128) -> Counts:
    """Forward and backward of an objective on one rank's rows against those of all ranks, which have been gathered."""
    a, b = (F.normalize(torch.empty(images, dim, device=_META), dim=1).requires_grad_() for _ in range(2))
    everyone = torch.empty(num_ranks * images, dim, device=_META)
    contrast = Contrast(Objective(name=name, temperature=0.5), World(0, num_ranks, 0, 1, _META))

    def of_all_ranks(shift_BVS: torch.Tensor, _: Any) -> torch.Tensor:
        return shift_BVS.new_empty((len(everyone), *shift_BVS.shape[1:]))

    def forward_and_backward() -> None:
        contrast(Rows(a, everyone), Rows(b, everyone)).backward()

    with ExitStack() as stack:
        stack.enter_context(replaced(distributed, _shifts_of_all_ranks=of_all_ranks))
        stack.enter_context(replaced(softmax, _CHUNK_BYTES={"meta": softmax._CHUNK_BYTES["cuda"]}))
        return counted(forward_and_backward, "meta")


# ---- the loop ----


def waits_of_a_step(num_steps: int = 6) -> int:
    """Host waits from the start of a step to that of the next in a whole run that logs, evaluates and saves in neither."""
    begun: list[int] = []
    take_step = train.pretrain_step
    with tempfile.TemporaryDirectory() as folder, counting_as_on_gpu() as counter:

        def noting(*args: Any, **kwargs: Any) -> Any:
            begun.append(counter.counts().waits)
            return take_step(*args, **kwargs)

        config = _small_run(Path(folder), num_steps)
        unchanged = {"augment_views": lambda views, *_: [view.float() / 255 for view in views]}  # counted elsewhere
        with replaced(train, pretrain_step=noting), replaced(pretraining, **unchanged):
            train.train(Recipe(config), World.single(DEVICE), io.StringIO())
    return begun[-2] - begun[-3]


def _small_run(folder: Path, num_steps: int) -> Config:
    rows, never = 4, 1_000_000
    shards = write_synthetic_set(folder / "shards", rows * num_steps, 16)
    return Config(
        run_dir=str(folder / "run"),
        data=Data(shards=str(shards.folder), image_size=16, workers=0),
        batch=Batch(global_size=rows),
        model=Model(encoder="small_resnet", projector_dim=16),
        optim=Optim(name="adamw", learning_rate=1e-3, scaling="none", warmup_epochs=0),
        tracking=Tracking(name="none"),
        train=Train(epochs=1, log_every=never, diagnose_every=never, knn_every=0, precision="bfloat16", threads=1),
        checkpoint=Checkpointing(every_steps=0),
    )
