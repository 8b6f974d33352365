"""Supervised training of a classifier on the encoder, for protocols: SGD on all ranks, resumable, the same at every W.

# b images of a global batch, n those of this rank, S side, C classes
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from clae_dist.data.draws import hashed, permutation, uniforms
from clae_dist.data.evaluation_set import Views
from clae_dist.data.views import CROP_DRAWS
from clae_dist.evaluation.attack import attack
from clae_dist.evaluation.classifier import Classifier
from clae_dist.evaluation.features import Features
from clae_dist.evaluation.passes import over_batches
from clae_dist.evaluation.place import Place, digest_of, read_kept
from clae_dist.evaluation.protocol import Subject
from clae_dist.files import make_folders, write_atomically
from clae_dist.models.norms import evaluation_mode, use_global_statistics
from clae_dist.progress import Progress
from clae_dist.runs.checkpoint.safetensors_file import weights_digest

Head = Literal["slf", "alf", "aff", "own"]
HEADS: tuple[Head, ...] = ("slf", "alf", "aff", "own")
Loss = Callable[[Classifier, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_SAVE_EVERY_S = 60.0
_STEP, _EPSILON, _STEPS = 2 / 255, 8 / 255, 10  # of the attacks in training (ACL, DynACL, AIR)
_BETA = 6.0  # weight of TRADES' second term


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum 0.9. The rate falls tenfold after each of the shares `drops` of all steps, or along a cosine."""

    epochs: int
    learning_rate: float
    weight_decay: float
    batch_size: int
    drops: tuple[float, ...] = ()
    cosine: bool = False
    nesterov: bool = False

    def rate(self, done: float) -> float:
        """The learning rate after the share `done` of all steps."""
        if self.cosine:
            return self.learning_rate * 0.5 * (1 + float(np.cos(np.pi * done)))
        return float(self.learning_rate * 0.1 ** sum(done >= drop for drop in self.drops))


