"""The plan of a run: for each backend that fits, time, memory and costs; a curve over ranks; what would help most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from clae_dist.config import Config
from clae_dist.errors import ConfigError
from clae_dist.planner.advice import Change, changes, limit_of
from clae_dist.planner.costs import Costs, Images, Prices, costs_of
from clae_dist.planner.measured import Measured
from clae_dist.planner.memory import Memory, memory_of
from clae_dist.planner.network import Links
from clae_dist.planner.table import USABLE_MEMORY, Chip, Wires
from clae_dist.planner.timing import Rates, StepTime, step_time
from clae_dist.planner.trace import Traced, between, trace

_PAYS = 1.5  # twice the ranks must be so many times as fast


@dataclass(frozen=True)
class Request:
    """The settings of a plan. `say` prints progress."""

    config: Config
    ranks: int
    chip: Chip
    wires: Wires | None
    per_node: int
    images: Images
    prices: Prices
    measured: Measured
    cores: int = 0  # of this machine, where ranks share them; 0: ranks have devices of their own
    say: Callable[[str], None] = lambda _: None
    backends: tuple[str, ...] = ("ddp", "fsdp2", "deepspeed")

    @cached_property
    def usable_bytes(self) -> float:
        return USABLE_MEMORY * self.chip.memory_bytes

    @cached_property
    def rates(self) -> Rates:
        """Raises ConfigError for a CPU that was not measured."""
        rates = self.measured.rates()
        if rates is None and not self.chip.is_gpu:
            raise ConfigError(
                "--gpu is 'cpu', whose rates no table has; measure it with `clae bench step --json > step.json`, and add "
                "--measured step.json."
            )
        rates = rates or Rates.of_table(self.chip, tf32=self.config.train.tf32)
        return replace(rates, augment_s=self.measured.augment_s or rates.augment_s, fsdp2=self.measured.fsdp2)

    @cached_property
    def links(self) -> Links:
        return Links(self.chip, self.per_node, self.wires, self.measured.networks)

    def crowding(self, ranks: int) -> float:
        """Times that computation takes longer because this many ranks share the cores of a node."""
        return max(1.0, min(ranks, self.per_node) / self.cores) if self.cores else 1.0

    def norm_ranks(self, ranks: int) -> int:
        """Ranks that share batch statistics."""
        group = self.config.model.norm_group
        return min(ranks, self.per_node) if group == "node" else ranks if group == "all" else min(int(group), ranks)


@dataclass(frozen=True)
class Option:
    """One backend. `micro_size`: the largest micro-batch of a rank that fits, 0: not even one image."""

    name: str
    config: Config
    traced: Traced
    memory: Memory
    fits: bool
    micro_size: int
    time: StepTime
    costs: Costs


@dataclass(frozen=True)
class Point:
    """One number of ranks of the curve."""

    ranks: int
    images_per_s: float
    hours: float
    money: float


@dataclass(frozen=True)
class RunPlan:
    """`options`: backends that fit, the fastest first; `refused`: others and why; `pays_up_to`: ranks, 0: all shown pay."""

    request: Request
    options: list[Option]
    refused: dict[str, str]
    curve: list[Point] = field(default_factory=list)
    pays_up_to: int = 0
    limit: str = ""
    changes: list[Change] = field(default_factory=list)


def make_plan(request: Request) -> RunPlan:
    """Raises ConfigError if the ranks cannot share the batch, or if no backend fits, with the setting that would."""
    config, ranks = request.config, request.ranks
    config.rows_per_rank(ranks)
    if request.links.nodes(ranks) > 1 and request.wires is None:
        raise ConfigError(
            f"{ranks} ranks are {request.links.nodes(ranks)} nodes of {request.per_node}, and no network joins them; add "
            "--network, such as ib-400, or --per-node for other nodes."
        )
    request.rates  # noqa: B018 - what cannot be planned is said before anything is traced
    missing = {"all_gather", "reduce_scatter", "all_reduce"} - {kind for kind, _ in request.measured.networks}
    if ranks > 1 and missing and not request.chip.is_gpu:
        raise ConfigError(
            f"--gpu is 'cpu' with {ranks} ranks, whose {', '.join(sorted(missing))} was not measured; measure with "
            "`clae bench gather --json > gather.json`, and add gather.json to --measured."
        )
    traces = _Traces(request)
    options, refused = [], {}
    for name in request.backends:
        planned = replace(config, parallel=replace(config.parallel, backend=name))  # type: ignore[arg-type]
        problem = _unsupported(planned, ranks)
        if problem:
            refused[name] = problem
            continue
        option = _option(name, planned, traces, request)
        if option.fits:
            options.append(option)
        else:
            refused[name] = _too_large(option, request)
    if not options:
        told = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ConfigError(f"no backend fits {ranks} ranks of {request.chip.name}: {told}")
    options.sort(key=lambda option: option.time.total)
    best = options[0]
    curve = list(_curve(best, traces, request))
    return RunPlan(
        request,
        options,
        refused,
        curve,
        _pays_up_to(curve),
        limit_of(best.time),
        changes(best.config, best.traced, request.rates, request.links, best.costs, request.prices, request.crowding(ranks)),
    )


def _unsupported(config: Config, ranks: int) -> str:
    parallel = config.parallel
    if parallel.backend == "deepspeed":
        if ranks == 1 or config.train.precision == "float64":
            return "needs several ranks and float32 or bfloat16"
        if config.optim.name == "lars" and parallel.zero_stage:
            return "optim.name=lars needs parallel.zero_stage=0"
    if parallel.backend == "fsdp2" and parallel.shard_size and ranks % parallel.shard_size:
        return f"parallel.shard_size={parallel.shard_size} does not divide {ranks} ranks"
    return ""


class _Traces:
    """Steps that were traced, once for each kind: a step is the same under all backends, but for forwards of joined views."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._known: dict[tuple[bool, int, int, int], Traced] = {}

    def of(self, config: Config, ranks: int) -> Traced:
        parallel = config.parallel
        sharded = parallel.backend == "fsdp2" or (parallel.backend == "deepspeed" and parallel.zero_stage == 3)
        joined = (sharded and ranks > 1) or config.model.norm == "global"
        key = joined, ranks, config.batch.micro_size, config.batch.global_size
        if key not in self._known:
            request = self._request
            request.say(f"tracing a step on one of {ranks} ranks, {config.batch.micro_size or 'all'} images at a time")
            norm_ranks = request.norm_ranks(ranks)
            self._known[key] = trace(config, ranks, gpu=request.chip.is_gpu, norm_ranks=norm_ranks)
        return self._known[key]


