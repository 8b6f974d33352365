"""Settings of a run's execution: length, precision, checkpoints, backend, launcher, tracking and evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from clae_dist.config.rules import Section, setting
from clae_dist.errors import ConfigError

_MOST_PROFILED = 100  # steps: a trace has some megabytes for each


@dataclass(frozen=True)
class Train(Section, prefix="train"):
    """Length and precision of training, and how often metrics are computed."""

    epochs: float = setting(100.0, gt=0, hint="fractions are allowed", help="Epochs to train; may be fractional.")
    parent: str = setting(
        "",
        zero="a run of its own",
        help="Folder of a finished run that this one continues with more epochs; `clae train RUN --extend epochs=N` sets it.",
    )
    precision: Literal["auto", "float64", "float32", "bfloat16"] = setting(
        "auto",
        help="Precision of the encoder. bfloat16: autocast, the loss stays float32. auto: bfloat16 on GPUs that support it, "
        "otherwise float32.",
    )
    tf32: bool = setting(
        False,
        help="On GPUs, round the factors of float32 products and convolutions to TF32 (11 bits), also those of the loss: "
        "faster where train.precision is float32.",
    )
    log_every: int = setting(10, ge=1, no_effect=True, help="Steps between metric lines.")
    diagnose_every: int = setting(
        200,
        ge=1,
        no_effect=True,
        help="Steps between measurements of the attack and of the embedding space, each about as long as a step.",
    )
    profile_steps: str = setting(
        "",
        no_effect=True,
        help="Steps to trace with torch's profiler, FIRST:LAST, such as 20:25 for the five steps after step 20. The first 8 "
        "ranks write traces to RUN/profile.",
    )
    knn_every: float = setting(10.0, ge=0, zero="never", no_effect=True, help="Epochs between kNN evaluations.")
    knn_features: Literal["encoder", "projection"] = setting(
        "encoder",
        no_effect=True,
        help="Features of kNN during training: the encoder's, as in `clae evaluate`, or the embeddings that are contrasted.",
    )
    linear_probe: bool = setting(
        False,
        no_effect=True,
        help="Fit a linear probe on the same features at each kNN evaluation, too, with evaluation.linear_penalty or 1e-3.",
    )
    threads: int = setting(
        0, ge=0, zero="automatic", no_effect=True, help="CPU threads of torch per rank. 0: an equal share of the cores."
    )
    deterministic: bool = setting(
        False,
        no_effect=True,
        help="On GPUs, kernels that give the same bits in every start, such as after a kill; slower. An operation without one "
        "ends the run. False: cuDNN times its kernels and takes the fastest. CPUs give the same bits anyway.",
    )
    compile: bool = setting(False, no_effect=True, help="Compile the encoder's blocks with torch.compile.")
    activation_checkpointing: bool = setting(
        False, no_effect=True, help="Recompute blocks in the backward pass: less memory, more time."
    )
    ema_decay: float = setting(
        0.0,
        ge=0,
        lt=1,
        zero="no average",
        help="Decay of the weight average that is evaluated and exported instead of the last weights; 0.999 is usual.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        window = re.fullmatch(r"(\d{1,12}):(\d{1,12})", self.profile_steps)
        self.require(
            not self.profile_steps or (window is not None and 0 < int(window[2]) - int(window[1]) <= _MOST_PROFILED),
            "profile_steps",
            f"use FIRST:LAST with at most {_MOST_PROFILED} steps, such as 20:25 for the five steps after step 20.",
        )
        if self.compile and self.activation_checkpointing:
            raise ConfigError(
                "train.compile is true together with train.activation_checkpointing, whose second forward must know the "
                "route of the first, which compiled blocks do not; use one of them."
            )

    @property
    def profiled(self) -> range:
        """The steps to trace, counted from 0."""
        return range(*map(int, self.profile_steps.split(":"))) if self.profile_steps else range(0)


@dataclass(frozen=True)
class Checkpointing(Section, prefix="checkpoint"):
    """When checkpoints are saved, besides at the end, and which are kept. By steps or minutes, whichever comes first."""

    every_steps: int = setting(500, ge=0, zero="never", no_effect=True, help="Steps between checkpoints.")
    every_minutes: float = setting(0.0, ge=0, zero="never", no_effect=True, help="Minutes between checkpoints.")
    keep: int = setting(3, ge=1, no_effect=True, help="Number of newest checkpoints to keep.")
    keep_every_hours: float = setting(
        0.0, ge=0, zero="none", no_effect=True, help="Additionally keep one checkpoint for every so many hours, permanently."
    )


@dataclass(frozen=True)
class Parallel(Section, prefix="parallel"):
    """The backend that wraps the encoder. It does not change results: a run may resume under another backend."""

    backend: Literal["ddp", "fsdp2", "deepspeed"] = setting(
        "ddp", no_effect=True, help="ddp: replicated parameters; fsdp2: sharded parameters; deepspeed: ZeRO."
    )
    reshard_after_forward: bool = setting(
        True,
        no_effect=True,
        used_by="parallel.backend=fsdp2",
        help="Free unsharded parameters between forward and backward: less memory, more communication.",
    )
    shard_size: int = setting(
        0,
        ge=0,
        zero="all ranks",
        hint="it divides the number of ranks",
        no_effect=True,
        used_by="parallel.backend=fsdp2",
        help="Ranks that share one copy of the parameters; fewer than all: hybrid sharding on a 2-D mesh.",
    )
    zero_stage: int = setting(
        1,
        ge=0,
        le=3,
        no_effect=True,
        used_by="parallel.backend=deepspeed",
        help="State that is sharded: 0 nothing, 1 optimiser state, 2 also gradients, 3 also parameters.",
    )


@dataclass(frozen=True)
class Launch(Section, prefix="launch"):
    """The launcher, which starts the ranks."""

    launcher: Literal["ray", "torchrun", "local"] = setting(
        "local", no_effect=True, help="local: processes on this machine; ray: Ray Train; torchrun: started by torchrun."
    )
    workers: int = setting(
        0,
        ge=0,
        zero="automatic",
        no_effect=True,
        used_by="launch.launcher=ray or local",
        help="Number of ranks. 0: one per GPU, or one without GPUs.",
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", no_effect=True, help="auto: a GPU for every rank, or the CPU if no rank sees a GPU."
    )
    min_workers: int = setting(
        0,
        ge=0,
        zero="not elastic",
        no_effect=True,
        used_by="launch.launcher=ray",
        help="Elastic training: continue with as few ranks as this when hosts are lost, and grow back to launch.workers.",
    )
    look_every_s: float = setting(
        30.0,
        gt=0,
        no_effect=True,
        used_by="launch.launcher=ray",
        help="Seconds between checks for hosts that returned or will be taken away.",
    )
    max_failures: int = setting(
        3,
        ge=0,
        zero="none",
        no_effect=True,
        used_by="launch.launcher=ray or local",
        help="Number of restarts after a lost or hung rank.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.min_workers == 0 or self.min_workers <= self.workers,
            "min_workers",
            f"use 0 (not elastic), or 1 to launch.workers, which is {self.workers}.",
        )


@dataclass(frozen=True)
class Guard(Section, prefix="guard"):
    """Reactions to hangs, stop requests, non-finite values and collapse."""

    hang_s: float = setting(
        300.0,
        ge=0,
        zero="no limit",
        hint="300 is usual",
        no_effect=True,
        help="If a rank makes no progress for this many seconds, the attempt is aborted and restarted from the newest "
        "checkpoint. Four times as long while ranks start, evaluate or save.",
    )
    lost_s: float = setting(
        20.0,
        ge=0,
        zero="guard.hang_s alone",
        no_effect=True,
        used_by="launch.launcher=torchrun or ray",
        help="If a host, or the network to it, gives no answer for this many seconds, the attempt is aborted and restarted.",
    )
    stop_within_s: float = setting(
        60.0,
        gt=0,
        no_effect=True,
        help="Seconds after a stop signal for the current step and its checkpoint; then ranks exit without a checkpoint.",
    )
    max_skipped: int = setting(
        0,
        ge=0,
        zero="stop at the first",
        no_effect=True,
        help="Steps of a run that may be skipped because the loss or the gradient is non-finite.",
    )

    alarms: bool = setting(
        True,
        no_effect=True,
        help="Print and tag a collapse of the embeddings and an attack without effect (useless, or its gradient masked); "
        "the run continues.",
    )

    def limit_s(self, *, patient: bool = False) -> float:
        """Seconds without progress that count as a hang; 0: no limit. `patient`: for phases that may take long."""
        return self.hang_s * (4 if patient else 1)

    @property
    def timeout_s(self) -> float:
        """Timeout of collectives: longer than any limit, so that the watchdog, which names the rank, acts first."""
        return max(600.0, 2 * self.limit_s(patient=True)) if self.hang_s else 7 * 86400.0


@dataclass(frozen=True)
class Tracking(Section, prefix="tracking"):
    """Experiment tracking, besides the console and the run folder's metrics.jsonl."""

    name: Literal["mlflow", "tensorboard", "mlflow+tensorboard", "none"] = setting(
        "mlflow",
        no_effect=True,
        help="Experiment trackers, also as a list: [mlflow, tensorboard]. TensorBoard's events are in RUN/tensorboard.",
    )
    uri: str = setting(
        "",
        no_effect=True,
        used_by="tracking.name=mlflow",
        help="Tracking server or database. Empty: MLFLOW_TRACKING_URI, or mlflow.db beside the run folder.",
    )
    experiment: str = setting("clae-dist", no_effect=True, used_by="tracking.name=mlflow", help="Name of the experiment.")
    prometheus: int = setting(
        0,
        ge=0,
        le=65535,
        zero="off",
        no_effect=True,
        help="Port on which rank 0 serves metrics of the run to Prometheus, as http://HOST:PORT/metrics.",
    )
    prometheus_host: str = setting(
        "127.0.0.1",
        no_effect=True,
        used_by="tracking.prometheus",
        help="Address on which rank 0 listens. Metrics have no password: on a network's address, anybody there can read them.",
    )

    def uses(self, name: Literal["mlflow", "tensorboard"]) -> bool:
        """True if `name` is one of the trackers."""
        return name in self.name.split("+")