def cross_entropy(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Losses (n,) of clean images."""
    return F.cross_entropy(classifier(images), labels, reduction="none")


def attacked_cross_entropy(
    classifier: Classifier, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Losses (n,) of images that PGD-10 moved to a high loss."""
    with _evaluation_mode(classifier):
        moved, _ = attack(classifier, images, labels, _EPSILON, "linf", _STEPS, _STEP, noise)
    return cross_entropy(classifier, moved, labels, noise)


def trades(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """CE(clean) + 6 · KL(p clean ‖ p adversarial), (n,) (Zhang et al. 2019); the attack raises the second term.

    With two routes of norm layers, clean images take the clean and adversarial ones the adversarial route, as DynACL has it.
    """
    adversarial_route, classifier.route = classifier.route, "clean"
    with _evaluation_mode(classifier):
        with torch.no_grad():
            target = F.softmax(classifier(images), dim=1)
        classifier.route = adversarial_route
        start = (images + 1e-3 * (2 * noise - 1)).clamp(0, 1)
        moved = _raise_divergence(classifier, images, start, target)
    classifier.route = "clean"
    clean = classifier(images)
    classifier.route = adversarial_route
    divergence = F.kl_div(F.log_softmax(classifier(moved), dim=1), F.softmax(clean, dim=1), reduction="none").sum(1)
    return F.cross_entropy(clean, labels, reduction="none") + _BETA * divergence


def _raise_divergence(classifier: Classifier, images: torch.Tensor, at: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    for _ in range(_STEPS):
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            loss = F.kl_div(F.log_softmax(classifier(at), dim=1), target, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, at)
        at = (images + (at + _STEP * gradient.sign() - images).clamp(-_EPSILON, _EPSILON)).clamp(0, 1)
    return at.detach()


@contextmanager
def _evaluation_mode(classifier: Classifier) -> Iterator[None]:
    """Evaluation mode inside, without gradients of parameters."""
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with evaluation_mode(classifier):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def tuned(head: Head, classifier: Classifier, subject: Subject, epochs: int, learning_rate: float) -> Classifier:
    """The classifier of ALF or AFF, trained on the subject's bank. Collective.

    Settings of the literature (DynACL, AIR): batches of 512 and 128 images, weight decay 2e-4; ALF starts from a head of zeros
    and leaves the encoder as it is, AFF trains all weights.
    """
    if head == "alf":
        schedule = Schedule(epochs, learning_rate or 0.01, 2e-4, 512, drops=(0.4, 0.8))
        return fit(classifier, subject, schedule, attacked_cross_entropy, "alf", whole=False)
    schedule = Schedule(epochs, learning_rate or 0.1, 2e-4, 128, drops=(0.6, 0.8))
    return fit(classifier, subject, schedule, trades, "aff", whole=True)


def fit(
    classifier: Classifier,
    subject: Subject,
    schedule: Schedule,
    loss_of: Loss,
    label: str,
    *,
    whole: bool,
    rows: torch.Tensor | None = None,
) -> Classifier:
    """A copy of the classifier with a head of zeros, trained on `rows` of the subject's bank (default: all). Collective.

    Images are cropped at random and mirrored (`supervised_view`). `whole`: train all weights, with batch norms
    over the global batch; otherwise the head alone, with the encoder in evaluation mode. It is saved every minute, and the same
    call resumes.
    """
    _, place = subject.parts()
    rows = torch.arange(len(subject.bank)) if rows is None else rows
    key = {
        "tuning": label,
        "classifier": weights_digest(classifier.state_dict()),
        "images": place.manifest.digest,
        "rows": digest_of({"rows": rows.tolist()}),
        "schedule": asdict(schedule),
        "seed": subject.seed,
    }
    tuned_classifier = copy.deepcopy(classifier)
    if whole and place.world.group is not None:
        use_global_statistics(tuned_classifier.model, place.world.group)
    nn.init.zeros_(tuned_classifier.weight)
    nn.init.zeros_(tuned_classifier.bias)
    trained = {tuned_classifier.weight, tuned_classifier.bias, *(tuned_classifier.model.encoder.parameters() if whole else ())}
    for parameter in tuned_classifier.parameters():
        parameter.requires_grad_(parameter in trained)
    path = place.folder / "tuned" / f"{digest_of(key)}.safetensors"
    text = f"training {label}, {subject.when}"
    _Fit(tuned_classifier, subject, place, schedule, loss_of, rows).run(path, text, whole=whole)
    for parameter in trained:
        parameter.requires_grad_(False)
    return tuned_classifier.eval()


class _Fit:
    """The training of one classifier; `size` images a step, of which this rank has every W-th."""

    def __init__(
        self, classifier: Classifier, subject: Subject, place: Place, schedule: Schedule, loss_of: Loss, rows: torch.Tensor
    ) -> None:
        self.classifier, self.subject, self.place, self.schedule = classifier, subject, place, schedule
        self.loss_of, self.rows, self.world = loss_of, rows, place.world
        self.trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.SGD(
            self.trained,
            schedule.learning_rate,
            momentum=0.9,
            weight_decay=schedule.weight_decay,
            nesterov=schedule.nesterov,
        )
        self.size = min(schedule.batch_size, len(rows))
        self.per_epoch = len(rows) // self.size
        self.total = self.per_epoch * schedule.epochs

    def run(self, path: Path, label: str, *, whole: bool) -> None:
        """Train what is left to train."""
        step = self._load(path)
        say = self.place.say if self.world.is_main else _silent
        progress = Progress(self.total * self.size, done=step * self.size, label=f"{label}: ", say=say)
        saved = time.monotonic()
        for number, (images, labels, noise) in enumerate(self._batches(step), step):
            self.classifier.train(whole)
            self._step(number, images, labels, noise)
            progress.add(self.size)
            if self.world.is_main and (number + 1 == self.total or time.monotonic() - saved > _SAVE_EVERY_S):
                self._save(path, number + 1)
                saved = time.monotonic()
        self.world.gather_objects(None)  # the last state is on disk
        progress.close()

    def _step(self, number: int, images: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(number / self.total)
        loss = self.loss_of(self.classifier, images, labels, noise).sum() / self.size
        gradients = torch.autograd.grad(loss, self.trained, allow_unused=True, materialize_grads=True)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.world.add_up(flat)
        for parameter, part in zip(self.trained, flat.split([p.numel() for p in self.trained]), strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))  # in the parameter's memory format
        self.optimiser.step()

    def _batches(self, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """This rank's pixels, labels and noise of the steps from `start` on. All ranks' together depend on seed and step."""
        place, bank, seed = self.place, self.subject.bank, self.subject.seed
        chosen = []
        for number in range(start, self.total):
            epoch, batch = divmod(number, self.per_epoch)
            order = permutation(len(self.rows), seed, epoch)[batch * self.size : (batch + 1) * self.size]
            chosen.append(self.rows[order][self.world.rank :: self.world.size])
        lists = [bank.ids_N[rows].numpy() for rows in chosen]
        draws = [uniforms(CROP_DRAWS + 1, seed, number, ids) for number, ids in enumerate(lists, start)]
        views = place.images(place.config.data.train_split).lists(lists, draws)
        for number, rows, ids, read in zip(range(start, self.total), chosen, lists, views, strict=True):
            pixels = place.pixels(read.views, self.classifier.model)
            generators = [torch.Generator().manual_seed(int(key)) for key in hashed(seed, number, ids, 1) >> np.uint64(2)]
            noise = [torch.rand(pixels.shape[1:], generator=generator) for generator in generators]
            yield pixels, bank.labels_N[rows].to(pixels.device), torch.stack(noise).to(pixels)

    def _load(self, path: Path) -> int:
        """Steps that were taken before."""
        if not self.world.run_on_main(lambda: read_kept(path) is not None):
            return 0
        tensors = read_kept(path)
        assert tensors is not None
        with torch.no_grad():
            for name, value in self.classifier.state_dict().items():
                value.copy_(tensors[f"classifier/{name}"])
            for number, parameter in enumerate(self.trained):
                self.optimiser.state[parameter]["momentum_buffer"] = tensors[f"momentum/{number}"].to(parameter)
        return int(tensors["step"])

    def _save(self, path: Path, step: int) -> None:
        tensors = {f"classifier/{name}": value for name, value in self.classifier.state_dict().items()}
        for number, parameter in enumerate(self.trained):
            tensors[f"momentum/{number}"] = self.optimiser.state[parameter]["momentum_buffer"]
        make_folders(path.parent)
        stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_atomically(path, save({**stored, "step": torch.tensor(step)}))


def _silent(_: str) -> None: ...


def accuracy(classifier: Classifier, subject: Subject, images: Features, split: str, label: str) -> float:
    """Percent of `images` of a split that the classifier gets right; ranks share them. Collective."""
    _, place = subject.parts()
    wanted = place.images(split)
    wanted.ids = images.ids_N.numpy()

    def work(_: int, views: Views) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            predicted = classifier(place.pixels(views.views, classifier.model)).argmax(1)
        return {"predicted": predicted, "ids": views.positions}

    key = {"accuracy": weights_digest(classifier.state_dict()), "of": classifier.route}
    (found,) = over_batches(subject, wanted, key, work, f"accuracy, {label}, {subject.when}")
    assert torch.equal(found["ids"], images.ids_N)
    return 100 * float((found["predicted"] == images.labels_N).double().mean())
