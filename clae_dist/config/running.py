"""Settings of a run's execution: how long, on what, what is kept, watched and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clae_dist.config.rules import ConfigError, no_effect, require


@dataclass(frozen=True)
class Train:
    """How long, how precise, and how often things happen on the way."""

    epochs: float = 100.0
    precision: Literal["auto", "float64", "float32", "bfloat16"] = "auto"  # bfloat16: autocast, the loss stays float32
    log_every: int = no_effect(10)  # steps between lines of metrics
    diagnose_every: int = no_effect(50)  # steps between measurements of the attack and of the embedding space
    knn_every: float = no_effect(10.0)  # epochs between kNN evaluations; 0: never
    threads: int = no_effect(0)  # of torch on the CPU; 0 shares this machine's cores among its ranks
    compile: bool = no_effect(False)  # torch.compile of the encoder's blocks
    activation_checkpointing: bool = no_effect(False)  # blocks are computed again in the backward pass: less memory, more time
    ema_decay: float = 0.0  # of the average of the weights that is then evaluated and exported, 0.999 as a rule; 0: none

    def __post_init__(self) -> None:
        require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "use 0 (no average) up to, not including, 1.")
        if self.compile and self.activation_checkpointing:
            raise ConfigError(
                "train.compile is true beside train.activation_checkpointing, whose second forward must know the route of the "
                "first, which compiled blocks do not; use one of them."
            )
        require(self.epochs > 0, "train.epochs", self.epochs, "use a positive number; fractions are fine.")
        for key in ("log_every", "diagnose_every"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "use at least 1.")
        require(self.knn_every >= 0, "train.knn_every", self.knn_every, "use 0 (never) or more.")
        require(self.threads >= 0, "train.threads", self.threads, "use 0 (automatic) or more.")


@dataclass(frozen=True)
class Checkpointing:
    """When a run saves, beside its end, and which checkpoints stay. By steps or by minutes, whichever comes first."""

    every_steps: int = no_effect(500)  # 0: never
    every_minutes: float = no_effect(0.0)  # since the last one; 0: never
    keep: int = no_effect(3)  # the newest
    keep_every_hours: float = no_effect(0.0)  # one of every so many hours stays for good; 0: none

    def __post_init__(self) -> None:
        for key in ("every_steps", "every_minutes"):
            require(getattr(self, key) >= 0, f"checkpoint.{key}", getattr(self, key), "use 0 (never) or more.")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "use at least 1.")
        require(self.keep_every_hours >= 0, "checkpoint.keep_every_hours", self.keep_every_hours, "use 0 (none) or more.")


@dataclass(frozen=True)
class Parallel:
    """What wraps the encoder. Nothing here changes what is computed: a run may go on under another backend."""

    backend: Literal["ddp", "fsdp2", "deepspeed"] = no_effect("ddp")
    reshard_after_forward: bool = no_effect(True)  # fsdp2: whole parameters are freed between forward and backward
    shard_size: int = no_effect(0)  # fsdp2: ranks that share one copy of the parameters; 0: all; fewer: hybrid, 2-D mesh
    zero_stage: int = no_effect(1)  # deepspeed: what is shared; 0 nothing, 1 optimiser state, 2 gradients too, 3 parameters too

    def __post_init__(self) -> None:
        require(self.shard_size >= 0, "parallel.shard_size", self.shard_size, "use 0 (all ranks) or a divisor of their number.")
        require(0 <= self.zero_stage <= 3, "parallel.zero_stage", self.zero_stage, "use 0, 1, 2 or 3.")


@dataclass(frozen=True)
class Launch:
    """Who starts the ranks."""

    launcher: Literal["ray", "torchrun", "local"] = no_effect("local")
    workers: int = no_effect(0)  # ranks; 0: one a GPU, or one without GPUs
    device: Literal["auto", "cpu", "cuda"] = no_effect("auto")  # auto: a GPU for every rank, the CPU where no rank sees a GPU
    min_workers: int = no_effect(0)  # Ray: goes on with as few when hosts are lost, up to launch.workers again; 0: not elastic
    look_every_s: float = no_effect(30.0)  # Ray: seconds between looks for hosts that came back or will be taken away
    max_failures: int = no_effect(3)  # Ray and local: how often a run is started again after a lost or hung rank

    def __post_init__(self) -> None:
        require(self.workers >= 0, "launch.workers", self.workers, "use 0 (automatic) or more.")
        require(self.max_failures >= 0, "launch.max_failures", self.max_failures, "use 0 or more.")
        require(self.look_every_s > 0, "launch.look_every_s", self.look_every_s, "use a positive number of seconds.")
        if self.min_workers:
            require(
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
    hang_s: float = no_effect(300.0)
    stop_within_s: float = no_effect(60.0)  # after a signal, for the step and its checkpoint; then ranks leave without one
    max_skipped: int = no_effect(0)  # steps of a run that may be left out because loss or gradient are not finite

    def __post_init__(self) -> None:
        require(self.hang_s >= 0, "guard.hang_s", self.hang_s, "use 0 (wait for ever) or a number of seconds, 300 as a rule.")
        require(self.max_skipped >= 0, "guard.max_skipped", self.max_skipped, "use 0 (stop at the first) or more.")
        require(self.stop_within_s > 0, "guard.stop_within_s", self.stop_within_s, "use a positive number of seconds.")

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

    name: Literal["mlflow", "none"] = no_effect("mlflow")
    uri: str = no_effect("")  # empty: MLFLOW_TRACKING_URI, or mlflow.db beside the run folder
    experiment: str = no_effect("clae-dist")


@dataclass(frozen=True)
class Evaluation:
    """kNN and linear probe on frozen features of the clean route."""

    knn_k: int = 200
    knn_temperature: float = 0.1
    train_images: int = 0  # kNN bank and probe's training set of `clae evaluate`; 0: the whole train split
    knn_bank: int = no_effect(10_000)  # while training: train images of the kNN bank; `clae evaluate` takes all
    knn_queries: int = no_effect(2_000)  # while training: test images; `clae evaluate` takes all
    linear_iterations: int = 100  # of L-BFGS
    linear_penalty: float = 0.0  # L2; 0: the best of a small grid on a tenth of the train split held out
    batch_size: int = no_effect(500)

    def __post_init__(self) -> None:
        for key in ("knn_k", "knn_bank", "knn_queries", "linear_iterations", "batch_size"):
            require(getattr(self, key) >= 1, f"evaluation.{key}", getattr(self, key), "use at least 1.")
        require(self.train_images >= 0, "evaluation.train_images", self.train_images, "use 0 (all) or more.")
        require(self.knn_temperature > 0, "evaluation.knn_temperature", self.knn_temperature, "use a positive number.")
        require(
            self.linear_penalty >= 0,
            "evaluation.linear_penalty",
            self.linear_penalty,
            "use 0 (search) or more.",
        )
