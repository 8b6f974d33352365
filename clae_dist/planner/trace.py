"""Run one real training step of a recipe without data: on fake tensors, as one of ranks that do not exist.

The method's own `losses`, the attack and the optimiser run as in training, so that a plug-in method is planned without being
known here. Fake tensors (torch's) have shapes and no memory, so that a step of any size takes seconds and no GPU.

# B rows on this rank, V views, S side of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils

from clae_dist.config import Config
from clae_dist.config.method import Output, Route, Views
from clae_dist.contrast.distributed import Contrast
from clae_dist.contrast.encoding import Embedding, TrainingEncoding
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import Pretraining, pretrain_step
from clae_dist.data.loader import num_views_of
from clae_dist.models import PretrainModel, build_model, regions
from clae_dist.models.blocks import encoder_blocks
from clae_dist.objectives import softmax
from clae_dist.parallel.ddp import DdpBackend
from clae_dist.planner.record import STATISTICS, Recorder
from clae_dist.planner.work import Live, Work, mixed, weights_of_parabola
from clae_dist.training.clock import Clock
from clae_dist.training.pretraining import make_pretraining
from clae_dist.world import World, as_one_of

_HOST = torch.device("cpu")
_EXACT_PARTS = 6  # micro-batches that are traced one by one; more are extrapolated


@dataclass(frozen=True)
class Traced:
    """A step of a recipe on one of `ranks`: its work, and the sizes of what a rank keeps, unsharded, in bytes."""

    work: Work
    ranks: int
    rows: int
    weight_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    average_bytes: int  # weight average and momentum encoder
    state_bytes: int  # of the method, such as a queue
    unit_bytes: tuple[int, ...]  # parameters of each unit that FSDP2 gathers
    num_parameters: int  # tensors
    precision: str

    @property
    def checkpoint_bytes(self) -> int:
        return self.weight_bytes + self.buffer_bytes + self.optimizer_bytes + self.average_bytes + self.state_bytes


def trace(config: Config, ranks: int, *, gpu: bool, norm_ranks: int) -> Traced:
    """Trace a step with every term of the loss, as rank 0 of `ranks`. This process must have no process group.

    Args:
        config: train.precision is not "auto".
        norm_ranks: ranks that share batch statistics with this one.

    Raises ConfigError if the ranks cannot share the batch.
    """
    rows, micro = config.rows_per_rank(ranks), config.batch.micro_size
    parts = rows // micro if micro else 1
    if parts <= _EXACT_PARTS:
        return _trace(config, ranks, gpu=gpu, norm_ranks=norm_ranks)
    few = [_trace(_with_parts(config, ranks, count), ranks, gpu=gpu, norm_ranks=norm_ranks) for count in (2, 3, 4)]
    work = mixed([one.work for one in few], weights_of_parabola(2, parts))
    return replace(few[-1], work=work, rows=rows)


def between(one: Traced, other: Traced, ranks: int, norm_ranks: int) -> Traced:
    """A step of the same global batch on `ranks` ranks, from two that were traced: all but messages is a line in the rows."""
    rows = one.rows * one.ranks / ranks
    share = (rows - one.rows) / (other.rows - one.rows)
    work = mixed((one.work, other.work), (1 - share, share))
    work.messages = {}
    for message, count in one.work.messages.items():
        target = norm_ranks if message.part == STATISTICS else ranks
        grows = message.part == STATISTICS and message.kind.startswith("allgather")  # all others are of the global batch
        size = message.bytes * target // message.ranks if grows else message.bytes
        work.messages[replace(message, bytes=size, ranks=target)] = count
    return replace(one, work=work, rows=round(rows), ranks=ranks)


def _with_parts(config: Config, ranks: int, parts: int) -> Config:
    """The same micro-batches, but fewer of them."""
    batch = replace(config.batch, global_size=parts * config.batch.micro_size * ranks)
    return replace(config, batch=batch, data=replace(config.data, streams=0), method=config.method.from_the_start())


def _trace(config: Config, ranks: int, *, gpu: bool, norm_ranks: int) -> Traced:
    with ExitStack() as stack:
        world = stack.enter_context(as_one_of(ranks, _HOST)) if ranks > 1 else World.single(_HOST)
        group = world.subgroup(list(range(norm_ranks))) if 1 < norm_ranks < ranks else world.group
        with torch.device("meta"):
            model = build_model(config, group).to(memory_format=torch.channels_last)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        _make_fake(model, fake)
        for context in _without_data(gpu=gpu):
            stack.enter_context(context)
        stack.enter_context(fake)
        recorder = Recorder(scratch=not gpu)
        run, backend = _prepare(config, model, world, recorder, gpu=gpu)
        batch = _batch(config, config.rows_per_rank(ranks), recorder)
        stack.enter_context(recorder)
        moment = Moment(0, 1, config.train.epochs)
        pretrain_step(run, batch, moment)
        work, counted = recorder.finish(), backend.counted
        state = [value for of in backend.optimizer.state.values() for value in of.values() if isinstance(value, torch.Tensor)]
        work.moments = [_with_optimiser(moment, _bytes_of(state)) for moment in work.moments]
        work.forwards, work.forwards_with_graph = counted.forwards, counted.with_graph
        work.trained_forwards, work.trained_backwards = counted.trained, counted.backwards
        return Traced(
            work=work,
            ranks=ranks,
            rows=config.rows_per_rank(ranks),
            weight_bytes=_bytes_of(model.parameters()),
            buffer_bytes=_bytes_of(model.buffers()),
            optimizer_bytes=_bytes_of(state),
            average_bytes=_bytes_of((*backend.average.parts, *backend.keys.parts)),
            state_bytes=_bytes_of(backend.method_state.values()),
            unit_bytes=_units(model),
            num_parameters=len(list(model.parameters())),
            precision=config.train.precision,
        )


def _with_optimiser(moment: Live, state_bytes: int) -> Live:
    """The moment in a later step: the optimiser's state, which the first update makes, is there from the beginning."""
    owners = {**moment.bytes, "optimiser": float(state_bytes)}
    if moment.at.startswith("update"):
        owners["update"] = max(0.0, owners.get("update", 0.0) - state_bytes)
    return Live(moment.at, owners)


