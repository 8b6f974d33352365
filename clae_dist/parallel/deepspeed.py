"""DeepSpeed: ZeRO shards the optimiser state (stage 1), also gradients (2), also parameters (3); stage 0 shards nothing.

Forwards call the unwrapped module, never the engine, whose forward would take an attack for training: stages 0 to 2 then
raise, and stage 3 trains on wrong gradients (tests/parallel/test_deepspeed.py shows both). Weights and optimiser state are
float32; bfloat16 is our autocast around them, as under DDP.

Gradients are reduced once per step: a step with a single backward pass reduces during that pass, as DeepSpeed does. Passes in
reduction_held() accumulate unsharded local gradients, also at stages 2 and 3, until the first pass outside reduces them all.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clae_dist.config import Config
from clae_dist.config.method import Output, Route, Views
from clae_dist.errors import ConfigError
from clae_dist.parallel.backend import Backend
from clae_dist.parallel.deepspeed_extensions import explain, stale_locks
from clae_dist.parallel.named_state import State, load_optimizer_state, optimizer_pieces
from clae_dist.parallel.optim import make_optimizer
from clae_dist.parallel.zero_state import ZeroState
from clae_dist.runs.checkpoint import Piece, Place
from clae_dist.world import World

_BUCKET = 50_000_000  # elements that are reduced at a time: 200 MB
_PERSISTENT = 100_000  # stage 3: smaller parameters stay whole on every rank


def _refuse(config: Config, world: World, precision: str) -> None:
    """Raise ConfigError for settings that ZeRO does not support."""
    stage = config.parallel.zero_stage
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "parallel.backend is 'deepspeed', which is not installed; pip install 'deepspeed>=0.19.8', "
            "or use parallel.backend=ddp or fsdp2, under which the same run resumes."
        )
    if world.group is None:
        raise ConfigError(
            "parallel.backend is 'deepspeed', but this run has a single rank; "
            "use parallel.backend=ddp (a run may resume under another backend), or launch.workers=2 or more."
        )
    if precision == "float64":
        raise ConfigError(
            "train.precision is 'float64', but ZeRO's weights are float32; use float32, or parallel.backend=ddp or fsdp2."
        )
    if stage >= 1 and config.optim.name == "lars":
        raise ConfigError(
            f"optim.name is 'lars', which needs the norm of every layer, but at parallel.zero_stage {stage} a rank's optimiser "
            "has a flat slice of all layers; use optim.name=sgd or adamw, parallel.zero_stage=0, or "
            "parallel.backend=ddp or fsdp2."
        )
    if stage == 3 and config.train.compile:
        raise ConfigError(
            "train.compile is true, but at parallel.zero_stage 3 hooks fetch and free weights between layers, which compiled "
            "blocks cannot see; use parallel.zero_stage=2, train.compile=false, or parallel.backend=fsdp2."
        )


def zero_config(config: Config, world: World, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Every value that matters is explicit: defaults change (clipping became 1.0)."""
    stage = config.parallel.zero_stage
    rows = max(1, config.batch.global_size // world.size)
    bucket = max(1, min(_BUCKET, num_parameters))
    return {
        "train_batch_size": rows * world.size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,  # the engine would divide the loss by it
        "gradient_clipping": config.optim.clip_norm if stage else 0.0,  # at stage 0 _step clips
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "dump_state": False,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # would wait for the GPU in every forward
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_partitions": True,
            "allgather_bucket_size": _BUCKET,
            "overlap_comm": False,  # until it has been run on GPUs
            "round_robin_gradients": False,
            "memory_efficient_linear": False,
            "sub_group_size": 1_000_000_000,
            "stage3_param_persistence_threshold": _PERSISTENT,
            "stage3_prefetch_bucket_size": 0,  # modules run in another order every step: it would be guesswork
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 1_000_000_000,
        },
    }


