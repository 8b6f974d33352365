"""Config: every setting of a run, typed, frozen and validated where it is written.

A recipe (YAML) holds only what differs from the defaults below; `extends: other.yaml` starts from another recipe; dotted
`key=value` overrides come last. `resolve()` returns the Config and, for every key, where its value comes from.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """What a user wrote cannot be used. The message holds the key, the value and the way out."""


def _require(condition: bool, key: str, value: object, way_out: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is {value!r}; {way_out}")


def _no_effect(default: Any) -> Any:
    """A field that changes how a run is executed or watched, never its result: a resumed run may change it."""
    return field(default=default, metadata={"no_effect_on_result": True})


@dataclass(frozen=True)
class Data:
    """Which shards, and in which order they are read."""

    shards: str = _no_effect("")  # folder that data_prep wrote; what is in it is checked by its digest instead
    train_split: str = "train"
    test_split: str = "test"
    image_size: int = 224  # pixels a side of each view
    streams: int = 0  # canonical streams; a multiple of every world size the run should work on; 0 chooses
    shuffle_shards: int = 8  # shards whose samples are shuffled together
    workers: int = _no_effect(-1)  # loader processes a rank; -1 chooses from the cores of this machine
    verify: Literal["sha256", "size"] = _no_effect("sha256")  # how shards are checked when a run starts

    def __post_init__(self) -> None:
        _require(self.image_size >= 8, "data.image_size", self.image_size, "use at least 8 pixels.")
        _require(self.streams >= 0, "data.streams", self.streams, "use 0 (automatic) or a divisor of batch.global_size.")
        _require(self.shuffle_shards >= 1, "data.shuffle_shards", self.shuffle_shards, "use at least 1.")
        _require(self.workers >= -1, "data.workers", self.workers, "use -1 (automatic), 0 (in the training process) or more.")


@dataclass(frozen=True)
class Augment:
    """SimCLR's augmentation (Chen et al. 2020, appendix A). Probabilities are per view."""

    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grey: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels

    def __post_init__(self) -> None:
        for key in ("flip", "jitter", "grey", "blur"):
            value = getattr(self, key)
            _require(0 <= value <= 1, f"augment.{key}", value, "a probability lies between 0 and 1.")
        for key in ("brightness", "contrast", "saturation"):
            _require(getattr(self, key) >= 0, f"augment.{key}", getattr(self, key), "a strength is 0 or more.")
        _require(0 <= self.hue <= 0.5, "augment.hue", self.hue, "hue shifts lie between 0 and 0.5 of the circle.")
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "augment.crop_scale", self.crop_scale, "use 0 < low <= high <= 1.")
        low, high = self.crop_ratio
        _require(0 < low <= high, "augment.crop_ratio", self.crop_ratio, "use 0 < low <= high.")
        low, high = self.blur_sigma
        _require(0 < low <= high, "augment.blur_sigma", self.blur_sigma, "use 0 < low <= high, in pixels.")


@dataclass(frozen=True)
class Batch:
    """The batch of one step over all ranks; what a rank holds is derived from it."""

    global_size: int = 256
    # Images that a rank encodes at a time, with all negatives kept (GradCache, Gao et al. 2021); 0: its whole share.
    micro_size: int = 0

    def __post_init__(self) -> None:
        _require(self.global_size >= 2, "batch.global_size", self.global_size, "a contrast needs at least 2 images.")
        _require(self.micro_size >= 0, "batch.micro_size", self.micro_size, "use 0 (a rank's whole share) or a divisor of it.")


