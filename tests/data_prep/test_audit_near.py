"""The search for near hashes: the same pairs as comparing all with all, in bounded memory; the mirror is exact."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from data_prep.audit.hashing import mirrored, perceptual_hash
from data_prep.audit.near import near_pairs, popcount
from data_prep.audit.overlap import group_by, join_near
from data_prep.audit.scan import ROW


def all_pairs(hashes: np.ndarray, max_bits: int) -> set[tuple[int, int, int]]:
    """The reference: all with all."""
    found = set()
    for i in range(len(hashes)):
        for j in range(i + 1, len(hashes)):
            bits = (int(hashes[i]) ^ int(hashes[j])).bit_count()
            if bits <= max_bits:
                found.add((i, j, bits))
    return found


def planted(count: int, seed: int, copies: int, max_bits: int) -> np.ndarray:
    """Random hashes and behind them copies with 0 to max_bits + 1 bits flipped, in clusters, too."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, np.uint64)
    extra = []
    for number in range(copies):
        chosen = rng.choice(64, number % (max_bits + 2), replace=False).astype(np.uint64)
        flips = np.bitwise_or.reduce(np.uint64(1) << chosen, initial=np.uint64(0))
        extra.append(hashes[number // 3] ^ flips)
    return np.concatenate([hashes, np.array(extra, np.uint64)])


@pytest.mark.parametrize("max_bits", [0, 1, 4, 6, 9, 12])
def test_the_pairs_are_those_of_comparing_all_with_all(max_bits: int) -> None:
    hashes = planted(150, max_bits, 120, max_bits)
    found = [
        (min(a, b), max(a, b), bits)
        for batch in near_pairs(hashes, max_bits)
        for a, b, bits in zip(*(column.tolist() for column in batch), strict=True)
    ]
    assert set(found) == all_pairs(hashes, max_bits)
    assert len(found) == len(set(found))
    assert len(found) > 50


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_hashes(count: int) -> None:
    found = list(near_pairs(np.zeros(count, np.uint64), 6))
    assert sum(len(batch[0]) for batch in found) == (count == 2)


def test_two_hundred_thousand_hashes_in_bounded_memory() -> None:
    """Comparing all with all would hold or do 2e10 pairs."""
    hashes = planted(200_000, 0, 3000, 6)
    tracemalloc.start()
    pairs = {
        (min(a, b), max(a, b))
        for batch in near_pairs(hashes, 6)
        for a, b in zip(*(column.tolist() for column in batch[:2]), strict=True)
    }
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    planted_pairs = {(n // 3, 200_000 + n) for n in range(3000) if n % 8 <= 6}
    assert planted_pairs <= pairs
    assert peak < 120 * len(hashes)  # bytes: a dozen arrays of eight bytes a hash


def test_popcount_counts_bits() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    values[:3] = 0, 2**64 - 1, 1 << 63
    assert popcount(values).tolist() == [int(value).bit_count() for value in values]


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (333, 500), (31, 7)])
def test_the_hash_of_a_mirrored_image_is_the_mirrored_hash(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC))
    here, there = perceptual_hash(pixels), perceptual_hash(np.ascontiguousarray(pixels[:, ::-1]))
    assert here is not None
    assert there is not None
    assert bin(int(mirrored(np.array([here], np.uint64))[0]) ^ there).count("1") <= 2  # Pillow rounds while it shrinks


def test_one_colour_has_no_hash() -> None:
    assert perceptual_hash(np.full((40, 30, 3), 200, np.uint8)) is None


def test_many_alike_are_stopped_soon_and_in_bounded_memory() -> None:
    """40,000 hashes around four centres are 2e8 near pairs."""
    rng = np.random.default_rng(0)
    flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (40_000, 3)).astype(np.uint64), axis=1)
    hashes = np.unique(rng.integers(0, 2**64, 4, np.uint64)[rng.integers(0, 4, 40_000)] ^ flips)
    table = np.zeros(len(hashes), ROW)
    table["hash"], table["label"] = hashes, rng.integers(0, 2, len(hashes))
    groups = group_by(table["hash"], np.ones(len(hashes), bool), table, [0], alone=True)
    tracemalloc.start()
    samples = join_near(groups, hashes, 6, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not samples.complete
    assert len(samples.by_parts[0, 0].rows()) == 8
    assert peak < 60e6  # bytes; the pairs would be 5e9
