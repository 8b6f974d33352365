"""The training run, from a World to a trained encoder. The only training loop is here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from clae_dist.collectives import observed
from clae_dist.contrast.diagnostics import diagnose
from clae_dist.contrast.step import Pretraining, pretrain_step
from clae_dist.cores import threads_per_rank
from clae_dist.data.loader import LoadedBatch, load
from clae_dist.data.transfer import transferred
from clae_dist.devices import kernels, tf32
from clae_dist.errors import DataError, RankError
from clae_dist.escape import shown
from clae_dist.models import build_model
from clae_dist.parallel import Backend, make_backend
from clae_dist.recipe import Recipe
from clae_dist.runs.checkpoint import shapes_of
from clae_dist.runs.claim import only_run
from clae_dist.runs.ends import Attempt
from clae_dist.runs.folder import Identity
from clae_dist.runs.goodput import Kind, Ledger
from clae_dist.runs.initial import load_initial
from clae_dist.runs.mirror import Mirror, check_nodes, mirrored
from clae_dist.tracking import Status, TrackedSet, Tracker, build_trackers, continue_tracking
from clae_dist.tracking.console import STARTING
from clae_dist.training.alarms import Alarms
from clae_dist.training.bad_samples import BadSamples
from clae_dist.training.coming import Coming, next_batch
from clae_dist.training.flight_recorder import make_room
from clae_dist.training.guard import StopRequest, listen_for_stop
from clae_dist.training.head_accuracy import head_accuracy
from clae_dist.training.helper_threads import failing_threads_end_the_rank
from clae_dist.training.journal import Journal
from clae_dist.training.knn import knn_while_training
from clae_dist.training.nonfinite import NonFiniteSteps
from clae_dist.training.opening import open_folder, resume
from clae_dist.training.peers import Peers
from clae_dist.training.plan import Plan, describe
from clae_dist.training.pretraining import make_pretraining, seed_step
from clae_dist.training.profiling import Profiling
from clae_dist.training.pseudo_labels import with_pseudo_labels
from clae_dist.training.pulse import Pulse
from clae_dist.training.saving import Saving
from clae_dist.training.session import Session
from clae_dist.training.sets import Sets, open_sets
from clae_dist.training.tracked import leave_results, log_encoder
from clae_dist.training.usage import Usage
from clae_dist.training.watch import ENDING, Watch
from clae_dist.wording import count_of
from clae_dist.world import World

Say = Callable[[str], None]


@dataclass(frozen=True)
class LoopResult:
    """How a run ended: "finished", or "stopped" on request with everything saved."""

    status: Status
    step: int
    reason: str = ""  # of a stop


def train(recipe: Recipe, world: World, stream: TextIO = sys.stdout, attempt: Attempt | None = None) -> LoopResult:
    """Train to the end of the configuration, from the run folder's newest checkpoint if there is one. Collective.

    Every rank calls it; rank 0 writes the run folder and speaks to `stream`. Raises ConfigError, DataError, RankError and
    CheckpointError, on every rank the same.
    """

    def say(text: str) -> None:
        if world.is_main:
            print(shown(text), file=stream, flush=True)

    config = recipe.config
    config.rows_per_rank(world.size)
    session = Session(config, world, say, attempt or Attempt())
    check_nodes(config.folder, world)
    with (
        failing_threads_end_the_rank(session),
        listen_for_stop(config.folder) as stop,
        Watch(session, stop) as watch,
        Peers(session),
        only_run(config.folder, world, say),
        mirrored(config.folder, world, say) as mirror,
        kernels(deterministic=config.train.deterministic),
        tf32(allowed=config.train.tf32),
    ):
        session.attempt.holds_lease = True
        with Pulse(session, watch) as pulse:
            return _train(recipe, session, stream, stop, watch, pulse, mirror)


def _train(
    recipe: Recipe, session: Session, stream: TextIO, stop: StopRequest, watch: Watch, pulse: Pulse, mirror: Mirror
) -> LoopResult:
    config, world, say = session.config, session.world, session.say
    ledger = Ledger(config.folder, write=world.is_main)
    watch.meet()
    torch.set_num_threads(config.train.threads or threads_per_rank(world.local_size))
    say(f"{STARTING}opening and checking the shards")
    sets = open_sets(session, progress=lambda: watch.doing("starting", 0))
    watch.doing("starting", 0)
    plan = Plan.of(config, sets.train.num_samples(config.data.train_split))

    identity: Identity = world.run_on_main(lambda: open_folder(recipe, session, sets.train))
    session.attempt.opened = True
    make_room(session.folder, world)
    sets = with_pseudo_labels(session, sets, identity, progress=lambda: watch.doing("starting", 0))
    mirror.share()
    say(f"{STARTING}building {config.model.encoder} and its optimiser")
    model = build_model(config, world.norm_group(config.model.norm_group))
    load_initial(config.model, config.folder, model.encoder)
    shapes = shapes_of(model)  # before it is wrapped: ZeRO-3 leaves parameters of no elements
    usage = Usage.of(config, model, world)
    backend = make_backend(config, model, world)
    watch.doing("starting", 0)
    before = resume(session, backend, shapes)
    first_step = before.step
    watch.doing("starting", first_step)
    for line in describe(plan, world, backend):
        say(line)
    if first_step:
        say(f"resuming after step {first_step}")
    seen = plan.images_seen(first_step)
    known: dict[str, Any] = {"tags": identity.tags, "dataset": TrackedSet.of(sets.train, config)}
    if first_step >= plan.total:
        say("this run is finished already; give another run_dir or name to start a new one.")
        if world.is_main and config.tracking.uses("mlflow"):
            watch.doing(ENDING, first_step)
            late = continue_tracking(config, config.folder, identity.run_key, **known, images_seen=seen, say=say, trained=True)
            log_encoder(config, late, sets.train, say)
            late.close("finished")
        return LoopResult("finished", first_step)

    ledger.resumed(first_step, say)
    pulse.ledger = ledger
    session.attempt.trained, session.attempt.total = True, plan.total
    tracker = Tracker()
    if world.is_main:
        steps: dict[str, Any] = {"total_steps": plan.total, "resume_images_seen": seen}
        tracker = build_trackers(config, config.folder, identity.run_key, **known, **steps, stream=stream, more=[pulse])
    status: Status = "failed"
    try:
        bad = BadSamples(config.data.max_bad, plan.num_samples, config.folder, before.bad_samples)
        journal = Journal(session, plan, tracker, bad, ledger, usage, first_step, before.train_s)
        nonfinite = NonFiniteSteps(session, backend, sets.train, before.skipped_steps)
        saving = Saving(session, backend, journal.clock)
        outcome = _Loop(session, backend, sets, plan, journal, stop, watch, bad, nonfinite, saving, first_step).run()
        status = outcome.status
        journal.close(outcome.step)
        watch.doing(ENDING, outcome.step)
        if status == "finished":
            leave_results(session, backend, sets.train, tracker)
    finally:
        if status == "failed":
            ledger.close()
        tracker.close(status)
    if tracker.page:
        say(f"MLflow's page: {tracker.page}")
    return outcome


@dataclass
class _Loop:
    """The loop over steps, with periodic logging, evaluation and checkpoints."""

    session: Session
    backend: Backend
    sets: Sets
    plan: Plan
    journal: Journal
    stop: StopRequest
    watch: Watch
    bad: BadSamples
    nonfinite: NonFiniteSteps
    saving: Saving
    first_step: int

    def __post_init__(self) -> None:
        self.config, self.world, self.say = self.session.config, self.session.world, self.session.say
        self.clock = self.journal.clock
        self.alarms = Alarms(self.config, self.plan.total, self.say, self.journal.tag)
        self.profiling = Profiling(self.session, self.plan.total)
        self.step = self.saved = self.first_step
        self.coming: Coming | None = None

    def run(self) -> LoopResult:
        """Run steps first_step … plan.total - 1, or until all ranks know of a stop request. Collective.

        Raises DataError on every rank if one rank cannot read its batch.
        """
        try:
            with observed(self.clock.waiting, every_work=self.world.device.type == "cpu"):
                return self._run()
        except (DataError, RankError):  # raised by all ranks together: the checkpoint in progress is intact
            self._settle()
            raise
        finally:
            self.profiling.close()
            self.saving.close()

    def _run(self) -> LoopResult:
        plan, every = self.plan, self.config.train
        labels, beside = self.sets.pseudo_labels, self._fetch_beside
        run = make_pretraining(self.config, self.world, self.backend, self.clock, labels, beside)
        self.say(f"{STARTING}loader processes, the first batch and the first step")
        batches = load(self.sets.train, self.config, self.world, self.step, plan.total)
        self.batches = transferred(batches, self.world.device, self.clock.timed)
        if self.step == 0 and plan.knn_every:
            self.say(f"{STARTING}accuracy of the untrained model")
            self._evaluate()
            self.say(f"{STARTING}the first batch and the first step")
        self.backend.model.train()
        self.clock.read()
        while self.step < plan.total:
            self.profiling.at(self.step)
            batch = self._batch()
            if batch is None:
                return self._stopped()
            measured: dict[str, float] = {}
            if self.step % every.diagnose_every == 0 or self.alarms.due(self.step):
                with self.clock.timed("diagnosis"):
                    measured = diagnose(run, batch)
                measured |= self.alarms.judge(self.step, measured)
            rate = self._train_on(run, batch)
            self.journal.pace.step(batch)
            if self.step % every.log_every == 0 or self.step == plan.total or measured:
                self._log({"learning_rate": rate, **measured})
            if plan.knn_every and (self.step % plan.knn_every == 0 or self.step == plan.total):
                self._evaluate()
            every_steps = self.config.checkpoint.every_steps
            if self.step == plan.total or (every_steps and self.step % every_steps == 0):
                self._checkpoint(last=self.step == plan.total)
        self.profiling.at(self.step)
        self._settle()
        self.say(f"finished: {count_of(self.step, 'step')}, {plan.images_seen(self.step):,} images")
        return LoopResult("finished", self.step)

    def _doing(self, what: Kind) -> None:
        # The first batch and step take as long as loaders, caches and compilers need to start.
        if self.step == self.first_step and what in ("data", "training"):
            what = "starting"
        self.watch.doing(what, self.step)
        self.journal.ledger.switch(what, self.step)

    def _fetch(self) -> Coming:
        """Take this rank's next batch, and begin to tell the other ranks of it, of a stop request and of a checkpoint."""
        self._doing("data")
        with self.clock.timed("data"):
            batch, problem = next_batch(self.batches, self.config.rows_per_rank(self.world.size), self.world.rank)
        self._doing("training")
        new = batch is not None and self.bad.new_in(batch.bad)
        flags = self.world.announce(self.stop.made(), bool(problem), new, *self.saving.flags())
        return Coming(batch, problem, flags, self.saved)

    @property
    def fetches_beside(self) -> bool:
        """True if the batch of the next step is fetched while the device computes this one."""
        return self.world.device.type == "cuda"

    def _fetch_beside(self) -> None:
        if self.fetches_beside and self.step + 1 < self.plan.total:
            self.coming = self._fetch()

    def _batch(self) -> LoadedBatch | None:
        """This rank's batch of the step; None on every rank after a stop request to any of them. Collective."""
        coming, self.coming = self.coming or self._fetch(), None
        stopping, broken, skipped, due, *writing = coming.flags.heard()
        if coming.saved == self.saved:  # otherwise they are about an older checkpoint
            self.saving.hear(*writing)
        if broken and not stopping:  # a signal to the whole job ends loader processes, too
            self.world.raise_together(DataError, coming.problem)
        if skipped:
            self.bad.add(coming.batch.bad if coming.batch else {}, self.world, self.say)
        if due and not stopping:
            self._checkpoint()
            self._doing("training")
        return None if stopping else coming.batch

    def _stopped(self) -> LoopResult:
        reason = next(filter(None, self.world.gather_objects(self.stop.reason)))
        self.stop.make(reason)  # on the ranks that were not asked themselves: their time runs, too
        self._checkpoint(last=True)
        self._settle()
        self.say(
            f"stopped after step {self.step} ({reason}); saved. The same command resumes from there. "
            f"That took {self.stop.waited_s:.1f} s (guard.stop_within_s {self.config.guard.stop_within_s:g})."
        )
        return LoopResult("stopped", self.step, reason)

    def _evaluate(self) -> None:
        self._doing("evaluation")
        with self.clock.stopped():
            if self.config.method.num_classes:
                limit = 0 if self.step == self.plan.total else self.config.evaluation.knn_queries
                found = head_accuracy(self.session, self.backend, self.sets, limit=limit)
            else:
                found = knn_while_training(self.session, self.backend, self.sets.main)
            self.journal.log(self.step, found)

    def _checkpoint(self, *, last: bool = False) -> None:
        """Begin to save; training waits only for a copy to memory."""
        if self.saved == self.step:
            return
        self._doing("checkpoint")
        info = {
            "images_seen": self.plan.images_seen(self.step),
            "train_s": self.journal.train_s,
            "bad_samples": dict(self.bad.known),
            "skipped_steps": self.nonfinite.skipped,
        }
        with self.clock.stopped(synchronise=last):
            if last:  # that of a moment ago
                self.saving.settle()
            blocked_s = self.saving.save(self.step, info, last=last)
        self.saved = self.step
        self.journal.log(self.step, {"checkpoint_blocked_s": blocked_s})

    def _settle(self) -> None:
        """Wait for the checkpoint in progress."""
        self._doing("checkpoint")
        with self.clock.stopped():
            self.saving.settle()

    def _train_on(self, run: Pretraining, batch: LoadedBatch) -> float:
        """Take one step, or skip it if its loss or gradient is non-finite. Returns its learning rate."""
        rate, moment = self.plan.learning_rate(self.step), self.plan.moment(self.step)
        seed_step(self.config, self.step, self.world.rank)
        self.backend.set_learning_rate(rate)
        settings = {"learning_rate": rate}
        metrics = self.nonfinite.attempt(lambda: pretrain_step(run, batch, moment), batch, self.step, settings)
        if metrics is not None:
            self.journal.add(metrics)
        self.step += 1
        if self.step == self.first_step + 1:
            self.saving.reserve(self.step, self.plan.total)
        self._doing("training")
        return rate

    def _log(self, values: dict[str, float]) -> None:
        skipped = {"skipped_steps": float(self.nonfinite.skipped)} if self.nonfinite.skipped else {}
        self.journal.log(self.step, {**self.journal.steps(), **values, **self.journal.speed(self.step), **skipped})