@dataclass(frozen=True)
class Model:
    """Encoder, projector and normalisation layers."""

    encoder: str = "torchvision/resnet50"  # small_resnet, timm/NAME or torchvision/NAME
    stem: Literal["auto", "imagenet", "cifar"] = "auto"  # auto: cifar (3x3, no max-pool) up to 64 pixels
    projector_hidden: int = 0  # width of the hidden layer; 0: the encoder's width
    projector_dim: int = 128
    norm: Literal["global", "local"] = "global"  # batch statistics over all ranks, or each rank's own
    adversarial_norm_momentum: float = 0.1  # of the adversarial route's running statistics
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # pixels are normalised inside the model
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        _require(
            self.projector_hidden >= 0, "model.projector_hidden", self.projector_hidden, "use 0 (encoder's width) or more."
        )
        _require(self.projector_dim >= 2, "model.projector_dim", self.projector_dim, "use at least 2.")
        _require(min(self.std) > 0, "model.std", self.std, "standard deviations are positive.")
        momentum = self.adversarial_norm_momentum
        _require(0 < momentum <= 1, "model.adversarial_norm_momentum", momentum, "use a number above 0 and at most 1.")


@dataclass(frozen=True)
class Objective:
    """The contrastive loss."""

    name: Literal["nt_xent", "instance"] = "nt_xent"
    temperature: float = 0.5
    # How ranks share negatives. log_sum_exp: rows, then one number a row; reduce_scatter: rows, and their gradients on the way
    # back, for any objective. auto: log_sum_exp where the objective has that form.
    gather: Literal["auto", "log_sum_exp", "reduce_scatter"] = _no_effect("auto")
    chunk: int = _no_effect(0)  # columns of the similarity matrix that exist at a time; 0 chooses

    def __post_init__(self) -> None:
        _require(self.chunk >= 0, "objective.chunk", self.chunk, "use 0 (automatic) or more; 2048 is usual.")
        _require(
            self.temperature > 0, "objective.temperature", self.temperature, "use a positive number, 0.1 to 0.5 as a rule."
        )


@dataclass(frozen=True)
class Attack:
    """The adversarial view (Ho & Vasconcelos 2020, section 3)."""

    name: Literal["fgsm", "pgd", "none"] = "fgsm"  # none: plain SimCLR
    norm: Literal["linf", "l2"] = "linf"  # of the perturbation
    epsilon: float = 4 / 255  # largest change of a pixel value (linf) or length of an image's change (l2), in the unit below
    unit: Literal["pixel", "normalised"] = "pixel"  # pixel: of [0, 1]; normalised: after subtracting mean, dividing by std
    clip: bool = True  # keep the adversarial image a valid image
    anchor: Literal["same", "other"] = "same"  # the view the attack moves away from: its own image's same view, or the other
    # exact: the paper's gradient at the least cost. original: the same with the forward and the weight gradients that the
    # paper's code computes and throws away. fused: another algorithm, the gradient that the clean loss has anyway in view y.
    cost: Literal["exact", "original", "fused"] = "exact"
    steps: int = 5  # of pgd; fgsm takes one
    step_size: float = 0.0  # in the unit of epsilon; 0: epsilon for fgsm, 2.5 epsilon / steps for pgd (Madry et al. 2018)
    random_start: bool = False  # from a random place in the ball rather than from its middle
    fraction: float = 1.0  # share of the batch that has an adversarial view; these are contrasted among themselves
    every: int = 1  # only every so many steps have an adversarial term
    # Parameters ask for no gradient while the attack runs. auto: where train.compile would compute them otherwise.
    freeze: Literal["auto", "always", "never"] = _no_effect("auto")
    statistics: Literal["untouched", "updated"] = "untouched"  # what the attack's forwards do to running statistics
    alpha: float = 1.0  # weight of the adversarial term
    start_epoch: float = 0.0  # alpha is 0 and nothing is attacked before

    def __post_init__(self) -> None:
        _require(self.epsilon >= 0, "attack.epsilon", self.epsilon, "use 0 or more; 4/255 = 0.0157 is usual in pixels.")
        _require(self.alpha >= 0, "attack.alpha", self.alpha, "use 0 or more.")
        _require(self.start_epoch >= 0, "attack.start_epoch", self.start_epoch, "use 0 or more.")
        _require(self.steps >= 1, "attack.steps", self.steps, "use at least 1.")
        _require(self.step_size >= 0, "attack.step_size", self.step_size, "use 0 (automatic) or more.")
        _require(0 < self.fraction <= 1, "attack.fraction", self.fraction, "use a share above 0 and at most 1.")
        _require(self.every >= 1, "attack.every", self.every, "use at least 1 (every step).")
        if self.norm == "l2":
            _require(
                self.unit == "pixel", "attack.unit", self.unit, "attack.norm=l2 is a length in pixels: use attack.unit=pixel."
            )
        if self.cost == "fused":
            fused = "attack.cost=fused takes the gradient that the clean loss has in the other view, once"
            _require(self.anchor == "other", "attack.anchor", self.anchor, f"{fused}: use attack.anchor=other.")
            _require(self.name != "pgd", "attack.name", self.name, f"{fused}: use attack.name=fgsm, or attack.cost=exact.")
            _require(not self.random_start, "attack.random_start", True, f"{fused}: use false, or attack.cost=exact.")
            _require(
                self.statistics == "untouched",
                "attack.statistics",
                self.statistics,
                "attack.cost=fused has no forward of its own: use untouched.",
            )

    @property
    def num_steps(self) -> int:
        """Gradients that an attack takes."""
        return self.steps if self.name == "pgd" else 1

    @property
    def length_of_step(self) -> float:
        """How far one step goes, in the unit of epsilon."""
        return self.step_size or (2.5 * self.epsilon / self.steps if self.name == "pgd" else self.epsilon)

    def rows(self, num_rows: int) -> int:
        """How many of a rank's rows have an adversarial view. Raises ConfigError when it is no whole number."""
        chosen = self.fraction * num_rows
        if abs(chosen - round(chosen)) > 1e-6 or round(chosen) < 1:
            raise ConfigError(
                f"attack.fraction is {self.fraction:g}, which makes {chosen:g} of a rank's {num_rows} rows; every "
                f"rank needs the same whole number: {max(1, round(chosen)) / num_rows:g} would do."
            )
        return round(chosen)