def _bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _units(model: PretrainModel) -> tuple[int, ...]:
    """Bytes of the parameters that FSDP2 gathers at a time: blocks, the rest of the encoder, projector, classifiers."""
    blocks = [_bytes_of(block.parameters()) for block in encoder_blocks(model.encoder)]
    encoder, whole = _bytes_of(model.encoder.parameters()), _bytes_of(model.parameters())
    projector = _bytes_of(model.projector.parameters())
    return tuple(size for size in (*blocks, encoder - sum(blocks), projector, whole - encoder - projector) if size)


# ---- a step without data ----


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace the meta tensors of a model by fake ones of the host. Shared ones stay shared."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id, with the original, so that ids stay unique

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            converted: torch.Tensor = fake.fake_tensor_converter.from_meta_and_device(fake, tensor.detach(), _HOST)
            if isinstance(tensor, nn.Parameter):
                converted = nn.Parameter(converted, tensor.requires_grad)
            made[id(tensor)] = tensor, converted
        return made[id(tensor)][1]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = convert(tensor)  # type: ignore[assignment]
    model.to = lambda *_, **__: model  # type: ignore[method-assign]  # it is where it belongs


def _without_data(*, gpu: bool) -> Iterator[AbstractContextManager[Any]]:
    """Contexts in which what a step reads from the device is made up: no flag is raised, and every map is a mean's."""
    yield patch.object(FakeTensor, "tolist", _zeros)
    yield patch.object(regions, "_near", lambda a, b: True)
    if gpu:  # as GPUs do it: optimisers of many tensors at once, large chunks of the loss
        for module in (optimizer, _foreach_utils):
            yield patch.object(module, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])
        yield patch.object(optimizer, "_foreach_supported_types", [*optimizer._foreach_supported_types, FakeTensor])
        yield patch.dict(softmax._CHUNK_BYTES, {"cpu": softmax._CHUNK_BYTES["cuda"]})


def _zeros(tensor: torch.Tensor) -> Any:
    def nested(shape: Sequence[int]) -> Any:
        return [nested(shape[1:]) for _ in range(shape[0])] if shape else 0

    return nested(tuple(tensor.shape))


def _batch(config: Config, rows: int, recorder: Recorder) -> Any:
    size = config.data.image_size
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32
    views = [torch.empty(rows, 3, size, size, dtype=dtype) for _ in range(num_views_of(config))]
    views += [torch.empty(rows, 3, config.local_size, config.local_size, dtype=dtype) for _ in range(config.views.local_crops)]
    recorder.own("images", views)
    ids = torch.arange(rows)
    return SimpleNamespace(views=views, ids=ids, labels=ids % 2, strength=1.0)


