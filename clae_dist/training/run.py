"""The training run: everything between a World and a trained encoder. There is one loop, and it is here."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch

from clae_dist.config import Config, ConfigError
from clae_dist.contrast.diagnostics import diagnose
from clae_dist.contrast.step import Pretraining, StepMetrics, pretrain_step
from clae_dist.data.augment import augment
from clae_dist.data.draws import hashed
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.loader import Batch, load, num_workers
from clae_dist.data.manifest import DataError, Manifest, check_shard, load_manifest
from clae_dist.evaluation.features import extract, gather
from clae_dist.evaluation.knn import knn_accuracy
from clae_dist.models import build_model
from clae_dist.models.norms import untouched_statistics
from clae_dist.parallel import Backend, make_backend
from clae_dist.parallel.optim import learning_rate_at
from clae_dist.tracking import NullTracker, Status, Trackers, build_trackers, new_run_key
from clae_dist.runs.checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from clae_dist.runs.folder import Identity, open_run_folder
from clae_dist.training.guard import StopRequest, listen_for_stop
from clae_dist.world import World

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "finished", or "stopped" on request with everything saved."""

    status: Status
    step: int
    images_seen: int


@dataclass(frozen=True)
class Plan:
    """The length of a run, in steps."""

    steps_per_epoch: int
    total: int
    warmup: int
    attack_from: int
    knn_every: int  # 0: never

    @staticmethod
    def of(config: Config, num_samples: int) -> Plan:
        """Raises DataError when there are fewer images than one global batch."""
        steps = num_samples // config.batch.global_size
        if not steps:
            raise DataError(
                f"the {config.data.train_split} split has {num_samples} images, fewer than batch.global_size "
                f"{config.batch.global_size}; use batch.global_size={_power_of_two_below(num_samples)} or more images."
            )
        return Plan(
            steps,
            max(1, round(config.train.epochs * steps)),
            round(config.optim.warmup_epochs * steps),
            round(config.attack.start_epoch * steps),
            round(config.train.knn_every * steps),
        )


def _power_of_two_below(number: int) -> int:
    return 1 << max(1, number.bit_length() - 1)


