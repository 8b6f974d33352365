"""`clae parity --loss`: a loss of anyone's, which gathers rows by itself, in W processes and in one.

# W ranks, B rows a rank and view, D embedding width. x_2BD: this rank's rows of both views.
"""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clae_dist.errors import OK, UNEXPECTED, ClaeError, ConfigError
from clae_dist.launchers.local import spawn
from clae_dist.launchers.rank import Ending
from clae_dist.parity.loss_verdict import LossParity, Measured, judge
from clae_dist.world import World, connect

DIM = 8
_STEPS = {"float64": 1e-5}  # of central differences, which leave about 1e-10
_COARSE_STEP = 1e-2  # of losses that return float32 or less
_ID_NAMES = ("labels", "indexes", "indices", "index", "targets", "target", "ids")

Loss = Callable[[torch.Tensor], torch.Tensor]  # x_2BD -> this rank's loss


@dataclass(frozen=True)
class LossCase:
    """A loss to examine. `loss`: package.module:Class, or package.module:function. `arguments`: see `build`."""

    loss: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 2
    rows: int = 4  # B
    stop_gradient: bool = False  # the loss holds some rows constant on purpose: autograd of one process is right


def loss_parity(case: LossCase) -> LossParity:
    """Run the loss in one process and in `case.world_size` of this machine, on the CPU, and judge the second by the first.

    Raises ConfigError for a loss that cannot be imported or called, ClaeError for ranks that fail.
    """
    resolve(case.loss)
    dtype, (one,) = _run(1, case)
    _, many = _run(case.world_size, case)
    return judge(case.loss, dtype, one, many, stop_gradient=case.stop_gradient)


def _run(size: int, case: LossCase) -> tuple[str, list[Measured]]:
    ending = spawn(size, partial(_rank, case))
    if ending.code != OK:
        raise (ConfigError if ending.code == ConfigError.exit_code else ClaeError)(ending.message.removeprefix("clae: "))
    dtype, measured = json.loads(ending.message)
    return dtype, [Measured(*(torch.tensor(value, dtype=torch.float64) for value in rank)) for rank in measured]


