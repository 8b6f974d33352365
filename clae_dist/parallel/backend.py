"""Interface of the wrapper of a model across ranks; every backend implements it in a file of its own.

Known traps, each with a test in tests/parallel: an attack through the wrapper (whose bookkeeping would take it for training),
one reduction per backward pass instead of one per step, gradients of an unused route, running statistics that drift apart
between ranks, a recomputed block that takes another route or counts its statistics twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from clae_dist.config import Config
from clae_dist.config.method import Output, Route, Views
from clae_dist.contrast.encoding import Update
from clae_dist.methods import make_method
from clae_dist.models import PretrainModel, build_model
from clae_dist.models.blocks import checkpoint_blocks, compile_blocks
from clae_dist.models.domain_head import DomainHead
from clae_dist.models.norms import (
    evaluation_mode,
    has_global_statistics,
    statistics,
    takes_views,
    untouched_statistics,
)
from clae_dist.parallel.average import WeightAverage
from clae_dist.parallel.named_state import everywhere, gather_whole
from clae_dist.runs.checkpoint import Piece, Place, sections
from clae_dist.world import World

_STATISTICS = ("running_mean", "running_var")


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The precision of a run and the reason for it."""
    if wanted != "auto":
        return wanted, "requested"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"auto: compute capability {major}.{minor}"
        return ("bfloat16", reason) if major >= 8 else ("float32", reason)
    return "float32", "auto: CPU"


