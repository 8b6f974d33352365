"""Steps with a non-finite loss or gradient: recorded for `clae replay`, then skipped, or the end of the run.

A skipped step changes nothing: weights, optimiser, average and running statistics stay as they were, and its images count as
seen. All ranks agree: the backend asks all of them, and the gradient's norm is that of the full gradient.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from clae_dist.contrast.step import NonFinite, StepMetrics
from clae_dist.data.loader import LoadedBatch
from clae_dist.data.manifest import Manifest
from clae_dist.data.shards import ShardReader
from clae_dist.errors import DataError, DivergedError
from clae_dist.files import write_atomically
from clae_dist.parallel import Backend
from clae_dist.training.session import Session

_WORST = 20  # parameters whose gradients are written down


class NonFiniteSteps:
    """Skips up to guard.max_skipped steps of a run; `skipped` of them were skipped before this start."""

    def __init__(self, session: Session, backend: Backend, manifest: Manifest, skipped: int) -> None:
        self._session, self._world, self._backend = session, session.world, backend
        self._max_skipped = session.config.guard.max_skipped
        self._reader = ShardReader(manifest, session.config.data.train_split)
        # Running statistics, which a forward changes: the encoder's, and those that its average keeps apart.
        changed = [*backend.model.buffers(), *backend.keys.parts[len(backend.parameters()) :]]
        self._buffers = sorted(changed, key=lambda buffer: str(buffer.dtype))
        self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        self.skipped = skipped

    def attempt(
        self, take_step: Callable[[], StepMetrics], batch: LoadedBatch, step: int, settings: dict[str, float]
    ) -> StepMetrics | None:
        """Run take_step(). Returns None if the step was skipped. `settings` (the learning rate) are recorded with it.

        Raises DivergedError on every rank if no more steps may be skipped.
        """
        may_skip = self.skipped < self._max_skipped
        if may_skip:
            self._copy(self._kept, self._buffers)
        try:
            metrics = take_step()
            if metrics.taken:
                return metrics
            problem = (
                f"the gradient of step {step + 1} is not finite; this step was not saved. "
                "optim.clip_norm=1, a lower optim.learning_rate or train.precision=float32 may help"
            )
        except NonFinite as error:
            problem, metrics = str(error), error.metrics
        if may_skip:
            self._copy(self._buffers, self._kept)
        self._write_down(batch, step, loss_parts(metrics), {**settings, "problem": problem})
        self._backend.discard()
        if not may_skip:
            raise DivergedError(problem)
        self.skipped += 1
        self._session.say(f"{problem}: skipped ({self.skipped} of at most {self._max_skipped}, guard.max_skipped)")
        return None

    @staticmethod
    def _copy(to: list[torch.Tensor], from_: list[torch.Tensor]) -> None:
        """Of one type at a time: that is one kernel."""
        for _, pairs in itertools.groupby(zip(to, from_, strict=True), key=lambda pair: pair[0].dtype):
            targets, sources = zip(*pairs, strict=True)
            torch._foreach_copy_(list(targets), list(sources))

    def _name_of(self, sample: int) -> str:
        """Shard and key, or the number if this rank alone cannot open the shard: the other ranks wait for an answer."""
        try:
            return self._reader.name_of(sample)
        except DataError:
            return f"sample {sample}"

    def _write_down(self, batch: LoadedBatch, step: int, parts: dict[str, float], settings: dict[str, Any]) -> None:
        folder = self._session.folder.nonfinite(step + 1)
        norms = self._backend.gradient_norms()
        worst = sorted(norms, key=lambda name: (torch.tensor(norms[name]).isfinite().item(), -norms[name]))[:_WORST]
        images = [self._name_of(sample) for sample in batch.ids.tolist()]
        rank = {"rank": self._world.rank, "host": platform.node(), "loss": parts, "images": images}
        content = {
            "step": step,  # of steps that were taken before
            **settings,
            "world_size": self._world.size,
            "precision": self._backend.precision,
            "gradient_norms": {name: norms[name] for name in worst},
            "ranks": self._world.gather_objects(rank),
        }
        weights, keys = self._backend.weights(), self._backend.key_weights()

        def write() -> str:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
                save_file({**self._backend.method_state}, folder / "method.safetensors")
                save_file(keys, folder / "keys.safetensors")
                write_atomically(folder / "step.json", (json.dumps(content, indent=1) + "\n").encode())
            except (OSError, SafetensorError) as error:  # the step is skipped without the record
                return f"step {step + 1} could not be recorded: {error}"
            return f"step {step + 1} was recorded: `clae replay {folder}` repeats it"

        self._session.say(self._world.run_on_main(write))


def loss_parts(metrics: StepMetrics) -> dict[str, float]:
    """The parts of a rank's loss, as numbers."""
    return {name: value.item() for name, value in {"loss": metrics.loss, **metrics.terms}.items()}
