"""What a user asks of a preparation: everything that changes what is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from clae_dist.data.decode import PILLOW_MAX_PIXELS
from clae_dist.data.manifest import DataError


@dataclass(frozen=True)
class Settings:
    """Validated at construction; raises DataError. Another value of any of these is another set of shards."""

    name: str
    source: str
    licence: str = "not stated"
    seed: int = 0
    test_share: float = 0.1  # of every class, where the folders do not say; 0: no test split
    shard_samples: int = 5000
    shard_bytes: int = 500_000_000
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        _require(bool(self.name.strip()), "--name", repr(self.name), "give the set a name.")
        _require(0 <= self.test_share < 1, "--test-share", self.test_share, "use 0 (no test split) up to, not including, 1.")
        _require(self.shard_samples >= 1, "--shard-samples", self.shard_samples, "use at least 1.")
        _require(self.shard_bytes >= 10_000, "--shard-bytes", self.shard_bytes, "use at least 10K.")
        limit = f"Pillow's limit against decompression bombs is {PILLOW_MAX_PIXELS}"
        _require(1 <= self.max_pixels <= PILLOW_MAX_PIXELS, "--max-pixels", self.max_pixels, f"use at least 1; {limit}.")

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _require(condition: bool, option: str, value: object, way_out: str) -> None:
    if not condition:
        raise DataError(f"{option} is {value}; {way_out}")
