"""Fully sharded data parallelism by torch's fully_shard: every parameter is sharded over ranks. Reference: Zhao et al. 2023.

Units that are gathered and reduced together: every block of the encoder, the rest of the encoder, the projector, and the model
around them, of which only classifiers are left. Under bfloat16, parameters are gathered in bfloat16 and gradients summed in
float32. Batch norms need weights in the dtype of their statistics, so they are separate units in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import set_checkpoint_early_stop

from clae_dist.config.method import Output, Route, Views
from clae_dist.errors import ConfigError
from clae_dist.models.blocks import encoder_blocks
from clae_dist.models.norms import RoutedNorm
from clae_dist.parallel.backend import Backend
from clae_dist.parallel.named_state import State, load_optimizer_state, optimizer_pieces
from clae_dist.parallel.optim import clip_and_step, make_optimizer
from clae_dist.runs.checkpoint import Piece, Place
from clae_dist.world import World


class Fsdp2Backend(Backend):
    """Backend over fully_shard; a single process uses no wrapper, as under DDP."""

    def _wrap(self) -> None:
        mesh = _mesh(self.world, self.config.parallel.shard_size)
        self._units: list[FSDPModule] = []
        if mesh is not None:
            self.model.to(memory_format=torch.contiguous_format)  # a part must be; the images' channels lead
            self._shard(mesh)
        self.optimizer = make_optimizer(self.config.optim, self.config.learning_rate(), self.model)
        self._held = False
        self._num_forwards = 0
        self._unused: dict[Any, int] = {}  # autograd node of an embedding that no backward has used -> number of its forward
        self._last_forward = -1  # at which a backward in progress switches reduction on

    def describe(self) -> str:
        """A short description of the backend for the console."""
        settings = self.config.parallel
        kept = "freed" if settings.reshard_after_forward else "kept"
        return f"fsdp2, parameters in {settings.shard_size or self.world.size} parts, {kept} between forward and backward"

    def _shard(self, mesh: DeviceMesh) -> None:
        policy = MixedPrecisionPolicy(*((torch.bfloat16, torch.float32) if self.precision == "bfloat16" else ()))
        as_it_is = MixedPrecisionPolicy(cast_forward_inputs=False)

        def unit(module: nn.Module | list[nn.Module], policy: MixedPrecisionPolicy) -> None:
            fully_shard(module, mesh=mesh, reshard_after_forward=self.config.parallel.reshard_after_forward, mp_policy=policy)

        for block in (*encoder_blocks(self.model.encoder), self.model.encoder, self.model.projector):
            norms = _unsharded_norms(block) if self._norms_apart() else []
            if norms:
                unit(norms, as_it_is)
            if block not in norms and any(True for _ in block.parameters()):
                unit(block, policy)
        # Pixels and unit rows stay in their own type. Not every forward uses the classifiers: gradients of the outermost unit
        # are reduced at the end of a backward, whichever of its forwards used it.
        unit(self.model, as_it_is)
        self._units = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for sharded in self._units:  # now, not at a first forward that may be a frozen one: it would fix the types of gradients
            sharded.unshard()
        self._reshard()
        self._set_reduction(False)  # but in backward: nothing that an attack does may reduce what is held

    def _norms_apart(self) -> bool:
        """True if the batch norms of a block need units of their own: they raise if their weights have a lower precision."""
        return self.precision == "bfloat16"

    def _set_reduction(self, on: bool) -> None:
        self._units[0].set_requires_gradient_sync(on)  # the model around the others, and with it all of them

    def _reshard(self) -> None:
        """Reshard parameters that a forward without a backward has left unsharded."""
        for unit in self._units:
            unit.reshard()

    def _shards(self) -> list[torch.Tensor]:
        self._reshard()
        return [_local(parameter) for parameter in self.model.parameters()]

    def _sharded(self) -> bool:
        return bool(self._units)

    # ---- forward ----

    def attack_embed(self, images: torch.Tensor, route: Route | Views, **how: Any) -> torch.Tensor:
        """Unit rows (B, D), or as `how` asks the model. The units gather their parameters; a backward of it reduces nothing."""
        if not self._units:
            return super().attack_embed(images, route, **how)
        # Recomputation that stops early would leave a norm unit within the block as if its forward had not ended.
        with set_checkpoint_early_stop(False):
            return self.model(images.contiguous(memory_format=torch.channels_last), route, **how)

    def embed(self, images: torch.Tensor, route: Route | Views, output: Output = "projections") -> torch.Tensor:
        """Unit rows (B, D), or logits, of a training forward."""
        rows = self.attack_embed(images, route, output=output)
        if self._units and rows.grad_fn is not None:
            number = self._num_forwards = self._num_forwards + 1
            self._unused[rows.grad_fn] = number
            rows.register_hook(lambda grad: self._set_reduction(True) if number == self._last_forward else None)
        return rows

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Context in which parameters require no gradient, if attack.freeze says so."""
        if not self._freezes():
            yield
            return
        self._reshard()  # whole parameters take over what their parts ask for when they are gathered
        with super().frozen():
            yield
            self._reshard()

    # ---- backward ----

    @contextmanager
    def reduction_held(self) -> Iterator[None]:
        """Context in which backward accumulates unsharded gradients on this rank."""
        held, self._held = self._held, True
        try:
            yield
        finally:
            self._held = held

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`; outside of reduction_held, average the accumulated ones over ranks, unit by unit.

        fully_shard reduces a unit's gradients whenever the backward of a forward leaves the unit, accumulated ones included.
        Autograd reaches the earliest forward last: reduction is switched on there, so that it happens once and still overlaps
        with computation.
        """
        if self._units:
            self._backward(loss)
        else:
            loss.backward()
        if not self._held:
            self._fill_left_out()

    def _backward(self, loss: torch.Tensor) -> None:
        reached = _nodes_below(loss, self._unused)
        assert reached, "the loss depends on no embedding"
        if not self._held:
            self._last_forward = min(self._unused[node] for node in reached)
        try:
            loss.backward()
        finally:
            self._last_forward = -1
            self._set_reduction(False)
        for node in reached:
            del self._unused[node]

    def _fill_left_out(self) -> None:
        """Give an unused route a gradient of zero, as under DDP, so that momentum and weight decay still apply."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: _whole(p.grad).clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def _gradient_norm(self) -> torch.Tensor:
        self._reshard()
        return _whole(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))

    def _step(self, norm: torch.Tensor | None) -> torch.Tensor:
        assert norm is not None
        clip_and_step(self.optimizer, self.model, norm, self.config.optim.clip_norm)
        self.discard()
        return norm

    def discard(self) -> None:
        """Set gradients to None and forget forwards that wait for their backward."""
        self._reshard()
        self.optimizer.zero_grad()
        self._unused.clear()

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    # ---- state ----

    def _place(self, parameter: nn.Parameter) -> Place:
        """This rank's rows of the parameter. On a 2-D mesh, the rank of the same number in every replica has the same rows."""
        if not isinstance(parameter, DTensor):
            return super()._place(parameter)
        parts = self.config.parallel.shard_size or self.world.size
        number = self.world.rank % parts
        start = min(number * -(-parameter.shape[0] // parts), parameter.shape[0]) * math.prod(parameter.shape[1:])
        holders = tuple(range(number, self.world.size, parts))
        return Place(tuple(parameter.shape), start, _local(parameter).numel(), holders)

    def _optimizer_pieces(self) -> Iterator[Piece]:
        return optimizer_pieces(self.optimizer, self.model, self.world, self._place, _local)

    def _load_optimizer_state(self, state: State) -> None:
        load_optimizer_state(self.optimizer, self.model, state, self._place, _local)


def _mesh(world: World, shard_size: int) -> DeviceMesh | None:
    """The 1-D mesh of ranks, or the 2-D mesh (replicas, shards); None in a single process. Raises ConfigError."""
    size = shard_size or world.size
    if world.size % size:
        near = max(d for d in range(1, world.size + 1) if world.size % d == 0 and d <= size)
        raise ConfigError(
            f"parallel.shard_size is {shard_size}, which does not divide the {world.size} ranks; try {near}, or 0 (all)."
        )
    if world.group is None:
        return None
    if size == world.size:
        return DeviceMesh.from_group(world.group, world.device.type)
    ranks = torch.tensor(dist.get_process_group_ranks(world.group)).view(-1, size)
    row, column = divmod(world.rank, size)
    groups = [world.subgroup(line.tolist()) for line in (ranks[:, column], ranks[row])]
    return DeviceMesh.from_group(groups, world.device.type, mesh=ranks, mesh_dim_names=("copy", "shard"))


def _unsharded_norms(module: nn.Module) -> list[nn.Module]:
    """The outermost batch norms, or pairs of them, of `module` (or `module` itself) that are in no unit yet."""
    if isinstance(module, FSDPModule):
        return []
    if isinstance(module, (RoutedNorm, _BatchNorm)):
        return [module]
    return [norm for child in module.children() for norm in _unsharded_norms(child)]


def _nodes_below(loss: torch.Tensor, wanted: dict[Any, int]) -> set[Any]:
    """The autograd nodes of `wanted` that `loss` depends on; the graph below them is not searched."""
    found: set[Any] = set()
    seen: set[Any] = set()
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted:
            found.add(node)
        else:
            ahead += [parent for parent, _ in node.next_functions]
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor of a rank's shard. Collective."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard as a plain tensor that may be written to."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
