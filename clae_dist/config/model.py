"""Settings of the model and of the optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clae_dist.config.rules import Section, setting


@dataclass(frozen=True)
class Model(Section, prefix="model"):
    """Encoder, projector and normalisation layers."""

    encoder: str = setting("torchvision/resnet50", help="small_resnet, timm/NAME or torchvision/NAME.")
    stem: Literal["auto", "imagenet", "cifar"] = setting(
        "auto", help="First layers of a ResNet. cifar: a 3x3 convolution without max-pool; auto: cifar up to 64 pixels."
    )
    initial_weights: Literal["library", "torch"] = setting(
        "library",
        help="Initialisation. library: as timm, torchvision and small_resnet do it; torch: torch's defaults for every "
        "convolution and linear layer.",
    )
    init: str = setting(
        "",
        zero="as model.initial_weights says",
        help="Start of the encoder from elsewhere: pretrained (published weights of model.encoder), timm/NAME, "
        "torchvision/NAME, a .safetensors file, an exported encoder, or a run (a folder or s3://…). The projector starts anew.",
    )
    init_missing: Literal["error", "random"] = setting(
        "error", used_by="model.init", help="Tensors of the encoder that model.init lacks or has in another shape."
    )
    projector: Literal["mlp", "linear", "mlp_bn", "mlp3_bn"] = setting(
        "mlp",
        help="Layers from the features to the embeddings. mlp: Linear-ReLU-Linear; linear: one linear layer; mlp_bn: "
        "Linear-BN-ReLU-Linear; mlp3_bn: three layers with batch norm after each, along the two routes of the encoder's.",
    )
    projector_hidden: int = setting(
        0, ge=0, zero="encoder's width", used_by="model.projector=mlp…", help="Width of the projector's hidden layers."
    )
    projector_dim: int = setting(128, ge=2, help="Dimension of the embeddings that are contrasted.")
    norm: Literal["global", "local", "fixed"] = setting(
        "global",
        help="Statistics of batch norm in training: of the batch over all ranks (global), of each rank's part of it (local), "
        "or the running statistics of model.init, which stay (fixed).",
    )
    norm_group: str = setting(
        "all",
        used_by="model.norm=global",
        help="Ranks that share batch statistics: all, those of a node, or a number of neighbours, which divides the ranks.",
    )
    drop_rate: float = setting(
        0.0,
        ge=0,
        lt=1,
        zero="timm's default",
        used_by="model.encoder=timm/…",
        help="Dropout while training. 0: timm's default for this encoder, usually none.",
    )
    drop_path_rate: float = setting(
        0.0,
        ge=0,
        lt=1,
        zero="timm's default",
        used_by="model.encoder=timm/…",
        help="Stochastic depth while training (Huang et al. 2016). 0: timm's default for this encoder.",
    )
    adversarial_norm_momentum: float = setting(
        0.1, gt=0, le=1, help="Momentum of the running statistics of the adversarial route."
    )
    mean: tuple[float, float, float] = setting(
        (0.485, 0.456, 0.406), help="Mean of each colour channel; pixels in [0, 1] are normalised inside the model."
    )
    std: tuple[float, float, float] = setting((0.229, 0.224, 0.225), gt=0, help="Standard deviation of each colour channel.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.norm != "fixed" or bool(self.init),
            "norm",
            "an encoder that starts at random has no running statistics to keep: use model.norm=global, or set model.init.",
        )
        self.require(
            self.norm_group in ("all", "node")
            or (self.norm_group.isascii() and self.norm_group.isdigit() and self.norm_group[0] != "0"),
            "norm_group",
            "use all, node, or a number of ranks.",
        )
        self.require(
            self.projector != "linear" or not self.projector_hidden,
            "projector_hidden",
            "model.projector=linear has no hidden layer; remove it, or use model.projector=mlp.",
        )

    @property
    def statistics_differ(self) -> str:
        """The setting that gives ranks different batch statistics, as "norm is 'local'"; "" if they are those of all ranks."""
        if self.norm == "local":
            return "norm is 'local'"
        return f"norm_group is {self.norm_group!r}" if self.norm == "global" and self.norm_group != "all" else ""


@dataclass(frozen=True)
class Optim(Section, prefix="optim"):
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "sgd", "lars"] = setting("lars", help="Optimiser.")
    learning_rate: float = setting(0.3, gt=0, help="Peak learning rate at batch.global_size = optim.reference_batch.")
    scaling: Literal["linear", "sqrt", "none"] = setting(
        "linear", help="Scaling of the learning rate with batch.global_size / optim.reference_batch."
    )
    reference_batch: int = setting(256, ge=1, help="Global batch size to which optim.learning_rate refers.")
    momentum: float = setting(0.9, ge=0, lt=1, used_by="optim.name=sgd or lars", help="Momentum.")
    weight_decay: float = setting(1e-6, ge=0, help="Weight decay.")
    decay: Literal["weights", "all"] = setting(
        "weights",
        help="Parameters that are decayed. weights: all but biases, norm layers, and a transformer's tokens and position "
        "embeddings, which LARS then does not adapt either.",
    )
    layer_decay: float = setting(
        1.0,
        gt=0,
        le=1,
        help="Factor of the learning rate from each block of the encoder to the one before it; 1: all blocks learn alike. "
        "For fine-tuning, 0.65 to 0.9 is usual with a transformer.",
    )
    schedule: Literal["cosine", "constant", "steps"] = setting("cosine", help="Learning-rate schedule after warmup.")
    factors: dict[str, float] = setting(
        {},
        gt=0,
        used_by="optim.schedule=steps",
        help="Epochs and the factor of the peak learning rate from each on, such as {120: 0.1, 160: 0.05}.",
    )
    warmup_epochs: float = setting(10.0, ge=0, help="Epochs of linear warmup.")
    clip_norm: float = setting(0.0, ge=0, zero="no clipping", help="Maximum norm of the gradient over all parameters.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            all(epoch.isdecimal() for epoch in self.factors), "factors", "every key must be a number of epochs: use {120: 0.1}."
        )
        self.require(
            bool(self.factors) == (self.schedule == "steps"),
            "factors",
            f"optim.schedule is {self.schedule}: use factors with optim.schedule=steps, and only with that.",
        )