class Backend(ABC):
    """A model across ranks. `model` is moved to the device; a backend may shard its parameters in place.

    Collective: backward (outside of reduction_held), update, discard, gradients, gradient_norms, state, weights, full_model,
    average_local_statistics; with sharded parameters also embed and attack_embed.
    """

    def __init__(self, config: Config, model: PretrainModel, world: World) -> None:
        self.config, self.world = config, world
        # Channels last: a third faster than planes on this project's CPUs, and the layout that tensor cores prefer.
        self.model: PretrainModel = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision, self.precision_reason = choose_precision(config.train.precision, world.device)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if config.train.activation_checkpointing:
            checkpoint_blocks(self.model.encoder)
        if config.train.compile:
            compile_blocks(self.model.encoder)
        self._wrap()
        self.average = WeightAverage(self._shards(), config.train.ema_decay)
        self._key_statistics = {name: value for name, value in self.model.named_buffers() if name.endswith(_STATISTICS)}
        of_keys = (self._shards(), list(self._key_statistics.values()))
        averaged, apart = of_keys if config.method.key_statistics == "own" else ([*of_keys[0], *of_keys[1]], [])
        self.keys = WeightAverage(averaged, config.method.key_decay, apart)
        self.method_state = self._method_state()
        self.wait_for_copy: Callable[[], None] = lambda: None  # set while a checkpoint is copied beside the next step

    # ---- implemented by a backend ----

    @abstractmethod
    def _wrap(self) -> None:
        """Wrap or shard self.model and make the optimiser. Raises ConfigError for settings that are not supported."""

    @abstractmethod
    def _shards(self) -> list[torch.Tensor]:
        """This rank's shard of every parameter, as plain tensors that may be written to."""

    @abstractmethod
    def embed(self, images: torch.Tensor, route: Route | Views, output: Output = "projections") -> torch.Tensor:
        """The output of a training forward, of one view or of several (`joins_views`): unit rows (B, D), or logits.

        Of the forwards whose gradients are reduced together, the first one and the one of the last backward are projections.
        """

    @abstractmethod
    def reduction_held(self) -> AbstractContextManager[Any]:
        """Context in which backward passes accumulate local gradients; the next backward outside reduces all of them, once.

        The last forward before that backward must be outside as well.
        """

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`; outside of reduction_held, then average them over ranks."""

    @abstractmethod
    def gradients(self) -> dict[str, torch.Tensor]:
        """Unsharded gradients by parameter name, averaged over ranks. Valid between backward and update. Collective."""

    @abstractmethod
    def _gradient_norm(self) -> torch.Tensor | None:
        """The norm of the whole gradient, on the device of every rank; None if only the step finds out."""

    @abstractmethod
    def _step(self, norm: torch.Tensor | None) -> torch.Tensor:
        """Clip the gradient of this norm, step, and clear the gradients.

        Returns the norm before clipping, non-finite if the step was skipped: only where `_gradient_norm` is None.
        """

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradients of a skipped step, after backward or after update. Collective."""

    @abstractmethod
    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimiser whose param_groups hold the learning rate."""

    @abstractmethod
    def _optimizer_pieces(self) -> Iterator[Piece]:
        """This rank's pieces of optimizer/PARAMETER/exp_avg and the like; none before the first step."""

    @abstractmethod
    def _load_optimizer_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Load the optimiser state from parameter name -> {"exp_avg": unsharded tensor, …}."""

    # ---- shared by all backends ----

    def _method_state(self) -> dict[str, torch.Tensor]:
        """The method's replicated tensors at the start of a run, on the device; floating-point ones as precise as the rows."""
        state = make_method(self.config.method).state(self.model.embedding_dim, self.config.seed)
        dtype = torch.float64 if self.precision == "float64" else torch.float32
        return {
            name: value.to(self.world.device, dtype if value.is_floating_point() else None) for name, value in state.items()
        }

    def describe(self) -> str:
        """A short description of the backend for the console."""
        return self.config.parallel.backend

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def attack_embed(self, images: torch.Tensor, route: Route | Views, **how: Any) -> torch.Tensor:
        """Unit rows (B, D), or as `how` asks the model, bypassing the wrapper, which expects a backward for every forward."""
        with self.autocast():
            return self.model(images, route, **how)

    @contextmanager
    def key_encoder(self) -> Iterator[None]:
        """Context in which the model is the momentum encoder: the average of its weights, with running statistics that are
        averaged as well, in evaluation mode, or its own (MethodSettings.key_statistics). Collective with sharded parameters.

        Reference: Cai et al. 2021, Exponential moving average normalization (EMAN).
        """
        self._before_writing()
        own = self.config.method.key_statistics == "own"
        self._shards()  # only shards take the average: whole parameters go first, and again afterwards
        try:
            with self.keys.in_place(), nullcontext() if own else self.evaluating():
                yield
        finally:
            self._shards()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def reverse_gradients(self, weight: float) -> None:
        """Gradients of the domain's logit reach the features times -`weight`. Local."""
        head = self.model.classifiers
        assert isinstance(head, DomainHead), "the method has no domain head"
        head.reversal.fill_(weight)

    def untouched(self) -> AbstractContextManager[None]:
        """Context in which forwards do not change the running statistics."""
        return untouched_statistics(self.model)

    def evaluating(self) -> AbstractContextManager[None]:
        """Context in which forwards use running statistics, change none, and drop nothing."""
        return evaluation_mode(self.model)

    def frozen(self) -> AbstractContextManager[None]:
        """Context in which parameters require no gradient, if attack.freeze says so: compiled blocks would compute it."""
        return _without_gradients(self.model) if self._freezes() else nullcontext()

    def _freezes(self) -> bool:
        freeze = self.config.attack.freeze
        return freeze == "always" or (freeze == "auto" and self.config.train.compile)

    def joins_views(self) -> bool:
        """True if a forward of several views computes what one of each does, and communicates less."""
        return takes_views(self.model) and (has_global_statistics(self.model) or self._sharded())

    def shares_forward(self) -> bool:
        """True if the attack may use the graph of the clean forward of x and the backward pass may use it again."""
        return not self.config.train.compile  # compiled blocks free their buffers in the first backward

    def update(self, loss: torch.Tensor | None = None) -> Update:
        """Take one optimiser step, unless the gradient's norm or the `loss` of any rank is non-finite: then call `discard`.

        The host waits for the device once, for both: a step that is skipped leaves every optimiser as it was.
        """
        norm = self._gradient_norm()
        known = [value.detach() for value in (loss, norm) if value is not None]
        bad = self.world.flags_anywhere(*(~value.isfinite() for value in known)) if known else []
        if any(bad):
            return Update(torch.tensor(torch.nan) if norm is None else norm, not (bad[0] and loss is not None), taken=False)
        self._before_writing()
        after = self._step(norm)
        taken = norm is not None or bool(after.isfinite())
        if taken:
            self.average.update()
            self.keys.update()
        return Update(after, loss_is_finite=True, taken=taken)

    def _before_writing(self) -> None:
        """Called before parameters, optimiser state or averages change."""
        self.wait_for_copy()
        self.wait_for_copy = lambda: None

    def gradient_norms(self) -> dict[str, float]:
        """Gradient norm of every parameter that still has a gradient. Collective."""
        return {name: gradient.norm().item() for name, gradient in self.gradients().items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """The unsharded state_dict on the CPU of every rank, under the names of the unwrapped model. Collective."""
        parts = zip(self.model.named_parameters(), self._shards(), strict=True)
        whole = dict(gather_whole((self._place(p).piece(name, part) for (name, p), part in parts), self.world))
        return {**{name: value.detach().to("cpu", copy=True) for name, value in self._buffers().items()}, **whole}

    def set_learning_rate(self, value: float) -> None:
        for group in self._optimizer().param_groups:
            group["lr"] = value * group["lr_scale"]

    def pieces(self) -> Iterator[Piece]:
        """This rank's pieces of a checkpoint: the same names in the same order on every rank."""
        shards = self._shards()  # first: it may replace unsharded parameters by shards
        weights = dict(self.model.named_parameters())
        parts = dict(zip(weights, shards, strict=True))
        for name, value in self.model.state_dict().items():
            place = self._place(weights[name]) if name in weights else everywhere(value, self.world)
            yield place.piece(f"model/{name}", parts.get(name, value), changes_in_forward=name not in weights)
        for (name, parameter), part in zip(weights.items(), self.average.parts, strict=False):  # none without an average
            yield self._place(parameter).piece(f"average/{name}", part)
        yield from self._key_pieces("keys/")
        for name, value in self.method_state.items():
            yield everywhere(value, self.world).piece(f"method/{name}", value)
        yield from self._optimizer_pieces()

    def _key_pieces(self, prefix: str) -> Iterator[Piece]:
        """This rank's pieces of the momentum encoder: parameters and running statistics; none without one."""
        places = [self._place(parameter) for parameter in self.model.parameters()]
        places += [everywhere(value, self.world) for value in self._key_statistics.values()]
        names = [*(name for name, _ in self.model.named_parameters()), *self._key_statistics]
        for name, place, part in zip(names, places, self.keys.parts, strict=False):
            yield place.piece(f"{prefix}{name}", part)

    def key_weights(self) -> dict[str, torch.Tensor]:
        """The momentum encoder's parameters and running statistics on every rank; {} without one. Collective."""
        return dict(gather_whole(self._key_pieces(""), self.world))

    def load_key_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load the result of `key_weights`."""
        for (name, parameter), part in zip(self.model.named_parameters(), self.keys.parts, strict=False):
            self._place(parameter).fill(part, weights[name])
        for name, part in zip(reversed(self._key_statistics), reversed(self.keys.parts), strict=False):
            part.copy_(weights[name])

    def _place(self, parameter: nn.Parameter) -> Place:
        """Position of this rank's shard within the unsharded parameter."""
        return everywhere(parameter, self.world)

    def _buffers(self) -> dict[str, torch.Tensor]:
        """The model's buffers, replicated on every rank."""
        parameters = {name for name, _ in self.model.named_parameters()}
        return {name: value for name, value in self.model.state_dict().items() if name not in parameters}

    def state(self) -> dict[str, Any]:
        """The unsharded state on every rank (see `sections`). Checkpoints are written without it. Collective."""
        return sections(dict(gather_whole(self.pieces(), self.world)))

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state` under this or another backend. Unsharded tensors are read one at a time."""
        for section, parts in (("model", self._shards()), ("average", self.average.parts)):
            if parts:
                for (name, parameter), part in zip(self.model.named_parameters(), parts, strict=True):
                    self._place(parameter).fill(part, state[section][name])
        for name, buffer in self._buffers().items():
            buffer.copy_(state["model"][name])
        if self.keys.decay:
            self.load_key_weights(state["keys"])
        for name, value in self.method_state.items():
            value.copy_(state["method"][name])
        self._weights_written()
        self._load_optimizer_state(state["optimizer"])

    def _weights_written(self) -> None:  # noqa: B027 - optional
        """Called after new weights have been written into the shards."""

    @contextmanager
    def full_model(self) -> Iterator[PretrainModel]:
        """The model with unsharded weights (averaged, if there is an average). Forwards of it are not collective."""
        self._before_writing()
        with self.average.in_place():
            if not self._sharded():
                yield self.model
                return
            state = self.weights()
        model = build_model(self.config).to(self.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(state)
        yield model

    def _sharded(self) -> bool:
        """True if parameters are sharded."""
        return False

    def average_local_statistics(self) -> None:
        """Average running statistics over ranks if they differ. Called before saving and evaluating. Collective."""
        if self.world.group is None or not self.config.model.statistics_differ:
            return
        buffers = statistics(self.model)
        if buffers:  # one all-reduce for all of them
            means = self.world.mean(torch.cat([buffer.flatten() for buffer in buffers]))
            for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
