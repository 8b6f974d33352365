"""Settings of model, objective, method, attack and optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from clae_dist.config.rules import no_effect, require


@dataclass(frozen=True)
class Model:
    """Encoder, projector and normalisation layers."""

    encoder: str = "torchvision/resnet50"  # small_resnet, timm/NAME or torchvision/NAME
    stem: Literal["auto", "imagenet", "cifar"] = "auto"  # auto: cifar (3x3, no max-pool) up to 64 pixels
    # library: as timm, torchvision and small_resnet draw them; torch: torch's own draw for every convolution and linear layer
    initial_weights: Literal["library", "torch"] = "library"
    projector_hidden: int = 0  # width of the hidden layer; 0: the encoder's width
    projector_dim: int = 128
    norm: Literal["global", "local"] = "global"  # batch statistics over all ranks, or each rank's own
    drop_rate: float = 0.0  # dropout of a timm encoder while training; 0: timm's own default, mostly none
    drop_path_rate: float = 0.0  # stochastic depth of a timm encoder while training (Huang et al. 2016); 0: timm's own default
    adversarial_norm_momentum: float = 0.1  # of the adversarial route's running statistics
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # pixels are normalised inside the model
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        require(self.projector_hidden >= 0, "model.projector_hidden", self.projector_hidden, "use 0 (encoder's width) or more.")
        require(self.projector_dim >= 2, "model.projector_dim", self.projector_dim, "use at least 2.")
        require(min(self.std) > 0, "model.std", self.std, "standard deviations are positive.")
        require(0 <= self.drop_rate < 1, "model.drop_rate", self.drop_rate, "use 0 up to, not including, 1.")
        require(0 <= self.drop_path_rate < 1, "model.drop_path_rate", self.drop_path_rate, "use 0 up to, not including, 1.")
        momentum = self.adversarial_norm_momentum
        require(0 < momentum <= 1, "model.adversarial_norm_momentum", momentum, "use a number above 0 and at most 1.")


@dataclass(frozen=True)
class Objective:
    """The contrastive loss."""

    name: Literal["nt_xent", "instance"] = "nt_xent"
    temperature: float = 0.5
    # How ranks share negatives. log_sum_exp: rows, then one number a row; reduce_scatter: rows, and their gradients on the way
    # back, for any objective. auto: log_sum_exp where the objective has that form.
    gather: Literal["auto", "log_sum_exp", "reduce_scatter"] = no_effect("auto")
    chunk: int = no_effect(0)  # columns of the similarity matrix that exist at a time; 0 chooses

    def __post_init__(self) -> None:
        require(self.chunk >= 0, "objective.chunk", self.chunk, "use 0 (automatic) or more; 2048 is usual.")
        require(self.temperature > 0, "objective.temperature", self.temperature, "use a positive number, 0.1 to 0.5 as a rule.")


@dataclass(frozen=True)
class MethodSettings:
    """Base of the settings `method.*`. Each file of methods/ defines a subclass with the keys that its method has.

    The class attributes and functions are all that the rest of the package knows about a method before it trains.
    """

    title: ClassVar[str] = ""  # as reports and exports print it
    uses_attack: ClassVar[bool] = False  # the method embeds adversarial images, along norm layers of their own

    name: str = ""  # of a built-in method, or package.module:Class

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

    def for_few_rows(self) -> Self:
        """`from_the_start`, with shares of the batch that any even number of rows has."""
        return self.from_the_start()


@dataclass(frozen=True)
class Attack:
    """How an image is perturbed (Ho & Vasconcelos 2020, section 3). Which images are, and why, is the method's business."""

    name: Literal["fgsm", "pgd"] = "fgsm"
    norm: Literal["linf", "l2"] = "linf"  # of the perturbation
    epsilon: float = 4 / 255  # largest change of a pixel value (linf) or length of an image's change (l2), in the unit below
    unit: Literal["pixel", "normalised"] = "pixel"  # pixel: of [0, 1]; normalised: after subtracting mean, dividing by std
    clip: bool = True  # keep the adversarial image a valid image
    steps: int = 5  # of pgd; fgsm takes one
    step_size: float = 0.0  # in the unit of epsilon; 0: epsilon for fgsm, 2.5 epsilon / steps for pgd (Madry et al. 2018)
    random_start: bool = False  # start at a random point of the ball instead of its centre
    # Parameters require no gradient while the attack runs. auto: only where train.compile would compute them otherwise.
    freeze: Literal["auto", "always", "never"] = no_effect("auto")
    statistics: Literal["untouched", "updated"] = "untouched"  # effect of the attack's forwards on running statistics

    def __post_init__(self) -> None:
        require(self.epsilon >= 0, "attack.epsilon", self.epsilon, "use 0 or more; 4/255 = 0.0157 is usual in pixels.")
        require(self.steps >= 1, "attack.steps", self.steps, "use at least 1.")
        require(self.step_size >= 0, "attack.step_size", self.step_size, "use 0 (automatic) or more.")
        if self.norm == "l2":
            require(
                self.unit == "pixel", "attack.unit", self.unit, "attack.norm=l2 is a length in pixels: use attack.unit=pixel."
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
        require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "use a positive number.")
        require(self.reference_batch >= 1, "optim.reference_batch", self.reference_batch, "use at least 1.")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "use 0 up to, not including, 1.")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "use 0 or more.")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "use 0 or more.")
        require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, "use 0 (none) or more.")
