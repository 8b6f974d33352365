"""Settings of the images: which, in which order, how they are augmented, how many at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from clae_dist.config.rules import NO_EFFECT, no_effect, require


@dataclass(frozen=True)
class Data:
    """Which shards, and in which order they are read."""

    # The folder that data_prep wrote, here or at http(s)://, s3://, gs://; or plain shards, several by "::":
    # x-{000000..000099}.tar, pipe:COMMAND. What is in it is checked by its digest instead.
    shards: str = no_effect("")
    # Further sets, and the share of every global batch that comes from each; data.shards has the rest, and is evaluated on.
    mixture: dict[str, float] = field(default_factory=dict, metadata=NO_EFFECT)
    train_split: str = "train"
    test_split: str = "test"
    image_size: int = 224  # pixels a side of each view
    streams: int = 0  # canonical streams; a multiple of every world size the run should work on; 0 chooses
    shuffle_shards: int = 8  # shards whose samples are shuffled together
    workers: int = no_effect(-1)  # loader processes a rank; -1 chooses from the cores of this machine
    verify: Literal["sha256", "size"] = no_effect("sha256")  # how shards of this machine are checked when a run starts
    cache: str = no_effect("")  # folder on this machine; shards from elsewhere lie in shards/ there; empty: the user's
    cache_bytes: int = no_effect(0)  # what it may hold, the least recently used goes first; 0: what the disk has, less 1 GiB
    prefetch_shards: int = no_effect(8)  # from elsewhere that a rank fetches ahead of need; 0: none
    timeout_s: float = no_effect(30.0)  # without a byte, after which a connection is cut and tried again
    retries: int = no_effect(8)  # of a fetch that gets no further, with growing pauses (a minute in all)
    # Images that cannot be decoded, for which others stand in, before a run ends: a share of all (below 1), or a number.
    max_bad: float = no_effect(0.001)
    # Files of a sample that come along with its image, as bytes (Batch.metadata): [json, txt]. They cost a look at the tar.
    metadata: tuple[str, ...] = no_effect(())

    def __post_init__(self) -> None:
        require(self.image_size >= 8, "data.image_size", self.image_size, "use at least 8 pixels.")
        require(self.streams >= 0, "data.streams", self.streams, "use 0 (automatic) or a divisor of batch.global_size.")
        require(self.shuffle_shards >= 1, "data.shuffle_shards", self.shuffle_shards, "use at least 1.")
        shares = list(self.mixture.values())  # without the names, which may be URLs with secrets
        require(all(0 < share < 1 for share in shares), "data.mixture", shares, "each share is above 0 and below 1.")
        rest = 1 - sum(shares)
        require(rest > 1e-9, "data.mixture", shares, f"the shares leave {rest:g} for data.shards: they must leave some.")
        require(self.max_bad >= 0, "data.max_bad", self.max_bad, "use 0 (none), a share below 1 or a number of images.")
        require(self.workers >= -1, "data.workers", self.workers, "use -1 (automatic), 0 (in the training process) or more.")
        for key in ("cache_bytes", "prefetch_shards", "retries"):
            require(getattr(self, key) >= 0, f"data.{key}", getattr(self, key), "use 0 or more.")
        require(self.timeout_s > 0, "data.timeout_s", self.timeout_s, "use a positive number of seconds, 30 as a rule.")


@dataclass(frozen=True)
class Augment:
    """SimCLR's augmentation (Chen et al. 2020, appendix A). Probabilities are per view."""

    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grey: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels

    def __post_init__(self) -> None:
        for key in ("flip", "jitter", "grey", "blur"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"augment.{key}", value, "a probability lies between 0 and 1.")
        for key in ("brightness", "contrast", "saturation"):
            require(getattr(self, key) >= 0, f"augment.{key}", getattr(self, key), "a strength is 0 or more.")
        require(0 <= self.hue <= 0.5, "augment.hue", self.hue, "hue shifts lie between 0 and 0.5 of the circle.")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "augment.crop_scale", self.crop_scale, "use 0 < low <= high <= 1.")
        low, high = self.crop_ratio
        require(0 < low <= high, "augment.crop_ratio", self.crop_ratio, "use 0 < low <= high.")
        low, high = self.blur_sigma
        require(0 < low <= high, "augment.blur_sigma", self.blur_sigma, "use 0 < low <= high, in pixels.")


@dataclass(frozen=True)
class Batch:
    """The batch of one step over all ranks; what a rank holds is derived from it."""

    global_size: int = 256
    # Images that a rank encodes at a time, with all negatives kept (GradCache, Gao et al. 2021); 0: its whole share.
    micro_size: int = 0

    def __post_init__(self) -> None:
        require(self.global_size >= 2, "batch.global_size", self.global_size, "a contrast needs at least 2 images.")
        require(self.micro_size >= 0, "batch.micro_size", self.micro_size, "use 0 (a rank's whole share) or a divisor of it.")