@dataclass(frozen=True)
class Evaluation(Section, prefix="evaluation"):
    """kNN and linear probe on frozen features."""

    route: Literal["auto", "clean", "adversarial"] = setting(
        "auto",
        used_by="a method with two routes",
        help="Norm layers whose features are evaluated, exported and embedded. auto: those that the method trains for.",
    )

    knn_k: int = setting(200, ge=1, help="Neighbours of the kNN classifier.")
    knn_temperature: float = setting(0.1, gt=0, help="Temperature of the neighbours' votes.")
    train_images: int = setting(
        0, ge=0, zero="all", help="Training images of the kNN bank and the linear probe of `clae evaluate`."
    )
    knn_bank: int = setting(
        10_000, ge=1, no_effect=True, help="Training images of the kNN bank during training; `clae evaluate` uses all."
    )
    knn_queries: int = setting(
        2_000, ge=1, no_effect=True, help="Test images of kNN during training; `clae evaluate` uses all."
    )
    linear_iterations: int = setting(100, ge=1, help="L-BFGS iterations of the linear probe.")
    linear_penalty: float = setting(
        0.0,
        ge=0,
        zero="search",
        help="L2 penalty of the linear probe. 0: the best of a small grid on a held-out tenth of the train split.",
    )
    batch_size: int = setting(500, ge=1, no_effect=True, help="Images per forward pass of the evaluation.")