def _prepare(
    config: Config, model: PretrainModel, world: World, recorder: Recorder, *, gpu: bool
) -> tuple[Pretraining, _UnwrappedBackend]:
    eager = replace(config, train=replace(config.train, compile=False), method=config.method.from_the_start())
    backend = _UnwrappedBackend(eager, model, world, config, recorder, gpu=gpu)
    recorder.own("weights", [*model.parameters(), *model.buffers()])
    recorder.own("averages", [*backend.average.parts, *backend.keys.parts])
    recorder.own("queue", backend.method_state.values())
    run = make_pretraining(eager, world, backend, Clock(world.device))
    encoding = _TimedEncoding(backend, config.batch.micro_size)
    encoding.recorder = recorder
    run = replace(
        run,
        augment=lambda batch: tuple(batch.views),
        noise=lambda batch, number: torch.rand_like(batch.views[number]),
        timed=recorder.within,
        encoding=encoding,
        contrast=_RecordedContrast(run.contrast, recorder),  # type: ignore[arg-type]
    )
    return run, backend


class _RecordedContrast:
    """The objective, whose operations and memory are the loss's."""

    def __init__(self, contrast: Contrast, recorder: Recorder) -> None:
        self._contrast, self._recorder = contrast, recorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_loss():
            return self._contrast(*args, **kwargs)

    def _as_loss(self) -> AbstractContextManager[None]:
        """Within an attack it is the attack's: its cost goes away with the attack."""
        return nullcontext() if self._recorder.part == "attack" else self._recorder.within("loss")

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._contrast, name)
        if not callable(value):
            return value

        def recorded(*args: Any, **kwargs: Any) -> Any:
            with self._as_loss():
                result = value(*args, **kwargs)
            return _RecordedContrast(result, self._recorder) if isinstance(result, Contrast) else result

        return recorded


class _TimedEncoding(TrainingEncoding):
    """In the backward part, all that is not the encoder's is the loss's."""

    recorder: Recorder

    def backward(self, *embeddings: Embedding, more_to_come: bool = False) -> None:
        with self.recorder.within("backward"):
            super().backward(*embeddings, more_to_come=more_to_come)


class _UnwrappedBackend(DdpBackend):
    """The recipe's backend without its wrapper, whose collectives and memory the planner adds by rule."""

    def __init__(
        self, eager: Config, model: PretrainModel, world: World, planned: Config, recorder: Recorder, *, gpu: bool
    ) -> None:
        self._planned, self._recorder, self._gpu = planned, recorder, gpu
        self.counted = SimpleNamespace(forwards=0, with_graph=0, trained=0, backwards=0)
        super().__init__(eager, model, world)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._own_gradient)

    def _wrap(self) -> None:
        """As in a single process, which has no wrapper."""
        world, self.world = self.world, World.single(self.world.device)
        super()._wrap()
        self.world = world

    def _own_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._recorder.own("gradients", [parameter.grad])

    def _sharded(self) -> bool:
        parallel = self._planned.parallel
        return parallel.backend == "fsdp2" or (parallel.backend == "deepspeed" and parallel.zero_stage == 3)

    def _freezes(self) -> bool:
        freeze = self._planned.attack.freeze
        return freeze == "always" or (freeze == "auto" and self._planned.train.compile)

    def shares_forward(self) -> bool:
        return not self._planned.train.compile

    def attack_embed(self, images: torch.Tensor, route: Route | Views, **how: Any) -> torch.Tensor:
        self._count()
        return super().attack_embed(images, route, **how)

    def embed(self, images: torch.Tensor, route: Route | Views, output: Output = "projections") -> torch.Tensor:
        self._count()
        self.counted.trained += torch.is_grad_enabled()
        return super().embed(images, route, output)

    def _count(self) -> None:
        self.counted.forwards += 1
        self.counted.with_graph += torch.is_grad_enabled()

    def backward(self, loss: torch.Tensor) -> None:
        self.counted.backwards += 1
        super().backward(loss)

    @contextmanager
    def autocast(self) -> Iterator[None]:  # type: ignore[override]
        with super().autocast():
            if self._gpu and self.precision == "bfloat16":
                with _FloatAsOnGpu():
                    yield
            else:
                yield


class _FloatAsOnGpu(TorchFunctionMode):
    """CUDA's autocast computes norms of layers, softmax and losses in float32, where the CPU's does not."""

    _IN_FLOAT32: tuple[Callable[..., Any], ...] = (
        nn.functional.layer_norm,
        nn.functional.group_norm,
        torch.layer_norm,
        torch.softmax,
    )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self._IN_FLOAT32:
            args = [one.float() if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in args]
        return function(*args, **kwargs)