def _option(name: str, config: Config, traces: _Traces, request: Request) -> Option:
    ranks, chip = request.ranks, request.chip
    traced = traces.of(config, ranks)
    memory = memory_of(traced, config)
    time = step_time(traced, config, request.rates, request.links, crowding=request.crowding(ranks))
    costs = costs_of(config, traced, time.total, chip, request.per_node, request.images, request.prices, request.measured)
    fits = memory.total <= request.usable_bytes
    micro = config.batch.micro_size or traced.rows
    if not fits or config.batch.micro_size:
        micro = _largest_micro(config, traces, request)
    return Option(name, config, traced, memory, fits, micro, time, costs)


def _largest_micro(config: Config, traces: _Traces, request: Request) -> int:
    """The largest micro-batch that fits, a divisor of a rank's rows; the memory of two of them is a line in their images."""
    rows = config.rows_per_rank(request.ranks)
    divisors = [size for size in range(1, rows) if rows % size == 0]
    few = [size for size in divisors if size <= 8][-2:]
    if len(few) < 2:
        return 0
    totals = [memory_of(traces.of(_with_micro(config, size, request.ranks), request.ranks), config).total for size in few]
    slope = (totals[1] - totals[0]) / (few[1] - few[0])

    def total(size: int) -> float:
        return totals[0] + slope * (size - few[0])

    return max((size for size in divisors if total(size) <= request.usable_bytes), default=0)


def _with_micro(config: Config, size: int, ranks: int) -> Config:
    """Two micro-batches of this size."""
    batch = replace(config.batch, micro_size=size, global_size=2 * size * ranks)
    data = replace(config.data, streams=0)
    return replace(config, batch=batch, data=data, method=config.method.for_few_rows(2 * size * ranks))


def _too_large(option: Option, request: Request) -> str:
    gib = 1 << 30
    need = f"a rank needs {option.memory.total / gib:.1f} GiB, {request.chip.name} has {request.usable_bytes / gib:.1f} usable"
    if option.micro_size:
        return f"{need}; use batch.micro_size={option.micro_size}"
    sharded = "" if option.name == "fsdp2" else ", parallel.backend=fsdp2"
    return (
        f"{need}, and no micro-batch fits; use more ranks, train.activation_checkpointing=true{sharded}, or a smaller encoder"
    )


# ---- over ranks ----


def _curve(best: Option, traces: _Traces, request: Request) -> Iterator[Point]:
    """Ranks by powers of two around the request, each with its share of the batch; two traces serve all of them."""
    config, ranks = best.config, request.ranks
    sizes = sorted({ranks} | {size for size in (ranks * 2**power for power in range(-4, 5)) if size == int(size)})
    sizes += [ranks // 2**power for power in range(1, 12) if ranks % 2**power == 0]
    whole = replace(config, batch=replace(config.batch, micro_size=0))
    sizes = sorted({int(size) for size in sizes if size > 1 and whole.works_on(int(size))} | {ranks})
    other = next((size for size in reversed(sizes) if 1 < size < ranks), next((size for size in sizes if size > ranks), 0))
    for size in sizes:
        if size == ranks:
            traced = best.traced
        elif not other or ranks == 1:
            continue
        else:
            traced = between(best.traced, traces.of(_at(config, other), other), size, request.norm_ranks(size))
        if request.links.nodes(size) > 1 and request.wires is None:
            continue
        time = step_time(traced, config, request.rates, request.links, crowding=request.crowding(size))
        costs = costs_of(
            config, traced, time.total, request.chip, request.per_node, request.images, request.prices, request.measured
        )
        yield Point(size, costs.images_per_s, costs.hours, costs.money)


def _at(config: Config, ranks: int) -> Config:
    """The recipe on these ranks, whose rows may be fewer than a micro-batch."""
    micro = config.batch.micro_size
    rows = config.batch.global_size // ranks
    return replace(config, batch=replace(config.batch, micro_size=micro if micro and rows % micro == 0 and rows > micro else 0))


def _pays_up_to(curve: list[Point]) -> int:
    """The ranks after which twice as many are less than 1.5 times as fast; 0: not within the curve."""
    for point, following in pairwise(curve):
        if following.images_per_s / point.images_per_s < _PAYS ** ((following.ranks / point.ranks - 1) ** 0.5):
            return point.ranks
    return 0
