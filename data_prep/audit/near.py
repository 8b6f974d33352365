"""All pairs of 64-bit hashes that differ in at most k bits, without comparing all with all.

Cut the 64 bits into k + p bands: k differing bits spoil at most k bands, so that at least p bands agree. For every choice of
p bands, sort by their bits and compare only the hashes within a run of equal ones. More bands mean more sorting and shorter
runs; `_num_agreeing` weighs them. Work and memory are numpy's: a few arrays of the length of the input, no list of candidates.

Measured on one core: a million random hashes and their mirrored ones, k = 6: 21 s and 134 MB; the 60,000 of CIFAR-10 with
theirs, k = 8: 2 s. Images of one and the same hash have to be given once: n of them are n² / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb

import numpy as np

_BATCH = 1 << 16  # pairs handed on at once


def near_pairs(hashes: np.ndarray, max_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches (first, second, bits) of positions in `hashes` (uint64) and their distance; every pair once, in no order."""
    agreeing = _num_agreeing(len(hashes), max_bits)
    choices = list(combinations(_bands(max_bits + agreeing), agreeing))
    masks = [np.bitwise_or.reduce([band.mask for band in choice]) for choice in choices]
    waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for number, choice in enumerate(choices):
        for first, second in _same_key_pairs(hashes, choice, max_bits):
            differing = hashes[first] ^ hashes[second]
            known = np.zeros(len(first), bool)  # a pair that agrees in earlier bands was found there
            for earlier in masks[:number]:
                known |= (differing & earlier) == 0
            if not known.all():
                waiting.append((first[~known], second[~known], popcount(differing[~known])))
            if sum(len(batch[0]) for batch in waiting) >= _BATCH:
                yield _joined(waiting)
                waiting = []
    if waiting:
        yield _joined(waiting)


@dataclass(frozen=True)
class _Band:
    start: int
    bits: int

    @property
    def mask(self) -> np.uint64:
        return np.uint64(((1 << self.bits) - 1) << self.start)


def _bands(count: int) -> list[_Band]:
    bounds = [64 * band // count for band in range(count + 1)]
    return [_Band(a, b - a) for a, b in pairwise(bounds)]


def _same_key_pairs(hashes: np.ndarray, bands: Sequence[_Band], max_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs within max_bits among those that agree in these bands: each hash with its next neighbour in the sorted order,
    then with the second next, …, as long as runs of equal keys are that long."""
    # The key above, the position below, in one number: sorting numbers is several times faster than argsort.
    key_bits = min(32, sum(band.bits for band in bands))
    keys = np.zeros(len(hashes), np.uint64)
    for band in bands:
        keys = (keys << np.uint64(band.bits)) | ((hashes & band.mask) >> np.uint64(band.start))
    keys = np.sort(((keys & np.uint64((1 << key_bits) - 1)) << np.uint64(32)) | np.arange(len(hashes), dtype=np.uint64))
    order = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    keys >>= np.uint64(32)
    run_starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    lengths = np.diff(np.append(run_starts, len(keys)))
    run_ends = np.repeat(run_starts + lengths, lengths)
    del keys
    values = hashes[order]
    here, shift = np.arange(len(order)), 0
    while True:
        shift += 1
        here = here[run_ends[here] > here + shift]
        if not len(here):
            return
        close = here[popcount(values[here] ^ values[here + shift]) <= max_bits]
        if len(close):
            yield order[close], order[close + shift]


def popcount(values: np.ndarray) -> np.ndarray:
    """The number of set bits of each uint64 (numpy has one since 2.0 only): sums of 1, 2, 4, then 8 neighbouring bits."""
    values = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    values = (values & np.uint64(0x3333333333333333)) + ((values >> np.uint64(2)) & np.uint64(0x3333333333333333))
    values = (values + (values >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((values * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)


def _num_agreeing(num_hashes: int, max_bits: int) -> int:
    """p, the bands that have to agree: the least work, counted in comparisons (sorting one hash costs about ten)."""

    def work(agreeing: int) -> float:
        bands = max_bits + agreeing
        key_bits = 0.8 * 64 * agreeing / bands  # images are less evenly spread than random numbers
        return comb(bands, agreeing) * num_hashes * (10 + num_hashes / 2**key_bits / 2)

    return min(range(1, 5), key=work)


def _joined(batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second, bits = (np.concatenate(column) for column in zip(*batches, strict=True))
    return first, second, bits
