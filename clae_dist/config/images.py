"""Settings of the images: which set, in which order, how they are augmented, and how many per step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from clae_dist.config.rules import Section, require, setting


@dataclass(frozen=True)
class Data(Section, prefix="data"):
    """The training set and the order in which it is read."""

    shards: str = setting(
        "",
        no_effect=True,  # its content is checked by its digest instead
        help="Folder or URL (http(s), s3, gs) of a set written by data_prep, or plain WebDataset shards, several joined by "
        "'::': x-{000000..000099}.tar, pipe:COMMAND.",
    )
    mixture: dict[str, float] = setting(
        {},
        gt=0,
        lt=1,
        no_effect=True,
        hint="each is a set's share of every global batch",
        help="Further sets and the share of every global batch drawn from each. data.shards supplies the rest and is the set "
        "that is evaluated on.",
    )
    long_tail: float = setting(
        0.0,
        ge=0,
        zero="all images",
        help="Train on a long-tailed part of the labelled images, drawn by seed: so many times more images of the first class "
        "than of the last, in proportion to their own numbers. Evaluation uses all images.",
    )
    train_split: str = setting("train", help="Split to train on.")
    test_split: str = setting("test", help="Split to evaluate on.")
    image_size: int = setting(224, ge=8, help="Side of each view in pixels.")
    streams: int = setting(
        0,
        ge=0,
        zero="automatic",
        hint="it divides batch.global_size",
        help="Canonical sample streams. Must be a multiple of every world size the run may resume with.",
    )
    shuffle_shards: int = setting(8, ge=1, help="Number of shards whose samples are shuffled together.")
    workers: int = setting(
        -1,
        ge=-1,
        no_effect=True,
        hint="-1 is automatic, 0 loads in the training process",
        help="Loader processes per rank. -1: the rank's share of this machine's cores but one, at most 16; 0: load in the "
        "training process.",
    )
    verify: Literal["sha256", "size"] = setting(
        "sha256", no_effect=True, help="How shards on this machine are checked when a run starts."
    )
    cache: str = setting(
        "", no_effect=True, help="Folder on this machine where remote shards are cached, in shards/. Empty: the user's cache."
    )
    cache_bytes: int = setting(
        0,
        ge=0,
        zero="all free space but 1 GiB",
        no_effect=True,
        help="Size limit of the cache; the least recently used shards are evicted first.",
    )
    prefetch_shards: int = setting(
        8, ge=0, zero="none", no_effect=True, help="Remote shards that a rank fetches ahead of need."
    )
    timeout_s: float = setting(
        30.0, gt=0, no_effect=True, hint="30 is usual", help="Seconds without a byte before a fetch is cut off and retried."
    )
    retries: int = setting(
        8, ge=0, zero="none", no_effect=True, help="Retries of a fetch without progress, with backoff (a minute in total)."
    )
    max_bad: float = setting(
        0.001,
        ge=0,
        zero="none",
        no_effect=True,
        hint="below 1 it is a share, from 1 a number of images",
        help="Undecodable images tolerated before the run stops: a share of all images (below 1) or a number. Each is replaced "
        "by the next readable one.",
    )
    metadata: tuple[str, ...] = setting(
        (),
        no_effect=True,
        help="Extensions of further files of a sample to load as bytes with its image (Batch.metadata), such as [json, txt]. "
        "Costs a read of the tar index.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        tail = self.long_tail
        self.require(not 0 < tail < 1, "long_tail", "use 1 or more, such as 100, or 0 for all images.")
        self.require(not (tail and self.mixture), "long_tail", "it is drawn from one set; remove data.mixture.")
        shares = list(self.mixture.values())  # without the names, which may be URLs with secrets
        rest = 1 - sum(shares)
        require(rest > 1e-9, "data.mixture", shares, f"the shares leave {rest:g} for data.shards; use shares below 1 in total.")


@dataclass(frozen=True)
class Augment(Section, prefix="augment"):
    """SimCLR's augmentation (Chen et al. 2020, appendix A). Probabilities are per view."""

    crop: Literal["resized", "shifted"] = setting(
        "resized",
        help="Crops of views. resized: a part of the image, resized; shifted: the whole image, moved by up to an eighth of its "
        "side, with black where it ends (the usual crop of CIFAR with labels).",
    )
    crop_scale: tuple[float, float] = setting(
        (0.2, 1.0), gt=0, le=1, help="Range of the crop's area as a share of the image's area."
    )
    crop_ratio: tuple[float, float] = setting((3 / 4, 4 / 3), gt=0, help="Range of the crop's width / height.")
    flip: float = setting(0.5, ge=0, le=1, help="Probability of a horizontal flip.")
    jitter: float = setting(0.8, ge=0, le=1, help="Probability of colour jitter.")
    brightness: float = setting(0.8, ge=0, zero="none", help="Strength of the brightness jitter.")
    contrast: float = setting(0.8, ge=0, zero="none", help="Strength of the contrast jitter.")
    saturation: float = setting(0.8, ge=0, zero="none", help="Strength of the saturation jitter.")
    hue: float = setting(0.2, ge=0, le=0.5, zero="none", help="Largest hue shift, as a fraction of the colour circle.")
    grey: float = setting(0.2, ge=0, le=1, help="Probability of conversion to greyscale.")
    blur: float = setting(0.0, ge=0, le=1, help="Probability of Gaussian blur.")
    blur_sigma: tuple[float, float] = setting((0.1, 2.0), gt=0, help="Range of the blur's standard deviation in pixels.")
    anneal_epochs: int = setting(
        0,
        ge=0,
        zero="never",
        help="Crops, jitter, grey and blur weaken after every so many epochs, from these settings at the start of a run to "
        "none at its end; flips stay (Luo et al. 2023).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            self.require(low <= high, name, "the first number is the lower one; use low <= high.")

    def strength(self, epoch: int, epochs: float) -> float:
        """Share of the augmentation in epoch `epoch` (from 0) of `epochs`: 1 at the start of a run. Reference: Luo et al. 2023,
        Rethinking the effect of data augmentation in adversarial contrastive learning, equation 5."""
        return max(0.0, 1 - epoch // self.anneal_epochs * self.anneal_epochs / epochs) if self.anneal_epochs else 1.0

    def weakened(self, strength: float) -> Self:
        """These settings at a strength from 0 (flips alone) to 1 (as they are)."""
        if strength == 1:
            return self
        low, high = self.crop_scale
        names = ("jitter", "brightness", "contrast", "saturation", "hue", "grey", "blur")
        return replace(
            self,
            crop_scale=(1 - strength * (1 - low), 1 - strength * (1 - high)),
            **{name: strength * getattr(self, name) for name in names},
        )


@dataclass(frozen=True)
class Views(Section, prefix="views"):
    """Further crops of every image, besides its two views (multi-crop: Caron et al. 2020, section 3.4)."""

    local_crops: int = setting(0, ge=0, zero="none", help="Small crops of an image, each drawn to both of its views.")
    local_size: int = setting(
        0, ge=0, zero="half of data.image_size", used_by="views.local_crops", help="Side of the small crops in pixels."
    )
    local_scale: tuple[float, float] = setting(
        (0.05, 0.14), gt=0, le=1, used_by="views.local_crops", help="Range of a small crop's area as a share of the image's."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.local_scale
        self.require(low <= high, "local_scale", "the first number is the lower one; use low <= high.")


@dataclass(frozen=True)
class Batch(Section, prefix="batch"):
    """The global batch of one step; the share of a rank is derived from it."""

    global_size: int = setting(256, ge=2, help="Images of one step over all ranks; also the number of negatives.")
    micro_size: int = setting(
        0,
        ge=0,
        zero="all at once",
        hint="it divides the rows of a rank",
        help="Images that a rank encodes at a time, with all negatives kept (GradCache, Gao et al. 2021).",
    )
