"""The training run: everything between a World and a trained encoder. There is one loop, and it is here."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import torch

from clae_dist.config import Config, ConfigError
from clae_dist.contrast.diagnostics import diagnose
from clae_dist.contrast.encoding import TrainingEncoding
from clae_dist.contrast.gather import Contrast
from clae_dist.contrast.step import Pretraining, StepMetrics, pretrain_step
from clae_dist.data.augment import augment
from clae_dist.data.draws import hashed
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.loader import Batch, load, num_workers
from clae_dist.data.manifest import DataError, Manifest
from clae_dist.data.noise import uniform_noise
from clae_dist.data.transfer import Transfer
from clae_dist.evaluation.export import export_encoder
from clae_dist.evaluation.features import Features, extract, gather
from clae_dist.evaluation.knn import knn_accuracy
from clae_dist.models import build_model
from clae_dist.models.norms import routes_are_one_function
from clae_dist.parallel import Backend, make_backend
from clae_dist.runs.checkpoint import load_checkpoint, remove_leftovers
from clae_dist.runs.folder import Identity, open_run_folder
from clae_dist.tracking import NullTracker, Status, Trackers, build_trackers, check_tracking, new_run_key
from clae_dist.training.bad_samples import BadSamples
from clae_dist.training.clock import Clock
from clae_dist.training.guard import StopRequest, listen_for_stop
from clae_dist.training.plan import Plan, describe
from clae_dist.training.saving import Saving
from clae_dist.training.sets import Sets, open_sets
from clae_dist.world import RankError, World

Say = Callable[[str], None]
MOST_WAIT = 5  # percent of the time for data, above which a run says what to change


@dataclass(frozen=True)
class Outcome:
    """How a run ended: "finished", or "stopped" on request with everything saved."""

    status: Status
    step: int


def train(config: Config, origins: dict[str, str], world: World, stream: TextIO = sys.stdout) -> Outcome:
    """Trains to the end of the configuration, or from where the run folder's newest checkpoint is.

    Every rank calls it; rank 0 writes the run folder and speaks to `stream`. Raises ConfigError, DataError, RankError and
    CheckpointError, on every rank the same.
    """

    with listen_for_stop(config.folder) as stop:
        return _train(config, origins, world, stream, stop)


def _train(config: Config, origins: dict[str, str], world: World, stream: TextIO, stop: StopRequest) -> Outcome:
    def say(text: str) -> None:
        if world.is_main:
            print(text, file=stream, flush=True)

    config.rows_per_rank(world.size)
    torch.set_num_threads(config.train.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size))
    sets = open_sets(config, world, say)
    plan = Plan.of(config, sets.train.num_samples(config.data.train_split))

    def open_folder() -> Identity:
        check_tracking(config, config.folder)
        return open_run_folder(config, origins, sets.train, world, new_run_key())

    identity: Identity = world.run_on_main(open_folder)
    backend = make_backend(config, build_model(config, world.group, on_gpu=world.device.type == "cuda"), world)
    first_step, train_s, bad = _resume(config, world, backend, say)
    for line in describe(plan, world, backend):
        say(line)
    if first_step:
        say(f"resuming after step {first_step}")
    if first_step >= plan.total:
        say("this run is finished already; give another run_dir or name to start a new one.")
        return Outcome("finished", first_step)

    tracker: Trackers | NullTracker = NullTracker()
    if world.is_main:
        seen = plan.images_seen(first_step)
        tracker = build_trackers(
            config,
            config.folder,
            identity.run_key,
            tags=identity.tags,
            total_steps=plan.total,
            resume_images_seen=seen,
            stream=stream,
        )
    status: Status = "failed"
    try:
        skipped = BadSamples(config.data.max_bad, plan.num_samples, config.folder, bad)
        outcome = _Loop(config, world, backend, sets, plan, tracker, stop, skipped, say).run(first_step, train_s)
        status = outcome.status
        if world.is_main and status == "finished" and config.tracking.name != "none":
            _log_encoder(config, tracker, sets.train, say)
    finally:
        tracker.close(status)
    if tracker.page:
        say(f"MLflow's page: {tracker.page}")
    return outcome


def _log_encoder(config: Config, tracker: Trackers | NullTracker, manifest: Manifest, say: Say) -> None:
    """The encoder as a logged model. The run is over and saved: what goes wrong here is said and does not undo it."""
    try:
        tracker.log_model(export_encoder(config.folder), manifest.digest)
    except (ConfigError, OSError) as error:
        say(f"the encoder was not logged ({error}); `clae export {config.folder}` tries again.")


def _resume(config: Config, world: World, backend: Backend, say: Say) -> tuple[int, float, dict[str, str]]:
    """Loads the newest whole checkpoint, if any; the steps that are done, the seconds that they took, their bad samples."""
    world.run_on_main(lambda: remove_leftovers(config.folder))
    checkpoint = load_checkpoint(config.folder, say, world)
    if checkpoint is None:
        return 0, 0.0, {}
    backend.load_state(checkpoint.state())
    return checkpoint.step, float(checkpoint.info["train_s"]), checkpoint.info["bad_samples"]


def make_pretraining(config: Config, world: World, backend: Backend, clock: Clock) -> Pretraining:
    """What a step works with, from the parts of a run."""
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32

    def view(batch: Batch, number: int) -> torch.Tensor:
        images = batch.views[number].to(world.device, non_blocking=True)
        images = images.contiguous().float() / 255  # planar: what works on channels is half as fast on interleaved pixels
        return augment(images, batch.draws[number], config.augment).to(dtype)

    def noise(batch: Batch) -> torch.Tensor:
        return uniform_noise(batch.draws[0], batch.views.shape[2:], world.device).to(dtype)

    settings = config.objective
    return Pretraining(
        world=world,
        attack=config.attack,
        contrast=Contrast(settings.name, settings.temperature, world, settings.gather, settings.chunk),
        encoding=TrainingEncoding(backend, config.batch.micro_size),
        pixel_std=backend.model.std,
        shared_norms=routes_are_one_function(backend.model),
        augment=lambda batch: (view(batch, 0), view(batch, 1)),
        noise=noise,
        attack_statistics=backend.untouched if config.attack.statistics == "untouched" else nullcontext,
        timed=clock.timed,
    )


def _next(batches: Iterator[Batch], rows: int, rank: int) -> tuple[Batch | None, str]:
    """The next batch, or why this rank cannot have it."""
    try:
        batch = next(batches)
    except DataError as error:
        return None, str(error)
    except (RuntimeError, OSError) as error:  # a loader process that died, a disk that does: the other ranks must hear of it
        return None, f"rank {rank} cannot load its batch: {type(error).__name__}: {error}"
    if len(batch.ids) != rows:
        return None, (
            f"rank {rank}'s batch has {len(batch.ids)} rows where every rank needs {rows}: unequal rows would make collectives "
            "wait for ever. The loader (data/loader.py) must give every rank batch.global_size / number of ranks."
        )
    return batch, ""


class _Loop:
    """The loop over steps, with what happens every so often."""

    def __init__(
        self,
        config: Config,
        world: World,
        backend: Backend,
        sets: Sets,
        plan: Plan,
        tracker: Trackers | NullTracker,
        stop: StopRequest,
        bad: BadSamples,
        say: Say,
    ) -> None:
        self.config, self.world, self.backend, self.sets = config, world, backend, sets
        self.plan, self.tracker, self.stop, self.bad, self.say = plan, tracker, stop, bad, say
        self.clock = Clock(world.device)
        self.saving = Saving(config, world, backend, say)
        self.started = time.perf_counter()
        self.step = self.saved = self.logged = 0
        self.last: StepMetrics | None = None
        self.lines, self.advised = 0, False
        self.shown: StepMetrics | None = None  # of the steps since the last line, the one that it is about

    def run(self, first_step: int, train_s: float) -> Outcome:
        """Steps first_step … plan.total - 1, or until all ranks know that one was asked to stop.

        `train_s`: seconds that the steps before took. Raises DataError on every rank when one cannot read its batch.
        """
        try:
            return self._run(first_step, train_s)
        except (DataError, RankError):  # raised by all ranks together: what was being saved is whole
            self.saving.settle()
            raise
        finally:
            self.saving.close()

    def _run(self, first_step: int, train_s: float) -> Outcome:
        plan, every = self.plan, self.config.train
        self.started -= train_s
        self.step = self.saved = self.logged = first_step
        run = make_pretraining(self.config, self.world, self.backend, self.clock)
        batches = Transfer.to(self.world.device, load(self.sets.train, self.config, self.world, first_step, plan.total))
        rows = self.config.rows_per_rank(self.world.size)
        if first_step == 0 and plan.knn_every:
            self._log(self._knn())
        self.backend.model.train()
        self.clock.read()
        while self.step < plan.total:
            with self.clock.timed("data"):
                batch, problem = _next(batches, rows, self.world.rank)
            new = batch is not None and self.bad.new_in(batch.bad)
            stopping, broken, skipped, due, *writing = self.world.flags_anywhere(
                self.stop.made(), bool(problem), new, *self.saving.flags()
            )
            self.saving.hear(*writing)
            if broken:
                self.world.raise_together(DataError, problem)
            if skipped:
                self.bad.add(batch.bad if batch else {}, self.world, self.say)
            if stopping:
                self._save()
                self.saving.settle()
                reason = next(filter(None, self.world.gather_objects(self.stop.reason)))
                self.say(f"stopped after step {self.step} ({reason}); saved. The same command goes on from there.")
                return Outcome("stopped", self.step)
            if due:
                self._save()
            assert batch is not None
            measured: dict[str, float] = {}
            if self.step % every.diagnose_every == 0:
                with self.clock.stopped():
                    measured = diagnose(run, batch)
            self._seed()
            rate = plan.learning_rate(self.step)
            self.backend.set_learning_rate(rate)
            metrics = pretrain_step(run, batch, plan.alpha(self.step))
            with self.clock.timed("data"):
                batches.look_ahead()
            self.last = metrics
            if (
                metrics.adversarial is not None or self.shown is None or self.shown.adversarial is None
            ):  # with attack.every, a line is about an attacked step
                self.shown = metrics
            self.step += 1
            if self.step == first_step + 1:
                self.saving.reserve()
            if self.step % every.log_every == 0 or self.step == plan.total or measured:
                self._log({**self._losses(self.shown), "learning_rate": rate, **self._speed(), **measured})
                self.shown = None
            if plan.knn_every and (self.step % plan.knn_every == 0 or self.step == plan.total):
                with self.clock.stopped():
                    self._log(self._knn())
            every_steps = self.config.checkpoint.every_steps
            if self.step == plan.total or (every_steps and self.step % every_steps == 0):
                self._save()
        self.saving.settle()
        self.say(f"finished: {self.step} steps, {plan.images_seen(self.step):,} images; saved in {self.config.folder}")
        return Outcome("finished", self.step)

    def _seed(self) -> None:
        """Dropout and the like draw from the step's own seed: a resumed run draws what the first would have drawn."""
        torch.manual_seed(int(hashed(self.config.seed, self.step, self.world.rank)[0] >> np.uint64(1)))

    def _log(self, values: dict[str, float]) -> None:
        place = {
            "step": self.step,
            "epoch": self.step / self.plan.steps_per_epoch,
            "time_s": round(time.perf_counter() - self.started, 3),  # of training, over all starts of this run
        }
        self.tracker.log({**place, **values}, self.plan.images_seen(self.step))

    def _losses(self, metrics: StepMetrics) -> dict[str, float]:
        """Means over the ranks: the losses of the global batch."""
        named = {
            "loss": metrics.loss,
            "loss_clean": metrics.clean,
            "loss_adversarial": metrics.adversarial,
            "grad_norm": metrics.grad_norm,
        }
        present = {name: value for name, value in named.items() if value is not None}
        means = self.world.mean(torch.stack([value.double() for value in present.values()]))
        return dict(zip(present, means.tolist(), strict=True))

    def _speed(self) -> dict[str, float]:
        seconds, spent = self.clock.read()
        waited = self.world.largest(100 * spent.get("data", 0.0) / seconds)  # the others wait for the rank that waits
        self._advise(waited)
        num_images = (self.step - self.logged) * self.config.batch.global_size
        self.logged = self.step
        return {
            "images_per_s": num_images / seconds,
            "data_wait_share": waited,
            "attack_share": 100 * spent.get("attack", 0.0) / seconds,
            **({"bad_samples": float(len(self.bad.known))} if self.bad.known else {}),
        }

    def _advise(self, waited: float) -> None:
        """Says once what to change when data is waited for; the first lines are of a loader that has just been started."""
        self.lines += 1
        if waited > MOST_WAIT and self.lines > 2 and not self.advised:
            self.advised = True
            workers = num_workers(self.config, self.world.local_size)
            self.say(
                f"{waited:.0f} % of the time is spent waiting for data, more than {MOST_WAIT} %: more loader processes "
                f"(data.workers is {workers} a rank, this machine has {len(os.sched_getaffinity(0))} cores for "
                f"{self.world.local_size} rank(s)), or smaller images (`python -m data_prep … --resize short=256`); "
                "`clae bench data` says what a core can do."
            )

    def _save(self) -> None:
        if self.saved == self.step:
            return
        if self.last is not None:
            self.world.agree(
                self.last.grad_norm.isfinite(),
                f"the gradient of step {self.step} is not finite; this step was not saved, and the checkpoint before is whole. "
                "optim.clip_norm=1, a lower optim.learning_rate or train.precision=float32 may help",
            )
        info = {
            "images_seen": self.plan.images_seen(self.step),
            "train_s": time.perf_counter() - self.started,
            "bad_samples": dict(self.bad.known),
        }
        with self.clock.stopped():
            blocked_s = self.saving.save(self.step, info)
        self.saved = self.step
        self._log({"checkpoint_blocked_s": blocked_s})

    def _knn(self) -> dict[str, float]:
        """kNN accuracy (percent) of a part of the train split on the test split; {} without labels or a test split."""
        config, world = self.config, self.world
        manifest = self.sets.main
        if not manifest.classes or config.data.test_split not in manifest.splits:
            return {}
        self.backend.average_local_statistics()
        settings = config.evaluation

        def features(split: str, limit: int) -> Features:
            images = EvaluationSet(manifest, split, config.data.image_size, limit)
            share, problem = None, ""
            try:
                share = extract(model, images, world.device, settings.batch_size, world.rank, world.size)
            except DataError as error:
                problem = str(error)
            world.raise_together(DataError, problem)
            assert share is not None
            found = gather(share, world)
            if len(found) < len(images):
                self.say(f"{len(images) - len(found)} images of {split} cannot be decoded and are left out of the kNN")
            return found

        with self.backend.full_model() as model:
            bank = features(config.data.train_split, settings.knn_bank)
            queries = features(config.data.test_split, settings.knn_queries)
        return {"knn_accuracy": knn_accuracy(bank, queries, settings.knn_k, settings.knn_temperature, world.device)}