@dataclass(frozen=True)
class Optim:
    """Optimiser and its schedule."""

    name: Literal["adamw", "sgd", "lars"] = "lars"
    learning_rate: float = 0.3  # at batch.global_size = reference_batch
    scaling: Literal["linear", "sqrt", "none"] = "linear"  # of the learning rate with batch.global_size / reference_batch
    reference_batch: int = 256
    momentum: float = 0.9
    weight_decay: float = 1e-6
    decay: Literal["weights", "all"] = "weights"  # weights: not biases and norm layers, which LARS does not adapt either
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 10.0
    clip_norm: float = 0.0  # of the gradient over all parameters; 0: no clipping

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "use a positive number.")
        _require(self.reference_batch >= 1, "optim.reference_batch", self.reference_batch, "use at least 1.")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "use 0 up to, not including, 1.")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "use 0 or more.")
        _require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "use 0 or more.")
        _require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, "use 0 (none) or more.")


@dataclass(frozen=True)
class Train:
    """How long, how precise, and how often things happen on the way."""

    epochs: float = 100.0
    precision: Literal["auto", "float64", "float32", "bfloat16"] = "auto"  # bfloat16: autocast, the loss stays float32
    log_every: int = _no_effect(10)  # steps between lines of metrics
    diagnose_every: int = _no_effect(50)  # steps between measurements of the attack and of the embedding space
    knn_every: float = _no_effect(10.0)  # epochs between kNN evaluations; 0: never
    checkpoint_every: int = _no_effect(500)  # steps
    checkpoint_keep: int = _no_effect(3)  # newest checkpoints kept; older ones are deleted
    threads: int = _no_effect(0)  # of torch on the CPU; 0 shares this machine's cores among its ranks
    compile: bool = _no_effect(False)  # torch.compile of the encoder's blocks
    activation_checkpointing: bool = _no_effect(False)  # blocks are computed again in the backward pass: less memory, more time
    ema_decay: float = 0.0  # of the average of the weights that is then evaluated and exported, 0.999 as a rule; 0: none

    def __post_init__(self) -> None:
        _require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "use 0 (no average) up to, not including, 1.")
        if self.compile and self.activation_checkpointing:
            raise ConfigError(
                "train.compile is true beside train.activation_checkpointing, whose second forward must know the route of the "
                "first, which compiled blocks do not; use one of them."
            )
        _require(self.epochs > 0, "train.epochs", self.epochs, "use a positive number; fractions are fine.")
        for key in ("log_every", "diagnose_every", "checkpoint_every", "checkpoint_keep"):
            _require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "use at least 1.")
        _require(self.knn_every >= 0, "train.knn_every", self.knn_every, "use 0 (never) or more.")
        _require(self.threads >= 0, "train.threads", self.threads, "use 0 (automatic) or more.")


