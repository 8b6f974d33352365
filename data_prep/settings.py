"""Settings of a preparation and of a quarantine: everything that changes the shards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from clae_dist.data.decode import PILLOW_MAX_PIXELS
from clae_dist.errors import DataError


@dataclass(frozen=True)
class PrepareSettings:
    """Validated at construction; raises DataError. Another value of any of these is another set of shards."""

    other_input: ClassVar[str] = "the images are not the same files (names, sizes or times)"
    name: str
    source: str
    licence: str = "not stated"
    seed: int = 0
    test_share: float = 0.1  # of every class, where the folders do not say; 0: no test split
    shard_samples: int = 5000
    shard_bytes: int = 500_000_000
    max_pixels: int = 100_000_000
    min_side: int = 0  # of the shorter side, pixels; 0: any
    resize_short: int = 0  # pixels: larger images are made smaller and all become JPEGs; 0: bytes are kept as they are
    quality: int = 0  # of those JPEGs; 0: none are made

    def __post_init__(self) -> None:
        _require(bool(self.name.strip()), "--name", repr(self.name), "give the set a name.")
        _require(0 <= self.test_share < 1, "--test-share", self.test_share, "use 0 (no test split) up to, not including, 1.")
        _require(self.shard_samples >= 1, "--shard-samples", self.shard_samples, "use at least 1.")
        _require(self.shard_bytes >= 10_000, "--shard-bytes", self.shard_bytes, "use at least 10K.")
        limit = f"Pillow's limit against decompression bombs is {PILLOW_MAX_PIXELS}"
        _require(1 <= self.max_pixels <= PILLOW_MAX_PIXELS, "--max-pixels", self.max_pixels, f"use at least 1; {limit}.")
        _require(self.min_side >= 0, "--min-side", self.min_side, "use 0 (any size) or more.")
        _require(self.resize_short >= 0, "--resize", f"short={self.resize_short}", "use at least short=1.")
        if self.resize_short:
            _require(1 <= self.quality <= 95, "--quality", self.quality, "use 1 to 95, the range that JPEG libraries advise.")
        else:
            _require(not self.quality, "--quality", self.quality, "without --resize the images' bytes are kept: leave it out.")

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class QuarantineSettings:
    """Which of the listed images are bad, and what becomes of them. Other values are another set."""

    other_input: ClassVar[str] = "the set or the lists are not the same"
    below: float = 1.0  # of suspects: those whose label is believed less; 1: all that are listed
    recurring: bool = False  # images with a patch that is not known to be poison, too
    unlabel: bool = False  # suspects lose their label and stay

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _require(condition: bool, option: str, value: object, way_out: str) -> None:
    if not condition:
        raise DataError(f"{option} is {value}; {way_out}")
