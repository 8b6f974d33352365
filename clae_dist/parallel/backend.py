"""What training asks of whatever wraps the model across ranks; one file a backend implements it.

Traps that every backend avoids, each with a test in tests/parallel: an attack through the wrapper (its bookkeeping would
take it for training), a reduction a backward pass rather than one a step, gradients of a left-out route, running statistics
that drift apart, a recomputed block that takes another route or counts its statistics twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from clae_dist.config import Config
from clae_dist.models import PretrainModel, build_model
from clae_dist.models.blocks import checkpoint_blocks, compile_blocks
from clae_dist.models.norms import Route, statistics, untouched_statistics
from clae_dist.parallel.average import WeightAverage
from clae_dist.parallel.named_state import everywhere, gather_whole
from clae_dist.runs.checkpoint import Piece, Place, sections
from clae_dist.world import World


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The precision that a run uses, and why."""
    if wanted != "auto":
        return wanted, "asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"auto: compute capability {major}.{minor}"
        return ("bfloat16", reason) if major >= 8 else ("float32", reason)
    return "float32", "auto: CPU"


class Backend(ABC):
    """The model across ranks. `model` is what it was, moved to the device; a backend may shard its parameters in place.

    Collectives, which every rank must call alike: backward (outside of reduction_held), update, discard, gradients,
    gradient_norms, state, weights, full_model, average_local_statistics; with sharded parameters embed and attack_embed, too.
    """

    def __init__(self, config: Config, model: PretrainModel, world: World) -> None:
        self.config, self.world = config, world
        # Interleaved channels: on this project's CPUs a third faster than planes, and what tensor cores want.
        self.model: PretrainModel = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision, self.precision_reason = choose_precision(config.train.precision, world.device)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if config.train.activation_checkpointing:
            checkpoint_blocks(self.model.encoder)
        if config.train.compile:
            compile_blocks(self.model.encoder)
        self._wrap()
        self.average = WeightAverage(self._shards(), config.train.ema_decay)

    # ---- what a backend implements ----

    @abstractmethod
    def _wrap(self) -> None:
        """Wraps or shards self.model and makes the optimiser. Raises ConfigError for what this backend cannot honour."""

    @abstractmethod
    def _shards(self) -> list[torch.Tensor]:
        """What this rank holds of every parameter, as plain tensors that may be written to."""

    @abstractmethod
    def embed(self, images: torch.Tensor, route: Route) -> torch.Tensor:
        """Unit rows (B, D) of a training forward."""

    @abstractmethod
    def reduction_held(self) -> AbstractContextManager[Any]:
        """Forwards and backwards inside add to this rank's gradients; the next backward outside reduces all of it, once.

        The last forward before that backward must be outside as well.
        """

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss`; outside of reduction_held they are then averaged over ranks."""

    @abstractmethod
    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by parameter name, averaged over ranks: between backward and update, on every rank."""

    @abstractmethod
    def _step(self) -> torch.Tensor:
        """Clips, steps, clears; returns the norm of the gradient before clipping. Where that is not finite, nothing changes."""

    @abstractmethod
    def discard(self) -> None:
        """Forgets the gradients of a step that is left out, on every rank: after backward, or after an update."""

    @abstractmethod
    def _optimizer(self) -> torch.optim.Optimizer:
        """Whose param_groups hold the learning rate."""

    @abstractmethod
    def _optimizer_pieces(self) -> Iterator[Piece]:
        """This rank's pieces of optimizer/PARAMETER/exp_avg (and the like); none before the first step."""

    @abstractmethod
    def _load_optimizer_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """The opposite, of parameter name -> {"exp_avg": whole tensor, …}."""

    # ---- what all have in common ----

    def describe(self) -> str:
        """The backend in a few words, for the console."""
        return self.config.parallel.backend

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def attack_embed(self, images: torch.Tensor, route: Route) -> torch.Tensor:
        """Unit rows (B, D) beside the wrapper, whose bookkeeping a forward without its own backward would upset."""
        with self.autocast():
            return self.model(images, route)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def untouched(self) -> AbstractContextManager[None]:
        """Inside, forwards leave no trace in the running statistics."""
        return untouched_statistics(self.model)

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, parameters ask for no gradient where attack.freeze wants that: compiled blocks would compute it."""
        freeze = self.config.attack.freeze
        if freeze == "always" or (freeze == "auto" and self.config.train.compile):
            return _without_gradients(self.model)
        return nullcontext()

    def shares_forward(self) -> bool:
        """Whether the attack may use the graph of the clean forward of x, and the backward pass use it again."""
        return not self.config.train.compile  # compiled blocks give their buffers away in the first backward

    def update(self) -> torch.Tensor:
        """One optimiser step; returns the gradient's norm before clipping. Where that is not finite, nothing has changed, and
        `discard` is to be called."""
        norm = self._step()
        if not self.average.decay or norm.isfinite():
            self.average.update()
        return norm

    def gradient_norms(self) -> dict[str, float]:
        """The norm of every parameter's gradient, where there still is one. A collective."""
        return {name: gradient.norm().item() for name, gradient in self.gradients().items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole model's state_dict on the CPU, under the names of the bare model, on every rank. A collective."""
        parts = zip(self.model.named_parameters(), self._shards(), strict=True)
        whole = dict(gather_whole((self._place(p).piece(name, part) for (name, p), part in parts), self.world))
        return {**{name: value.detach().to("cpu", copy=True) for name, value in self._buffers().items()}, **whole}

    def set_learning_rate(self, value: float) -> None:
        for group in self._optimizer().param_groups:
            group["lr"] = value

    def pieces(self) -> Iterator[Piece]:
        """What this rank holds of what a checkpoint keeps: the same names in the same order on every rank."""
        shards = self._shards()  # first: it may put parts in the place of whole parameters
        weights = dict(self.model.named_parameters())
        parts = dict(zip(weights, shards, strict=True))
        for name, value in self.model.state_dict().items():
            place = self._place(weights[name]) if name in weights else everywhere(value, self.world)
            yield place.piece(f"model/{name}", parts.get(name, value))
        for (name, parameter), part in zip(weights.items(), self.average.parts, strict=False):  # none without an average
            yield self._place(parameter).piece(f"average/{name}", part)
        yield from self._optimizer_pieces()

    def _place(self, parameter: nn.Parameter) -> Place:
        """Where this rank's shard of a parameter lies in the whole."""
        return everywhere(parameter, self.world)

    def _buffers(self) -> dict[str, torch.Tensor]:
        """What else the model's state_dict holds, the same on every rank."""
        parameters = {name for name, _ in self.model.named_parameters()}
        return {name: value for name, value in self.model.state_dict().items() if name not in parameters}

    def state(self) -> dict[str, Any]:
        """What `pieces` are parts of, whole, on every rank (see `sections`); checkpoints are written without it."""
        return sections(dict(gather_whole(self.pieces(), self.world)))

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned, under this or another backend. Whole tensors are asked for one at a time."""
        for section, parts in (("model", self._shards()), ("average", self.average.parts)):
            if parts:
                for (name, parameter), part in zip(self.model.named_parameters(), parts, strict=True):
                    self._place(parameter).fill(part, state[section][name])
        for name, buffer in self._buffers().items():
            buffer.copy_(state["model"][name])
        self._weights_written()
        self._load_optimizer_state(state["optimizer"])

    def _weights_written(self) -> None:  # noqa: B027 - most have nothing to do
        """After others have been written into the shards."""

    @contextmanager
    def full_model(self) -> Iterator[PretrainModel]:
        """The model with whole weights (the averaged ones, if any), on which a rank may run whatever it likes."""
        with self.average.in_place():
            if not self._sharded():
                yield self.model
                return
            state = self.weights()
        model = build_model(self.config).to(self.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(state)
        yield model

    def _sharded(self) -> bool:
        """Whether a rank holds only a part of the parameters."""
        return False

    def average_local_statistics(self) -> None:
        """Running statistics as the mean over ranks (they differ where model.norm is "local"); before saving and evaluating."""
        if self.world.group is None or self.config.model.norm != "local":
            return
        for buffer in statistics(self.model):
            buffer.copy_(self.world.mean(buffer))


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