@dataclass(frozen=True)
class Parallel:
    """What wraps the encoder. Nothing here changes what is computed: a run may go on under another backend."""

    backend: Literal["ddp", "fsdp2", "deepspeed"] = _no_effect("ddp")
    reshard_after_forward: bool = _no_effect(True)  # fsdp2: whole parameters are freed between forward and backward
    shard_size: int = _no_effect(0)  # fsdp2: ranks that share one copy of the parameters; 0: all; fewer: hybrid, 2-D mesh
    zero_stage: int = _no_effect(
        1
    )  # deepspeed: what is shared; 0 nothing, 1 optimiser state, 2 gradients too, 3 parameters too

    def __post_init__(self) -> None:
        _require(
            self.shard_size >= 0, "parallel.shard_size", self.shard_size, "use 0 (all ranks) or a divisor of their number."
        )
        _require(0 <= self.zero_stage <= 3, "parallel.zero_stage", self.zero_stage, "use 0, 1, 2 or 3.")


@dataclass(frozen=True)
class Launch:
    """Who starts the ranks."""

    launcher: Literal["ray", "torchrun", "local"] = _no_effect("local")
    workers: int = _no_effect(0)  # ranks; 0: one a GPU, or one without GPUs
    max_failures: int = _no_effect(3)  # Ray: how often a run is started again after a lost worker

    def __post_init__(self) -> None:
        _require(self.workers >= 0, "launch.workers", self.workers, "use 0 (automatic) or more.")
        _require(self.max_failures >= 0, "launch.max_failures", self.max_failures, "use 0 or more.")


@dataclass(frozen=True)
class Tracking:
    """Where metrics go beside the console and the run folder's metrics.jsonl."""

    name: Literal["mlflow", "none"] = _no_effect("mlflow")
    uri: str = _no_effect("")  # empty: MLFLOW_TRACKING_URI, or mlflow.db beside the run folder
    experiment: str = _no_effect("clae-dist")


@dataclass(frozen=True)
class Evaluation:
    """kNN and linear probe on frozen features of the clean route."""

    knn_k: int = 200
    knn_temperature: float = 0.1
    train_images: int = 0  # kNN bank and probe's training set of `clae evaluate`; 0: the whole train split
    knn_bank: int = _no_effect(10_000)  # while training: train images of the kNN bank; `clae evaluate` takes all
    knn_queries: int = _no_effect(2_000)  # while training: test images; `clae evaluate` takes all
    linear_iterations: int = 100  # of L-BFGS
    linear_penalty: float = 0.0  # L2; 0: the best of a small grid on a tenth of the train split held out
    batch_size: int = _no_effect(500)

    def __post_init__(self) -> None:
        for key in ("knn_k", "knn_bank", "knn_queries", "linear_iterations", "batch_size"):
            _require(getattr(self, key) >= 1, f"evaluation.{key}", getattr(self, key), "use at least 1.")
        _require(self.train_images >= 0, "evaluation.train_images", self.train_images, "use 0 (all) or more.")
        _require(self.knn_temperature > 0, "evaluation.knn_temperature", self.knn_temperature, "use a positive number.")
        _require(
            self.linear_penalty >= 0,
            "evaluation.linear_penalty",
            self.linear_penalty,
            "use 0 (search) or more.",
        )