class Clock:
    """Seconds spent, by name, since the last `read`; waits for the device only while `exact`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent: dict[str, float] = {}
        self._since = time.perf_counter()
        self.exact = device.type == "cpu"

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spent[name] = self._spent.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.exact and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds in all and by name since the last call."""
        now = self._now()
        total, spent = now - self._since, self._spent
        self._since, self._spent = now, {}
        return total, spent

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside (evaluation, checkpoints) does not count."""
        start = self._now()
        yield
        self._since += self._now() - start


def open_data(config: Config, world: World, say: Say) -> Manifest:
    """The manifest, after the ranks have checked the shards between them. Raises DataError or ConfigError on every rank."""

    def load_it() -> Manifest:
        if not config.data.shards:
            raise ConfigError("data.shards is ''; name the folder that `python -m data_prep imagefolder SRC DST` wrote.")
        manifest = load_manifest(config.data.shards)
        Plan.of(config, manifest.num_samples(config.data.train_split))
        return manifest

    manifest: Manifest = world.run_on_main(load_it)
    started, failure = time.perf_counter(), ""
    shards = [shard for split in manifest.splits.values() for shard in split]
    for shard in shards[world.rank :: world.size]:
        try:
            check_shard(manifest.folder, shard, config.data.verify)
        except DataError as error:
            failure = str(error)
            break
    failures = [text for text in world.gather_objects(failure) if text]
    if failures:
        raise DataError(failures[0])
    say(f"data: {manifest.name}, {len(shards)} shards checked ({config.data.verify}) in {time.perf_counter() - started:.1f} s")
    return manifest


def make_pretraining(config: Config, world: World, backend: Backend, clock: Clock) -> Pretraining:
    """What a step works with, from the parts of a run."""
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32

    def two_views(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (
            augment(batch.views[view].to(world.device, non_blocking=True).float() / 255, batch.draws[view], config.augment).to(dtype)
            for view in (0, 1)
        )
        return x, y

    return Pretraining(
        world=world,
        attack=config.attack,
        objective=config.objective.name,
        temperature=config.objective.temperature,
        pixel_std=backend.model.std,
        augment=two_views,
        attack_embed=backend.attack_embed,
        untouched=lambda: untouched_statistics(backend.model),
        attack_statistics=(lambda: untouched_statistics(backend.model)) if config.attack.statistics == "untouched" else nullcontext,
        backend=backend,
        timed=clock.timed,
    )


def train(config: Config, origins: dict[str, str], world: World, stream: IO[str] = sys.stdout) -> Outcome:
    """Trains to the end of the configuration, or from where the run folder's newest checkpoint is.

    Every rank calls it; rank 0 writes the run folder and speaks to `stream`. Raises ConfigError, DataError, RankError and
    CheckpointError, on every rank the same.
    """

    def say(text: str) -> None:
        if world.is_main:
            print(text, file=stream, flush=True)

    config.rows_per_rank(world.size)
    torch.set_num_threads(config.train.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size))
    manifest = open_data(config, world, say)
    identity: Identity = world.run_on_main(lambda: open_run_folder(config, origins, manifest, world, new_run_key()))
    plan = Plan.of(config, manifest.num_samples(config.data.train_split))

    backend = make_backend(config, build_model(config, world.group), world)
    state = load_checkpoint(config.folder, say)
    first_step = 0
    if state is not None:
        backend.load_state(state)
        first_step = state["step"]
    world.agree(first_step == world.broadcast(first_step), "ranks read different checkpoints; is run_dir on storage that all hosts share?")
    _describe(config, world, backend, manifest, plan, first_step, say)
    if first_step >= plan.total:
        say(f"this run is finished already ({first_step} steps); give another run_dir or name to start a new one.")
        return Outcome("finished", first_step, first_step * config.batch.global_size)

    tracker: Trackers | NullTracker = NullTracker()
    if world.is_main:
        tags = {key: str(getattr(identity, key)) for key in ("package_version", "git_revision", "manifest_digest")}
        images_seen = first_step * config.batch.global_size
        tracker = build_trackers(
            config, config.folder, identity.run_key, tags=tags, total_steps=plan.total, resume_images_seen=images_seen, stream=stream
        )
    status: Status = "failed"
    try:
        with listen_for_stop(config.folder) as stop:
            outcome = _loop(config, world, backend, manifest, plan, first_step, tracker, stop, say)
        status = outcome.status
    finally:
        tracker.close(status)
    return outcome


def _loop(
    config: Config,
    world: World,
    backend: Backend,
    manifest: Manifest,
    plan: Plan,
    first_step: int,
    tracker: Trackers | NullTracker,
    stop: StopRequest,
    say: Say,
) -> Outcome:
    clock = Clock(world.device)
    run = make_pretraining(config, world, backend, clock)
    batches = load(manifest, config, world, first_step, plan.total)
    started = time.time()
    saved = first_step
    step = first_step

    def save() -> None:
        nonlocal saved
        if saved != step:
            backend.average_local_statistics()
            state = {**backend.state(), "step": step, "images_seen": step * config.batch.global_size}
            world.run_on_main(lambda: save_checkpoint(config.folder, step, state, config.train.checkpoint_keep))
            saved = step

    def log(values: dict[str, float]) -> None:
        place = {"step": step, "epoch": step / plan.steps_per_epoch, "time_s": time.time() - started}
        tracker.log({**place, **values}, step * config.batch.global_size)

    if first_step == 0 and plan.knn_every:
        log(_knn(config, world, backend, manifest))
    backend.model.train()
    clock.read()
    steps_since_log = 0
    while step < plan.total:
        with clock.timed("data"):
            batch = next(batches)
        # Dropout and the like draw from the step's own seed: a resumed run draws what the first would have drawn.
        torch.manual_seed(int(hashed(config.seed, step, world.rank)[0] >> np.uint64(1)))
        rate = learning_rate_at(step, plan.total, plan.warmup, config.learning_rate(), config.optim.schedule)
        backend.set_learning_rate(rate)
        alpha = config.attack.alpha if config.attack.name != "none" and step >= plan.attack_from else 0.0
        measured: dict[str, float] = {}
        if step % config.train.diagnose_every == 0:
            with clock.stopped():
                measured = diagnose(run, batch)
        metrics = pretrain_step(run, batch, alpha)
        step += 1
        steps_since_log += 1
        if step % config.train.log_every == 0 or step == plan.total or measured:
            losses = _mean_losses(metrics, world)
            seconds, spent = clock.read()
            speed = {
                "learning_rate": rate,
                "images_per_s": steps_since_log * config.batch.global_size / seconds,
                "data_wait_share": 100 * spent.get("data", 0.0) / seconds,
                "attack_share": 100 * spent.get("attack", 0.0) / seconds,
            }
            steps_since_log = 0
            log({**losses, **speed, **measured})
        with clock.stopped():
            if plan.knn_every and (step % plan.knn_every == 0 or step == plan.total):
                log(_knn(config, world, backend, manifest))
            (stopping,) = world.flags_anywhere(stop.made())
            if stopping or step == plan.total or step % config.train.checkpoint_every == 0:
                save()
        if stopping and step < plan.total:
            reason = next(filter(None, world.gather_objects(stop.reason)))
            say(f"stopped after step {step} ({reason}); saved. The same command goes on from there.")
            return Outcome("stopped", step, step * config.batch.global_size)
    say(f"finished: {step} steps, {step * config.batch.global_size} images; checkpoint {find_checkpoints(config.folder)[0] if world.is_main else ''}")
    return Outcome("finished", step, step * config.batch.global_size)


def _mean_losses(metrics: StepMetrics, world: World) -> dict[str, float]:
    named = {"loss": metrics.loss, "loss_clean": metrics.clean, "loss_adversarial": metrics.adversarial, "grad_norm": metrics.grad_norm}
    present = {name: value for name, value in named.items() if value is not None}
    values = world.mean(torch.stack([value.double() for value in present.values()]))
    return dict(zip(present, values.tolist(), strict=True))


def _knn(config: Config, world: World, backend: Backend, manifest: Manifest) -> dict[str, float]:
    """kNN accuracy (percent) of a part of the train split on the test split; {} without labels or a test split."""
    if not manifest.classes or config.data.test_split not in manifest.splits:
        return {}
    backend.average_local_statistics()
    settings = config.evaluation
    bank, queries = (
        gather(extract(backend.model, EvaluationSet(manifest, split, config.data.image_size, limit), world.device, settings.batch_size, world.rank, world.size), world)
        for split, limit in ((config.data.train_split, settings.knn_bank), (config.data.test_split, settings.knn_queries))
    )
    return {"knn_accuracy": knn_accuracy(bank, queries, settings.knn_k, settings.knn_temperature, world.device)}


def _describe(config: Config, world: World, backend: Backend, manifest: Manifest, plan: Plan, first_step: int, say: Say) -> None:
    """Decisions, with their reasons."""
    rows, size = config.rows_per_rank(world.size), config.batch.global_size
    total = manifest.num_samples(config.data.train_split)
    hosts = sorted(set(world.gather_objects(platform.node())))
    parameters = sum(p.numel() for p in backend.model.parameters())
    say(f"ranks: {world.size} on {len(hosts)} host(s), {world.device.type}, {torch.get_num_threads()} torch thread(s) each; {config.parallel.backend}")
    say(f"precision: {backend.precision} ({backend.precision_reason})")
    say(f"model: {config.model.encoder} with projector, {parameters:,} parameters, {config.model.norm} batch statistics")
    say(f"batch: {size} images = {world.size} x {rows}; {config.num_streams} canonical streams; {num_workers(config, world.local_size)} loader process(es) a rank")
    left_out = total - plan.steps_per_epoch * size
    say(f"epoch: {total} images = {plan.steps_per_epoch} steps" + (f"; {left_out} sit out, other ones each epoch" if left_out else ""))
    say(f"length: {plan.total} steps, {config.train.epochs:g} epochs; peak learning rate {config.learning_rate():.4g} ({config.optim.name}, {config.optim.scaling} scaling)")
    if config.attack.name != "none":
        a = config.attack
        say(f"attack: {a.name}, epsilon {a.epsilon:.4g} ({a.unit}), anchor {a.anchor}, cost {a.cost}, alpha {a.alpha:g}, on the global batch's negatives")
    if first_step:
        say(f"resuming after step {first_step}")
