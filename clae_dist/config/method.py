"""Settings of the method and of its attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from clae_dist.config.rules import Section, setting

if TYPE_CHECKING:
    from torch import nn

    from clae_dist.config import Config


# weak: a crop out of the image with an eighth of its side of black around it, and a flip; bare: the whole image.
ThirdView = Literal["none", "weak", "bare"]
# The norm layers that a forward takes (models/norms.py).
Route = Literal["clean", "adversarial", "classified"]
Views = tuple[tuple[Route, int], ...]  # of a forward of several views at once: the route of each, and its number of rows
# Of a model: embeddings of unit length, the encoder's features, or the logits of the classifiers on the features.
Output = Literal["projections", "features", "logits"]


@dataclass(frozen=True)
class TrainingSet:
    """The part of a training set that a method's settings may depend on."""

    where: str
    images: int
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]  # images of each class; (): not recorded


def name_of(method: str) -> Any:
    """The setting `method.name` of a method."""
    return setting(method, help="Pretraining method: one of the table in clae_dist/methods/README.md, or package.module:Class.")


@dataclass(frozen=True)
class MethodSettings(Section, prefix="method"):
    """Base of the settings `method.*`. Each file of methods/ defines a subclass with the keys that its method has.

    The class attributes and functions are all that the rest of the package knows about a method before it trains.
    """

    title: ClassVar[str] = ""  # as reports and exports print it
    uses_attack: ClassVar[bool] = False  # the method embeds adversarial images
    # The rows of Step.embed: projections of unit length, or the encoder's features as they are, without a projector. "logits":
    # the loss has the logits of the classifiers alone (Step.classify), and nothing is embedded.
    embeds: ClassVar[Output] = "projections"
    one_view: ClassVar[bool] = False  # of every image; the second view that `losses` gets is the first
    third_view: ClassVar[ThirdView] = "none"  # of every image, besides its two augmented ones
    weak_second_view: ClassVar[bool] = False  # crops and flips alone for y
    needs_labels: ClassVar[bool] = False  # of the training images
    pairs_sets: ClassVar[bool] = False  # every second row is of the one further set of data.mixture
    takes_local_crops: ClassVar[bool] = False  # the loss has a term for views.local_crops
    evaluated_route: ClassVar[Literal["clean", "adversarial"]] = "clean"  # of evaluation.route=auto

    name: str = name_of("")

    @property
    def two_routes(self) -> bool:
        """Adversarial images take norm layers of their own; else the method embeds everything along the clean route."""
        return self.uses_attack

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routes of norm layers that the encoder has, the clean one first."""
        return ("clean", "adversarial") if self.two_routes else ("clean",)

    @property
    def cluster_counts(self) -> tuple[int, ...]:
        """Numbers of clusters of the training images, each with a linear classifier on the features; (): there are none."""
        return ()

    @property
    def num_classes(self) -> int:
        """Classes of the training images that a head of the method tells apart; 0: it has none."""
        return 0

    @property
    def trained_blocks(self) -> int:
        """Blocks of the encoder that are trained, counted from its end; -1: the whole encoder; 0: nothing of it."""
        return -1

    def make_classifiers(self, width: int) -> nn.Module | None:
        """The classifiers on the features (B, width), with the logits of all of them side by side; None: there are none."""
        from torch import nn

        return nn.Linear(width, sum(self.cluster_counts)) if self.cluster_counts else None

    @property
    def clusters_from(self) -> str:
        """The run or export whose features of the training images are clustered (`Step.pseudo_labels`); "": none."""
        return ""

    @property
    def takes_regions(self) -> bool:
        """The loss has features of regions of an image: the encoder must pool a map."""
        return False

    @property
    def key_decay(self) -> float:
        """Decay of the momentum encoder's average of the weights; 0: there is none; 1: it stays as the run began."""
        return 0.0

    @property
    def key_statistics(self) -> Literal["averaged", "own"]:
        """Running statistics of the momentum encoder: averaged like its weights, or of its own forwards in training mode."""
        return "averaged"

    def units(self, attack: Attack, *, shared_norms: bool = False) -> float | None:
        """Cost of a step with every term: the forward of one view is 1, its backward 2, its backward to the image alone 1.

        None: not counted. `clae bench step` compares it with the operations of a step.

        Args:
            shared_norms: both routes of norm layers are the same function, so that an attack may use a clean forward.
        """
        return None

    def total_units(self, attack: Attack, steps: int, steps_per_epoch: int, *, shared_norms: bool = False) -> float | None:
        """Cost of the first `steps` steps of a run in the unit of `units`, with the terms that each of them has."""
        units = self.units(attack, shared_norms=shared_norms)
        return None if units is None else units * steps

    def check_run(self, config: Config) -> None:
        """Raise ConfigError if the method cannot work with the settings of the run."""

    def check_set(self, of_set: TrainingSet) -> None:
        """Raise ConfigError if the settings do not suit the training set."""

    def describe(self, attack: Attack) -> str:
        """One line for the console at the start of a run."""
        return f"method: {self.name}"

    def check(self, attack: Attack) -> None:
        """Raise ConfigError if the method cannot work with these settings of the attack."""

    def check_rows(self, rows: int, micro_size: int) -> None:
        """Raise ConfigError if `rows` rows per rank, `micro_size` at a time (0: all at once), do not suit the method."""

    def from_the_start(self) -> Self:
        """These settings with every term of the loss present from the first step: for measurements and rehearsals."""
        return self

    def for_few_rows(self, global_size: int) -> Self:
        """`from_the_start`, with shares that any even number of rows has, and sizes that suit a global batch of so few."""
        return self.from_the_start()