def _prepare(world: World) -> Any:
    """Import deepspeed for this rank's device and the existing process group, without its log output."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if world.local_rank == 0:
        for lock in stale_locks():
            print(explain(lock), file=sys.stderr, flush=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed 0.19 calls collectives by names of which newer versions of torch warn on every rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU, DeepSpeed would spend a minute on compiling an extension whose only function, an all-reduce for inference,
    # training never calls; and it would hang if an earlier compile was killed. This table decides if it compiles.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


class DeepSpeedBackend(Backend):
    """Backend over a DeepSpeed engine, ZeRO stage 0 to 3."""

    def _wrap(self) -> None:
        _refuse(self.config, self.world, self.precision)
        assert self.world.size == dist.get_world_size(), "DeepSpeed shards over all ranks of torch.distributed"
        deepspeed = _prepare(self.world)
        self.stage = self.config.parallel.zero_stage
        # DeepSpeed sends weights as contiguous bytes; channels-last weights are not contiguous.
        self.model.to(memory_format=torch.contiguous_format)
        self.optimizer = make_optimizer(self.config.optim, self.config.learning_rate(), self.model)
        self.engine, *_ = deepspeed.initialize(
            args=SimpleNamespace(device_rank=self.world.device.index or 0),
            model=self.model,
            optimizer=self.optimizer,
            dist_init_required=False,
            config=zero_config(self.config, self.world, self.num_parameters),
        )
        if self.stage == 0:
            self.model.to(memory_format=torch.channels_last)
        self._full_gradient = deepspeed.utils.safe_get_full_grad
        self._zero = ZeroState(self.engine, self.optimizer, self.model, self.world) if self.stage else None
        self._held = False
        self._has_gradients = False  # of a backward that no step has used or skipped
        self._coalescing: ExitStack | None = None  # open from the first backward of a held reduction to the one that reduces

    def describe(self) -> str:
        """A short description of the backend for the console."""
        return f"deepspeed, ZeRO stage {self.stage}"

    def _sharded(self) -> bool:
        return self.stage == 3

    def _shards(self) -> list[torch.Tensor]:
        parameters: list[Any] = self.parameters()
        return [p.ds_tensor.data if self.stage == 3 else p.data for p in parameters]

    def shares_forward(self) -> bool:
        """Not at stage 3, which counts one backward pass through a module for each forward and frees its weights then."""
        return super().shares_forward() and self.stage < 3

    def embed(self, images: torch.Tensor, route: Route | Views, output: Output = "projections") -> torch.Tensor:
        """Unit rows (B, D), or logits, of a training forward, bypassing the engine like an attack's forward."""
        return self.attack_embed(images, route, output=output)

    def attack_embed(self, images: torch.Tensor, route: Route | Views, **how: Any) -> torch.Tensor:
        """Unit rows (B, D), or as `how` asks the model, bypassing the engine."""
        # ZeRO's flat buffers make weights contiguous again, so the images must be channels last.
        return super().attack_embed(images.contiguous(memory_format=torch.channels_last), route, **how)

    @contextmanager
    def reduction_held(self) -> Iterator[None]:
        """Context in which backward passes accumulate unsharded local gradients, at every stage; the next outside reduces."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, averaged over ranks; unused parameters get zeros, as under DDP."""
        self._has_gradients = True
        if self.stage == 0:
            self.engine.set_gradient_accumulation_boundary(not self._held)
        elif self._held and self._coalescing is None:
            self._coalescing = ExitStack()
            self._coalescing.enter_context(self.engine.coalesce_grad_reduction())
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self._held and self._coalescing is not None:
            self._coalescing.close()
            self._coalescing = None

    def gradients(self) -> dict[str, torch.Tensor]:
        if not self._has_gradients:
            return {}
        return {name: self._full_gradient(p).detach().clone() for name, p in self.model.named_parameters()}

    def _gradient_norm(self) -> torch.Tensor | None:
        """At stage 0; ZeRO computes it in its step."""
        if self.stage:
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _step(self, norm: torch.Tensor | None) -> torch.Tensor:
        """Clip, step and clear. ZeRO skips the step if a gradient is non-finite; the norm is then infinite."""
        if norm is not None and self.config.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip_norm, norm)
        self.engine.step()
        self._has_gradients = False
        if norm is not None:
            return norm
        if self.stage == 3:
            # Otherwise a route that the next step does not use would keep this step's gradient.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()
        found = self.engine.get_global_grad_norm() if self.engine.was_step_applied() else float("inf")
        return torch.as_tensor(found, dtype=torch.float32, device=self.world.device)

    def discard(self) -> None:
        """Clear ZeRO's gradients. It does so only when a step finds a non-finite gradient, so set one."""
        if self.stage == 0:
            self.engine.optimizer.zero_grad()
            self._has_gradients = False
        elif self._has_gradients:
            for gradients in self.engine.optimizer.averaged_gradients.values():
                for gradient in gradients:
                    gradient.fill_(float("nan"))
            norm = self._step(None)
            assert not norm.isfinite(), "ZeRO took a step that should have been skipped"

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    def _place(self, parameter: nn.Parameter) -> Place:
        return self._zero.place(parameter) if self._zero is not None else super()._place(parameter)

    def _weights_written(self) -> None:
        if self._zero is not None:
            self._zero.weights_written()

    def _optimizer_pieces(self) -> Iterator[Piece]:
        if self._zero is not None:
            return self._zero.optimizer_pieces()
        return optimizer_pieces(self.optimizer, self.model, self.world, self._place)

    def _load_optimizer_state(self, state: State) -> None:
        if self._zero is not None:
            self._zero.load_optimizer_state(state)
        else:
            load_optimizer_state(self.optimizer, self.model, state, self._place)
