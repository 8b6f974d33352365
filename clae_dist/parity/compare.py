"""Compare W ranks with one process, judge whether the differences are rounding, and name the usual cause of others.

In float64 the two are compared directly. Otherwise both are compared with one process in float64, and W ranks may differ from
it three times as much as one process does by rounding, because attack and optimiser can amplify rounding (a sign, a step of
Adam).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from clae_dist.config import Config
from clae_dist.models import build_model
from clae_dist.models.norms import has_batch_statistics, random_layers
from clae_dist.parity.observe import Observation, Tensors, sign_noise

# Differences that are always accepted as rounding: absolute in float64, otherwise relative.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 5e-2}
_TIMES_ROUNDING = 3.0
_QUANTITIES = {  # fields of Parity, and their labels in the table
    "loss": "loss",
    "param_grad": "parameter gradients",
    "input_grad": "input gradient",
    "params_after": "parameters after a step",
}


@dataclass(frozen=True)
class Difference:
    """The difference of two sets of tensors.

    Args:
        absolute: the largest difference of any element.
        relative: the largest of all tensors of: largest difference over largest element (at least a thousandth of the largest
            element of all tensors, for tensors that are almost zero).
        tensor: the tensor of `relative`.
        first: the first tensor, in the order of the model, that differs by more than rounding; "" for none.
        first_by: the difference of `first`.
        distance: length of the difference of all tensors over the length of all expected ones.
    """

    absolute: float
    relative: float
    tensor: str = ""
    first: str = ""
    first_by: float = 0.0
    distance: float = 0.0


@dataclass(frozen=True)
class Parity:
    """The result of `clae parity`, printed by --json."""

    loss: Difference
    param_grad: Difference
    input_grad: Difference
    params_after: Difference
    attacked: bool  # the method attacks images: without that there is no input gradient and no delta
    delta_sign_agreement: float  # share of pixels with equal signs
    world_size: int
    backend: str
    zero_stage: int  # of DeepSpeed; -1 under another backend
    dtype: str
    passed: bool
    cause: str  # the usual cause of the first difference; "" without one
    rounding: dict[str, float]  # relative difference of one process in `dtype` from float64; empty in float64
    distance_alone: float = 0.0  # of one process's parameter gradients in `dtype` from float64 (Difference.distance)
    steps: int = 1  # compared steps, each from the same state; the differences are the largest, or those of the failed step
    failed_step: int = 0  # the first step that differs, from 1; 0: none
    free_running: Difference | None = None  # of the parameters after all steps in a row: not judged, since rounding accumulates

    def as_dict(self) -> dict[str, Any]:
        """For JSON: infinite differences (missing, of another shape, NaN) are None."""

        def finite(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: finite(inner) for key, inner in value.items()}
            return None if isinstance(value, float) and not math.isfinite(value) else value

        content: dict[str, Any] = finite(asdict(self))
        return content


def difference(tensors: Tensors, expected: Tensors, dtype: str = "float64", rounding: float = 0.0) -> Difference:
    """The difference of tensors computed in `dtype`, in which rounding alone causes the relative difference `rounding`.

    A missing, extra or non-finite tensor has an infinite difference.
    """
    bar = max(TOLERANCE[dtype], _TIMES_ROUNDING * rounding)
    pairs = dict(_pairs(tensors, expected))
    first, first_by = "", 0.0
    for name, pair in pairs.items():
        measured = pair[0] if dtype == "float64" else pair[1]
        if measured > bar:
            first, first_by = name, measured
            break
    tensor = max(pairs, key=lambda name: pairs[name][1], default="")
    absolute = max((pair[0] for pair in pairs.values()), default=0.0)
    distance = _distance(tensors, expected) if absolute < float("inf") else float("inf")
    return Difference(absolute, pairs[tensor][1] if pairs else 0.0, tensor, first, first_by, distance)


def _distance(tensors: Tensors, expected: Tensors) -> float:
    apart = sum(float((tensors[name].double() - value.double()).square().sum()) for name, value in expected.items())
    length = sum(float(value.double().square().sum()) for value in expected.values())
    return math.sqrt(apart / length) if length else math.sqrt(apart)


def _pairs(tensors: Tensors, expected: Tensors) -> Iterator[tuple[str, tuple[float, float]]]:
    """(name, (absolute, relative)) of each tensor in the order of `expected`, extra ones last."""
    largest = max((float(value.abs().max()) for value in expected.values() if value.numel()), default=0.0)
    for name in dict.fromkeys([*expected, *tensors]):
        absolute = relative = float("inf")
        if name in tensors and name in expected and tensors[name].shape == expected[name].shape:
            reference = expected[name].double()
            absolute = float((tensors[name].double() - reference).abs().max()) if reference.numel() else 0.0
            scale = max(float(reference.abs().max()) if reference.numel() else 0.0, 1e-3 * largest)
            relative = absolute / scale if scale else absolute
        if not absolute < float("inf"):
            absolute = relative = float("inf")
        yield name, (absolute, relative)


def _differences(seen: Observation, expected: Observation, dtype: str, rounding: dict[str, float]) -> dict[str, Difference]:
    pairs: dict[str, tuple[Tensors, Tensors]] = {
        "loss": ({"loss": seen.loss}, {"loss": expected.loss}),
        "param_grad": (seen.grads, expected.grads),
        "input_grad": ({"images": seen.input_grad}, {"images": expected.input_grad}),
        "params_after": (seen.params_after, expected.params_after),
    }
    return {name: difference(*pair, dtype, rounding.get(name, 0.0)) for name, pair in pairs.items()}


def compare_steps(
    config: Config,
    world_size: int,
    dtype: str,
    many: Sequence[Observation],
    single: Sequence[Observation],
    one: Sequence[Observation],
    free: Difference | None = None,
) -> Parity:
    """`compare` for several steps, each from the same state; the cause is that of the first step that differs."""
    each = [compare(config, world_size, dtype, *observations) for observations in zip(many, single, one, strict=True)]
    failed = next((number for number, parity in enumerate(each, 1) if not parity.passed), 0)
    judged = [each[failed - 1]] if failed else each

    def worst(name: str) -> Any:
        return max((getattr(parity, name) for parity in judged), key=lambda value: (bool(value.first), value.relative))

    return replace(
        judged[0],
        **{name: worst(name) for name in _QUANTITIES},
        delta_sign_agreement=min(parity.delta_sign_agreement for parity in each),
        rounding={name: max(parity.rounding[name] for parity in each) for name in judged[0].rounding},
        distance_alone=max(parity.distance_alone for parity in each),
        steps=len(each),
        failed_step=failed,
        free_running=free,
    )


def compare(config: Config, world_size: int, dtype: str, many: Observation, single: Observation, one: Observation) -> Parity:
    """W ranks (`many`) and one process (`single`) in `dtype` against one process in float64 (`one`, `single` itself there)."""
    rounding: dict[str, float] = {}
    distance_alone = 0.0
    if dtype != "float64":
        by_rounding = _differences(single, one, dtype, {})
        rounding = {name: value.relative for name, value in by_rounding.items()}
        distance_alone = by_rounding["param_grad"].distance
    agreement = _sign_agreement(many, one, dtype)
    # The gradients of an attack's later steps are not those that are known: rounding decides signs there, too.
    unequal = 0.0 if dtype == "float64" else 1 - _sign_agreement(single, one, dtype)
    differences: dict[str, Any] = _differences(many, one, dtype, rounding)
    wrong = [name for name, value in differences.items() if value.first]
    if 1 - agreement > _TIMES_ROUNDING * unequal:
        wrong.append("delta_sign_agreement")
    cause = likely_cause(config, world_size, dtype, wrong, many, one) if wrong else ""
    return Parity(
        **differences,
        attacked=bool(one.signs.numel()),
        delta_sign_agreement=agreement,
        world_size=world_size,
        backend=config.parallel.backend,
        zero_stage=config.parallel.zero_stage if config.parallel.backend == "deepspeed" else -1,
        dtype=dtype,
        passed=not wrong,
        cause=cause,
        rounding=rounding,
        distance_alone=distance_alone,
    )


def _sign_agreement(found: Observation, one: Observation, dtype: str) -> float:
    """Share of equal signs of δ where the gradient at the start of the attack is larger than rounding; 1 without an attack."""
    if not one.signs.numel():
        return 1.0
    same = (found.signs == one.signs)[one.input_grad.abs() > sign_noise(one.input_grad, dtype)]
    return float(same.double().mean()) if same.numel() else 1.0


def likely_cause(config: Config, world_size: int, dtype: str, wrong: list[str], many: Observation, one: Observation) -> str:
    """The usual cause of the first difference in `wrong`; settings that explain it come first."""
    model = build_model(config).encoder
    if config.model.statistics_differ and has_batch_statistics(model):
        return (
            f"model.{config.model.statistics_differ}: ranks normalise with batch statistics of their own, so that W ranks are "
            "another model than one; model.norm=global makes them the same (with model.norm_group=all)."
        )
    if config.batch.micro_size and has_batch_statistics(model):
        return (
            "batch.micro_size with batch norm: the statistics are those of a micro-batch; the embedding cache is exact for "
            "models without batch statistics (LayerNorm, GroupNorm)."
        )
    if random_layers(model):
        return (
            f"the encoder draws random numbers in its forward ({', '.join(random_layers(model)[:3])}), other ones on every "
            "rank; build it without dropout and drop path to compare."
        )
    if difference({"clean": many.clean}, {"clean": one.clean}, dtype).first:
        return "the loss itself: rows are paired with wrong positives (the offset of a rank's rows), or the weights differ."
    if wrong[0] in ("loss", "param_grad"):  # a wrong attack changes the loss, a wrong gather both
        return _gradient_cause(_flat(many.grads), _flat(one.grads), world_size)
    if wrong[0] == "input_grad":
        return (
            "the parameters' gradient is right and the input's is not: it must arrive multiplied by the number of ranks and be "
            "taken from the bare module with torch.autograd.grad."
        )
    if wrong[0] == "params_after":
        return (
            f"the gradients agree and the optimiser's steps ({config.optim.name}) do not: clipping, weight decay groups or its "
            "state; an adaptive one takes full steps along gradients that are only rounding (compare with optim.name=sgd)."
        )
    return "δ differs in pixels whose gradient is far from zero: the attack did not see the negatives of all ranks."


def _flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)]) if tensors else torch.zeros(1).double()


def _gradient_cause(gradient: torch.Tensor, expected: torch.Tensor, world_size: int) -> str:
    if gradient.shape != expected.shape:
        return "other parameters have a gradient: a route of norm layers, or a frozen part, is unused on one side."
    scale = float(gradient @ expected / (expected @ expected))
    cosine = float(gradient @ expected / (gradient.norm() * expected.norm()))
    measured = f"the parameter gradient has {scale:.3g} times the length along the right one, cosine {cosine:.4f}: "
    if cosine > 0.99999 and not 0.99 < scale < 1.01:
        return measured + (
            f"scaled as a whole ({world_size} ranks): the gather's backward and the backend must not both sum or both average."
        )
    if cosine < 0.99999:
        return measured + (
            "rows of other ranks get no gradient, or the wrong one: the gather's backward must sum the gradients of a row over "
            "all ranks; an attack through the wrapper has the same effect."
        )
    return measured + "small differences in a few tensors: begin with the named one."


def table(parity: Parity) -> Iterator[str]:
    """The lines of the report for a terminal."""
    against = "" if parity.dtype == "float64" else " in float64"
    backend = parity.backend + (f", ZeRO-{parity.zero_stage}" if parity.zero_stage >= 0 else "")
    each = f"each of {parity.steps} steps" if parity.steps > 1 else "a step"
    yield f"{parity.world_size} ranks ({backend}) in {parity.dtype} against one process{against}: {each} from the same state"
    yield f"  {'':<24}{'absolute':>12}{'relative':>12}{'rounding' if parity.rounding else '':>12}   largest in"
    for name, label in _QUANTITIES.items():
        value: Difference = getattr(parity, name)
        if name == "input_grad" and not parity.attacked:
            yield f"  {label:<24}{'–':>12}{'–':>12}{'':>12}   the method attacks no images"
            continue
        verdict = f"   <- differs, {value.first} first, by {value.first_by:.2e}" if value.first else ""
        alone = f"{parity.rounding[name]:.2e}" if parity.rounding else ""
        yield f"  {label:<24}{value.absolute:>12.2e}{value.relative:>12.2e}{alone:>12}   {value.tensor}{verdict}"
    if parity.attacked:
        yield f"  {'signs of delta':<24}{parity.delta_sign_agreement:>11.4%}"
    if parity.free_running is not None:
        free = parity.free_running
        label = f"parameters, {parity.steps} free steps"
        numbers = f"{free.absolute:>12.2e}{free.relative:>12.2e}{'':>12}"
        yield f"  {label:<24}{numbers}   {free.tensor} (not judged: rounding accumulates)"
    bar = f"{TOLERANCE[parity.dtype]:g} {'relative' if parity.rounding else 'absolute'}"
    rest = f", or {_TIMES_ROUNDING:g} times what rounding does to one process" if parity.rounding else ""
    where = f" at step {parity.failed_step}" if parity.failed_step else ""
    signs = f"; {'all signs' if parity.dtype == 'float64' else 'signs alike'}" if parity.attacked else ""
    yield f"parity: {'passed' if parity.passed else 'FAILED'}{where} (bar: {bar}{rest}{signs})"
    if parity.cause:
        yield f"usual cause: {parity.cause}"