@dataclass(frozen=True)
class Attack(Section, prefix="attack"):
    """How an image is perturbed (Ho & Vasconcelos 2020, section 3). The method decides which images, and against which loss."""

    name: Literal["fgsm", "pgd"] = setting("fgsm", help="One step along the gradient (fgsm) or several (pgd).")
    norm: Literal["linf", "l2"] = setting("linf", help="Norm of the perturbation.")
    epsilon: float = setting(
        4 / 255,
        ge=0,
        hint="4/255 = 0.0157 is usual in pixels",
        help="Largest change of a pixel value (linf), or of an image in length (l2), in the unit of attack.unit.",
    )
    unit: Literal["pixel", "normalised"] = setting(
        "pixel", help="Unit of epsilon: pixel values of [0, 1], or values after subtracting the mean and dividing by the std."
    )
    clip: bool = setting(True, help="Keep the adversarial image a valid image, with pixels in [0, 1].")
    steps: int = setting(5, ge=1, used_by="attack.name=pgd", help="Number of steps.")
    step_size: float = setting(
        0.0,
        ge=0,
        zero="automatic",
        help="Length of a step in the unit of epsilon. Automatic: epsilon for fgsm, 2.5 epsilon / steps for pgd.",
    )
    random_start: bool = setting(False, help="Start at a random point of the ball instead of its centre.")
    clip_start: bool = setting(
        True, used_by="attack.random_start", help="The random start is a valid image, too, and not only what follows from it."
    )
    freeze: Literal["auto", "always", "never"] = setting(
        "auto",
        no_effect=True,
        help="Parameters require no gradient during the attack. auto: where train.compile would compute them otherwise.",
    )
    statistics: Literal["untouched", "updated", "running"] = setting(
        "untouched",
        help="Batch norm in the attack's forwards. untouched: batch statistics, running ones stay; updated: batch statistics, "
        "running ones change; running: evaluation mode, with running statistics.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.norm != "l2" or self.unit == "pixel", "unit", "attack.norm=l2 is a length in pixels: use attack.unit=pixel."
        )

    @property
    def num_steps(self) -> int:
        """Number of gradients that one attack computes."""
        return self.steps if self.name == "pgd" else 1

    @property
    def length_of_step(self) -> float:
        """Length of one step, in the unit of epsilon."""
        return self.step_size or (2.5 * self.epsilon / self.steps if self.name == "pgd" else self.epsilon)

    def describe(self) -> str:
        """For a method's line on the console."""
        return f"{self.name} ({self.norm}), epsilon {self.epsilon:.4g} ({self.unit})"