def _rank(case: LossCase) -> Ending:
    with connect(device="cpu", group_of_one=True) as world:
        torch.set_num_threads(1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other packages, about what they use
                dtype, everyone = measure(case, world)
        except ConfigError as error:
            return Ending(error.exit_code, f"clae: {error}")
        except Exception as error:
            where = "one process" if world.size == 1 else f"{world.size} ranks"
            return Ending(UNEXPECTED, f"clae: {case.loss} raised {type(error).__name__} in {where}: {error}")
        return Ending(OK, json.dumps((dtype, [[value.tolist() for value in rank] for rank in everyone])))


# ---- the loss ----


def resolve(name: str) -> Any:
    """The class or function behind package.module:attribute. Raises ConfigError."""
    module, colon, attribute = name.partition(":")
    if not (colon and attribute):
        raise ConfigError(f"--loss is {name!r}; expected package.module:Class or package.module:function.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--loss is {name!r}, which cannot be imported ({error}).") from None


def build(case: LossCase, world: World) -> Loss:
    """The loss of this rank's rows of both views.

    A class is constructed first. `case.arguments` go to its constructor where that has such a parameter, to the call otherwise;
    parameters called `rank` and `world_size` are set. It is called with the rows of either view, or with all rows and the
    image's number of each, where its second parameter is called labels, indexes, targets or the like. Raises ConfigError.
    """
    loss, rest = resolve(case.loss), {"rank": world.rank, "world_size": world.size} | dict(case.arguments)
    if isinstance(loss, type):
        takes = inspect.signature(loss).parameters
        ours = {name: rest.pop(name) for name in list(rest) if name in takes}
        loss = loss(**ours)
        loss = loss.double() if isinstance(loss, torch.nn.Module) else loss
    function = loss.forward if isinstance(loss, torch.nn.Module) else loss
    takes = inspect.signature(function).parameters
    rest = {name: value for name, value in rest.items() if name in takes or name in case.arguments}
    unknown = [name for name in rest if name not in takes]
    if unknown:
        raise ConfigError(f"--loss-args names {unknown[0]}, which neither the constructor nor the call of {case.loss} takes.")
    with_ids = len(takes) > 1 and list(takes)[1] in _ID_NAMES

    def call(x_2BD: torch.Tensor) -> torch.Tensor:
        images = len(x_2BD) // 2
        ids = (world.rank * images + torch.arange(images)).repeat(2)
        views = (x_2BD, ids) if with_ids else x_2BD.chunk(2)
        value = loss(*views, **rest)
        if not (isinstance(value, torch.Tensor) and value.numel() == 1):
            shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ConfigError(f"{case.loss} returned {shape}; expected one number.")
        return value.squeeze()

    return call


# ---- the measurement ----


def measure(case: LossCase, world: World) -> tuple[str, list[Measured]]:
    """(dtype of the loss's value, what each rank has measured). Collective."""
    loss, x_2BD = build(case, world), own_rows(case, world)
    rows = x_2BD.clone().requires_grad_()
    value = loss(rows)
    if value.requires_grad:
        value.backward()
    gradient = torch.zeros_like(x_2BD) if rows.grad is None else rows.grad
    dtype = str(value.dtype).removeprefix("torch.")
    step = _STEPS.get(dtype, _COARSE_STEP)
    own, total = _through_collectives(loss, x_2BD, world, step)
    measured: list[Any] = [None] * world.size
    dist.all_gather_object(measured, Measured(value.detach(), gradient, own, total, _with_constant_rows(loss, x_2BD, step)))
    return dtype, measured


def own_rows(case: LossCase, world: World) -> torch.Tensor:
    """(2B, D) unit rows in float64: those of the global batch that fall to this rank. One process has all."""
    shape = (2, case.world_size * case.rows, DIM)
    all_2ND = F.normalize(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=2)
    return all_2ND.chunk(world.size, dim=1)[world.rank].flatten(0, 1)


@torch.no_grad()
def _through_collectives(loss: Loss, x_2BD: torch.Tensor, world: World, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """∂(this rank's loss)/∂x and ∂(sum of all ranks' losses)/∂x by differences, x this rank's rows. Collective."""
    own, everyone = torch.zeros_like(x_2BD), torch.zeros_like(x_2BD)
    for rank in range(world.size):
        for place in range(x_2BD.numel()):
            slope = _rise(loss, x_2BD, place, step if rank == world.rank else 0.0) / (2 * step)
            total = slope.clone()
            dist.all_reduce(total)  # the ranks that have moved nothing add what theirs has risen by
            if rank == world.rank:
                own.view(-1)[place], everyone.view(-1)[place] = slope, total
    return own, everyone


@torch.no_grad()
def _with_constant_rows(loss: Loss, x_2BD: torch.Tensor, step: float) -> torch.Tensor:
    """∂(this rank's loss)/∂x by differences, while all ranks receive what they received at x. Collective."""
    with _Sent() as sent:
        loss(x_2BD.clone())
    slope = torch.zeros_like(x_2BD)
    for place in range(x_2BD.numel()):
        slope.view(-1)[place] = _rise(lambda moved: _resent(loss, moved, sent), x_2BD, place, step) / (2 * step)
    return slope


def _resent(loss: Loss, moved: torch.Tensor, sent: _Sent) -> torch.Tensor:
    with _Sent(sent.inputs):
        return loss(moved)


def _rise(loss: Loss, x_2BD: torch.Tensor, place: int, step: float) -> torch.Tensor:
    """loss(x + step) - loss(x - step), one number of x being moved."""
    values = []
    for move in (step, -step):
        moved = x_2BD.clone()
        moved.view(-1)[place] += move
        values.append(loss(moved).double())
    return values[0] - values[1]


class _Sent(TorchDispatchMode):
    """Context that records what this rank gives to each collective, or gives what was recorded in its stead."""

    def __init__(self, recorded: list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.inputs: list[dict[str, Any]] = []
        self._recorded = iter(recorded) if recorded is not None else None

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace not in ("c10d", "_c10d_functional") or "wait" in operation._schema.name:
            return operation(*args, **(kwargs or {}))
        names = [argument.name for argument in operation._schema.arguments]
        given = {name: value for name, value in zip(names, args, strict=False) if not name.startswith("output")}
        if self._recorded is None:
            self.inputs.append({name: _copied(value) for name, value in given.items()})
        else:
            before = next(self._recorded)
            if operation.namespace == "c10d" and "tensors" in given:  # in place: what the caller gave is overwritten anyway
                for tensor, old in zip(_tensors(given["tensors"]), _tensors(before["tensors"]), strict=True):
                    tensor.copy_(old)
            else:
                args = [_copied(before[name]) if name in before else value for name, value in zip(names, args, strict=False)]
        return operation(*args, **(kwargs or {}))


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return [_copied(one) for one in value] if isinstance(value, (list, tuple)) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [tensor for one in value for tensor in _tensors(one)]