@dataclass(frozen=True)
class Config:
    """Every setting of a run."""

    name: str = "run"
    run_dir: str = _no_effect("")  # empty: runs/<name>
    seed: int = 0
    data: Data = Data()
    augment: Augment = Augment()
    batch: Batch = Batch()
    model: Model = Model()
    objective: Objective = Objective()
    attack: Attack = Attack()
    optim: Optim = Optim()
    train: Train = Train()
    parallel: Parallel = Parallel()
    launch: Launch = Launch()
    tracking: Tracking = Tracking()
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        _require(
            self.name.strip(" .") != "" and "/" not in self.name,
            "name",
            self.name,
            "use a plain word; it names the run's folder.",
        )
        _require(0 <= self.seed < 2**63, "seed", self.seed, "use 0 up to 2^63 - 1.")
        streams, size = self.data.streams, self.batch.global_size
        if streams and size % streams:
            near = _nearest_divisor(size, streams)
            raise ConfigError(f"data.streams is {streams}, which does not divide batch.global_size {size}; {near} would do.")
        if self.optim.warmup_epochs >= self.train.epochs and self.optim.warmup_epochs > 0:
            raise ConfigError(
                f"optim.warmup_epochs is {self.optim.warmup_epochs:g}, but train.epochs is {self.train.epochs:g}; "
                f"warm up for less than the whole run, a tenth as a rule."
            )

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    @property
    def num_streams(self) -> int:
        """Canonical streams: a property of the run, the same at every world size."""
        return self.data.streams or max(d for d in range(1, 257) if self.batch.global_size % d == 0)

    def rows_per_rank(self, world_size: int) -> int:
        """B, the rows of the global batch on each of `world_size` ranks. Raises ConfigError when they cannot be equal."""
        size, streams = self.batch.global_size, self.num_streams
        if size % world_size:
            below, above = size // world_size * world_size, -(-size // world_size) * world_size
            choice = f"{above}" if below < 2 else f"{below} or {above}"
            raise ConfigError(f"batch.global_size is {size}, but {world_size} ranks need equal rows; {choice} would do.")
        if streams % world_size:
            wanted = streams * world_size // math.gcd(streams, world_size)
            way_out = f"data.streams={wanted} would do" if size % wanted == 0 else "use another number of ranks"
            raise ConfigError(f"data.streams is {streams}, which {world_size} ranks cannot share equally; {way_out}.")
        rows, micro = size // world_size, self.batch.micro_size
        if micro and self.attack.cost == "original":
            raise ConfigError(
                "attack.cost is 'original', the paper's code to the letter, with a rank's whole share in one graph; "
                "use attack.cost=exact (the same gradient) with batch.micro_size."
            )
        if micro and rows % micro:
            near = _nearest_divisor(rows, micro)
            raise ConfigError(f"batch.micro_size is {micro}, which does not divide the {rows} rows of a rank; {near} would do.")
        if self.attack.name != "none":
            attacked = self.attack.rows(rows)
            if micro and attacked % micro:
                raise ConfigError(
                    f"batch.micro_size is {micro}, which does not divide the {attacked} attacked rows of a rank "
                    f"(attack.fraction {self.attack.fraction:g}); {math.gcd(rows, attacked)} would do."
                )
        return rows

    def learning_rate(self) -> float:
        """The peak learning rate at this global batch (Goyal et al. 2017 for linear, Chen et al. 2020 B.1 for sqrt)."""
        ratio = self.batch.global_size / self.optim.reference_batch
        return self.optim.learning_rate * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.optim.scaling]


