"""Every setting of a run: typed, frozen, validated where it is written. recipe.py makes a Config of YAML and overrides."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """What a user wrote cannot be used. The message holds the key, the value and the way out."""


def _require(condition: bool, key: str, value: object, way_out: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is {value!r}; {way_out}")


_NO_EFFECT = {"no_effect_on_result": True}


def _no_effect(default: Any) -> Any:
    """A field that changes how a run is executed or watched, never its result: a resumed run may change it."""
    return field(default=default, metadata=_NO_EFFECT)


@dataclass(frozen=True)
class Data:
    """Which shards, and in which order they are read."""

    # The folder that data_prep wrote, here or at http(s)://, s3://, gs://; or plain shards, several by "::":
    # x-{000000..000099}.tar, pipe:COMMAND. What is in it is checked by its digest instead.
    shards: str = _no_effect("")
    # Further sets, and the share of every global batch that comes from each; data.shards has the rest, and is evaluated on.
    mixture: dict[str, float] = field(default_factory=dict, metadata=_NO_EFFECT)
    train_split: str = "train"
    test_split: str = "test"
    image_size: int = 224  # pixels a side of each view
    streams: int = 0  # canonical streams; a multiple of every world size the run should work on; 0 chooses
    shuffle_shards: int = 8  # shards whose samples are shuffled together
    workers: int = _no_effect(-1)  # loader processes a rank; -1 chooses from the cores of this machine
    verify: Literal["sha256", "size"] = _no_effect("sha256")  # how shards of this machine are checked when a run starts
    cache: str = _no_effect("")  # folder on this machine for shards from elsewhere; empty: shards/ in the user's cache folder
    cache_bytes: int = _no_effect(0)  # what it may hold, the least recently used goes first; 0: what the disk has, less 1 GiB
    prefetch_shards: int = _no_effect(8)  # from elsewhere that a rank fetches ahead of need; 0: none
    timeout_s: float = _no_effect(30.0)  # without a byte, after which a connection is cut and tried again
    retries: int = _no_effect(8)  # of a fetch that gets no further, with growing pauses (a minute in all)
    # Images that cannot be decoded, for which others stand in, before a run ends: a share of all (below 1), or a number.
    max_bad: float = _no_effect(0.001)
    # Files of a sample that come along with its image, as bytes (Batch.metadata): [json, txt]. They cost a look at the tar.
    metadata: tuple[str, ...] = _no_effect(())

    def __post_init__(self) -> None:
        _require(self.image_size >= 8, "data.image_size", self.image_size, "use at least 8 pixels.")
        _require(self.streams >= 0, "data.streams", self.streams, "use 0 (automatic) or a divisor of batch.global_size.")
        _require(self.shuffle_shards >= 1, "data.shuffle_shards", self.shuffle_shards, "use at least 1.")
        shares = list(self.mixture.values())  # without the names, which may be URLs with secrets
        _require(all(0 < share < 1 for share in shares), "data.mixture", shares, "each share is above 0 and below 1.")
        rest = 1 - sum(shares)
        _require(rest > 1e-9, "data.mixture", shares, f"the shares leave {rest:g} for data.shards: they must leave some.")
        _require(self.max_bad >= 0, "data.max_bad", self.max_bad, "use 0 (none), a share below 1 or a number of images.")
        _require(self.workers >= -1, "data.workers", self.workers, "use -1 (automatic), 0 (in the training process) or more.")
        for key in ("cache_bytes", "prefetch_shards", "retries"):
            _require(getattr(self, key) >= 0, f"data.{key}", getattr(self, key), "use 0 or more.")
        _require(self.timeout_s > 0, "data.timeout_s", self.timeout_s, "use a positive number of seconds, 30 as a rule.")


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
        if self.cost == "fused" and self.name != "none":
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
        for key in ("log_every", "diagnose_every"):
            _require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "use at least 1.")
        _require(self.knn_every >= 0, "train.knn_every", self.knn_every, "use 0 (never) or more.")
        _require(self.threads >= 0, "train.threads", self.threads, "use 0 (automatic) or more.")


@dataclass(frozen=True)
class Checkpointing:
    """When a run saves, beside its end, and which checkpoints stay. By steps or by minutes, whichever comes first."""

    every_steps: int = _no_effect(500)  # 0: never
    every_minutes: float = _no_effect(0.0)  # since the last one; 0: never
    keep: int = _no_effect(3)  # the newest
    keep_every_hours: float = _no_effect(0.0)  # one of every so many hours stays for good; 0: none

    def __post_init__(self) -> None:
        for key in ("every_steps", "every_minutes"):
            _require(getattr(self, key) >= 0, f"checkpoint.{key}", getattr(self, key), "use 0 (never) or more.")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "use at least 1.")
        _require(self.keep_every_hours >= 0, "checkpoint.keep_every_hours", self.keep_every_hours, "use 0 (none) or more.")


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
    min_workers: int = _no_effect(0)  # Ray: goes on with as few when hosts are lost, up to launch.workers again; 0: not elastic
    look_every_s: float = _no_effect(30.0)  # Ray: seconds between looks for hosts that came back or will be taken away
    max_failures: int = _no_effect(3)  # Ray and local: how often a run is started again after a lost or hung rank

    def __post_init__(self) -> None:
        _require(self.workers >= 0, "launch.workers", self.workers, "use 0 (automatic) or more.")
        _require(self.max_failures >= 0, "launch.max_failures", self.max_failures, "use 0 or more.")
        _require(self.look_every_s > 0, "launch.look_every_s", self.look_every_s, "use a positive number of seconds.")
        if self.min_workers:
            _require(
                0 < self.min_workers <= self.workers,
                "launch.min_workers",
                self.min_workers,
                f"use 0 (not elastic), or 1 to launch.workers, which is {self.workers}.",
            )


@dataclass(frozen=True)
class Guard:
    """What a run does when something goes wrong."""

    # Seconds without progress of any kind after which ranks say which of them hangs, and leave, to be started again; four
    # times as many while they start, evaluate or save; 0: wait for ever.
    hang_s: float = _no_effect(300.0)
    stop_within_s: float = _no_effect(60.0)  # after a signal, for the step and its checkpoint; then ranks leave without one
    max_skipped: int = _no_effect(0)  # steps of a run that may be left out because loss or gradient are not finite

    def __post_init__(self) -> None:
        _require(self.hang_s >= 0, "guard.hang_s", self.hang_s, "use 0 (wait for ever) or a number of seconds, 300 as a rule.")
        _require(self.max_skipped >= 0, "guard.max_skipped", self.max_skipped, "use 0 (stop at the first) or more.")
        _require(self.stop_within_s > 0, "guard.stop_within_s", self.stop_within_s, "use a positive number of seconds.")

    def limit_s(self, patient: bool = False) -> float:
        """Seconds without progress that are too many; 0: there is no limit. `patient`: where much may take long."""
        return self.hang_s * (4 if patient else 1)

    @property
    def timeout_s(self) -> float:
        """Of collectives: later than any limit, so that the watch, which names the rank, comes first; without one, a week."""
        return max(600.0, 2 * self.limit_s(patient=True)) if self.hang_s else 7 * 86400.0


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
    checkpoint: Checkpointing = Checkpointing()
    parallel: Parallel = Parallel()
    launch: Launch = Launch()
    guard: Guard = Guard()
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
        if micro and self.attack.cost == "original" and self.attack.name != "none":
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

    def works_on(self, world_size: int) -> bool:
        """Whether `world_size` ranks can share the global batch."""
        try:
            self.rows_per_rank(world_size)
        except ConfigError:
            return False
        return True

    def learning_rate(self) -> float:
        """The peak learning rate at this global batch (Goyal et al. 2017 for linear, Chen et al. 2020 B.1 for sqrt)."""
        ratio = self.batch.global_size / self.optim.reference_batch
        return self.optim.learning_rate * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.optim.scaling]


def _nearest_divisor(size: int, wanted: int) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))
