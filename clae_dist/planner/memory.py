"""Memory of a rank by part, at the moment of the step with the most, under each backend.

# S ranks that share one copy of the parameters; 1: every rank has all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from clae_dist.config import Config
from clae_dist.planner.trace import Traced
from clae_dist.planner.work import Live

PARTS = {  # owner of a storage -> part of the plan
    "weights": "weights",
    "gradients": "gradients",
    "optimiser": "optimiser",
    "averages": "averages",
    "queue": "queue",
    "images": "images",
    "forward": "activations",
    "backward": "activations",
    "attack": "attack",
    "loss": "rows and chunks",
    "update": "update",
    "scratch": "scratch of convolutions",
}
_ZERO_BUCKET = 4 * 50_000_000  # bytes that DeepSpeed reduces at a time (parallel/deepspeed.py)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part at the peak, and the part of the step in which that is."""

    at: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Sharding:
    """The ranks that share one copy of each of these."""

    weights: int = 1
    gradients: int = 1
    optimiser: int = 1

    @staticmethod
    def of(config: Config, ranks: int) -> Sharding:
        parallel = config.parallel
        if ranks == 1 or parallel.backend == "ddp":
            return Sharding()
        if parallel.backend == "fsdp2":
            size = parallel.shard_size or ranks
            return Sharding(size, size, size)
        stage = parallel.zero_stage
        return Sharding(ranks if stage == 3 else 1, ranks if stage >= 2 else 1, ranks if stage >= 1 else 1)


def memory_of(traced: Traced, config: Config) -> Memory:
    """The peak of a rank."""
    return max(_moments(traced, config), key=lambda one: one.total)


def _moments(traced: Traced, config: Config) -> Iterator[Memory]:
    sharding = Sharding.of(config, traced.ranks)
    for moment in traced.work.moments:
        yield Memory(moment.at.split(" but")[0], dict(_parts(moment, traced, config, sharding)))


def _parts(moment: Live, traced: Traced, config: Config, sharding: Sharding) -> Iterator[tuple[str, float]]:
    parts = dict.fromkeys(PARTS.values(), 0.0)
    for owner, size in moment.bytes.items():
        parts[PARTS[owner]] += size
    updating = moment.at.startswith("update")
    parts["weights"] = traced.buffer_bytes + traced.weight_bytes / sharding.weights
    parts["gradients"] = _gradients(moment, traced, config, sharding)
    parts["optimiser"] /= sharding.optimiser
    parts["averages"] /= sharding.weights
    parts["update"] /= sharding.optimiser
    if sharding.weights > 1 and not updating:
        parts["gathered weights"] = _gathered(traced, config)
    if config.parallel.backend == "deepspeed" and traced.ranks > 1:
        parts["optimiser"] += traced.weight_bytes / traced.ranks if config.parallel.zero_stage else 0
        parts["gradients"] += min(_ZERO_BUCKET, traced.weight_bytes) if config.parallel.zero_stage else 0
    yield from ((part, size) for part, size in parts.items() if size >= 1)


def _gradients(moment: Live, traced: Traced, config: Config, sharding: Sharding) -> float:
    live, whole = moment.bytes.get("gradients", 0.0), float(traced.weight_bytes)
    if sharding.gradients == 1:
        if traced.ranks == 1 or config.parallel.backend != "ddp":
            return live
        # DDP's buckets exist from the start. Gradients become views of them in the last backward; before, they are beside them.
        beside = traced.work.trained_backwards > 1 and not moment.at.startswith("update")
        return whole + (live if beside else 0.0)
    part = live / sharding.gradients
    if moment.at.startswith("update"):
        return part
    # Before the backward of the first forward, gradients of the others are added up unsharded.
    several = traced.work.trained_forwards > 1
    return part + (live if several else min(live, _two_largest(traced)))


def _two_largest(traced: Traced) -> float:
    """The unit that is used and the next one, which is on its way."""
    return float(sum(sorted(traced.unit_bytes)[-2:]))


def _gathered(traced: Traced, config: Config) -> float:
    """Bytes of unsharded parameters at a time, in the precision of their products."""
    share = 0.5 if traced.precision == "bfloat16" and config.parallel.backend == "fsdp2" else 1.0
    kept = config.parallel.backend == "fsdp2" and not config.parallel.reshard_after_forward
    return share * (traced.weight_bytes if kept else _two_largest(traced))