def _nearest_divisor(size: int, wanted: int) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))


# ---- from YAML and the command line to a Config ----


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"data.image_size": 32, …} for a Config or one of its parts, in the order of definition."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{f.name}."))
        else:
            flat[prefix + f.name] = value
    return flat


def _fields(cls: type = Config, prefix: str = "") -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Dotted key -> (field, resolved type) of every leaf."""
    hints = typing.get_type_hints(cls)
    leaves: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            leaves.update(_fields(hints[f.name], f"{prefix}{f.name}."))
        else:
            leaves[prefix + f.name] = (f, hints[f.name])
    return leaves


FIELDS = _fields()


def shapes_result(key: str) -> bool:
    """Whether another value of this key would make another run (and not only run the same one differently)."""
    return not FIELDS[key][0].metadata.get("no_effect_on_result", False)


def _coerce(key: str, value: Any, wanted: Any, origin: str) -> Any:
    """`value` as the type that `key` wants, or a ConfigError that says what would do."""

    def refuse(what: str) -> typing.NoReturn:
        raise ConfigError(f"{key} is {value!r} ({origin}); it wants {what}.")

    kind = typing.get_origin(wanted)
    if kind is Literal:
        choices = typing.get_args(wanted)
        if value is None and "none" in choices:
            return "none"
        if value not in choices:
            close = difflib.get_close_matches(str(value), choices, n=1)
            refuse(f"one of {', '.join(choices)}" + (f" (did you mean {close[0]}?)" if close else ""))
        return value
    if kind is tuple:
        inner = typing.get_args(wanted)
        if not isinstance(value, (list, tuple)) or len(value) != len(inner):
            refuse(f"a list of {len(inner)} numbers, such as [{', '.join(['0.5'] * len(inner))}]")
        return tuple(_coerce(f"{key}[{i}]", item, inner[i], origin) for i, item in enumerate(value))
    assert not isinstance(wanted, types.UnionType), f"{key}: no unions in Config"
    if wanted is bool:
        return value if isinstance(value, bool) else refuse("true or false")
    if wanted is str:
        return "" if value is None else value if isinstance(value, str) else refuse("a text")
    if wanted is int:
        if isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d+", value):  # YAML 1.1 reads 1e3 as a text
            value = float(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return value if isinstance(value, int) and not isinstance(value, bool) else refuse("a whole number")
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a text
        try:
            value = float(value)
        except ValueError:
            numerator, slash, denominator = value.partition("/")  # 4/255, as papers write it
            try:
                value = float(numerator) / float(denominator) if slash else refuse("a number")
            except (ValueError, ZeroDivisionError):
                refuse("a number")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        refuse("a finite number")
    return float(value)


@dataclass(frozen=True)
class Setting:
    """A value as someone wrote it, and where."""

    value: Any
    origin: str


def _check_key(key: str, origin: str) -> None:
    if key in FIELDS:
        return
    inside = [name for name in FIELDS if name.startswith(key + ".")]
    if inside:
        raise ConfigError(f"{key} ({origin}) is a section; set one of its keys: {', '.join(inside)}.")
    close = [name for name in FIELDS if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]  # right name, wrong section
    if len(close) != 1:
        close = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "`clae config CONFIG` lists the known ones."
    raise ConfigError(f"{key} ({origin}) is not a known key; {hint}")


def _value(key: str, node: yaml.Node) -> Any:
    """What a YAML node means for `key`: a text stays as it was written, where YAML would make 7 of 007 or true of yes."""
    if isinstance(node, yaml.ScalarNode) and FIELDS[key][1] is str:
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    return yaml.SafeLoader("").construct_object(node, deep=True)


def read_recipe(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Setting]:
    """The settings of a YAML file, after those of the file it extends. Raises ConfigError."""
    chain = (*extended_by, path.resolve())
    if path.resolve() in extended_by:
        raise ConfigError(f"{' -> '.join(map(str, chain))}: the recipe extends itself; take one `extends` out.")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); name a recipe, such as configs/quickstart.yaml."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text in UTF-8; name a recipe, such as configs/quickstart.yaml.") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    settings: dict[str, Setting] = {}
    if root is None:
        return settings
    own: dict[str, Setting] = {}

    def walk(node: yaml.MappingNode, prefix: str) -> None:
        for key_node, value_node in node.value:
            key, origin = prefix + str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
            if isinstance(value_node, yaml.MappingNode):
                walk(value_node, key + ".")
                continue
            if key in own:
                raise ConfigError(f"{key} is set twice in {path} ({own[key].origin} and {origin}); keep one.")
            if key == "extends":
                own[key] = Setting(value_node.value, origin)
                settings.update(read_recipe(path.parent / str(value_node.value), chain))
                continue
            _check_key(key, origin)
            try:
                own[key] = Setting(_value(key, value_node), origin)
            except (yaml.YAMLError, ValueError) as error:
                raise ConfigError(
                    f"{key} ({origin}) cannot be read ({' '.join(str(error).split())}); write a plain value."
                ) from None

    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} holds no mapping; write `section:` and `  key: value` lines.")
    walk(root, "")
    own.pop("extends", None)
    return {**settings, **own}


def parse_overrides(overrides: list[str], origin: str = "command line") -> dict[str, Setting]:
    """Settings from `section.key=value` texts. Raises ConfigError."""
    settings: dict[str, Setting] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} is not an override; write section.key=value, such as batch.global_size=512.")
        _check_key(key, origin)
        if FIELDS[key][1] is str:  # a path may hold what YAML would read as a comment or a mapping
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            settings[key] = Setting("" if value == "null" else value[1:-1] if quoted else value, origin)
            continue
        try:
            node = yaml.compose(value, Loader=yaml.SafeLoader)
            settings[key] = Setting("" if node is None else _value(key, node), origin)
        except (yaml.YAMLError, ValueError):
            raise ConfigError(f"{key} is {value!r} ({origin}), which is not valid YAML; quote it.") from None
    return settings


def build(settings: dict[str, Setting]) -> Config:
    """The Config that the settings make over the defaults. Raises ConfigError."""
    hints = typing.get_type_hints(Config)
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for key, setting in settings.items():
        value = _coerce(key, setting.value, FIELDS[key][1], setting.origin)
        section, dot, name = key.rpartition(".")
        (sections.setdefault(section, {}) if dot else top)[name] = value
    try:
        return Config(**top, **{name: hints[name](**values) for name, values in sections.items()})
    except ConfigError as error:
        key = str(error).split(" ", 1)[0]
        origin = f" [{settings[key].origin}]" if key in settings else ""
        raise ConfigError(f"{error}{origin}") from None


def resolve(recipe: str | Path | None, overrides: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """The Config of a recipe with overrides, and the origin of every value ("default", "file:line", "command line")."""
    settings = read_recipe(Path(recipe)) if recipe else {}
    settings.update(parse_overrides(overrides or []))
    config = build(settings)
    return config, {key: settings[key].origin if key in settings else "default" for key in FIELDS}


def to_yaml(config: Config, comments: dict[str, str] | None = None) -> str:
    """The resolved configuration as YAML that `read_recipe` reads back; `comments` are written behind their keys."""
    lines: list[str] = []
    section = ""
    for key, value in flatten(config).items():
        prefix, dot, name = key.rpartition(".")
        if dot and prefix != section:
            lines.append(f"{prefix}:")
            section = prefix
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
        comment = f"  # {comments[key]}" if comments and key in comments else ""
        lines.append(f"{'  ' if dot else ''}{name}: {text}{comment}")
    return "\n".join(lines) + "\n"


def from_yaml(path: Path) -> Config:
    """The Config that `to_yaml` wrote. Raises ConfigError."""
    return build(read_recipe(path))
