"""Random numbers as a pure function of (seed, epoch, sample), without generator or state.

Every random choice about a sample's views and every permutation is made here, so that it does not depend on the rank or loader
process, nor on numpy's generators, which change between versions.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): 64 bits in, 64 well-mixed bits out."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashed(*parts: int | np.ndarray) -> np.ndarray:
    """Hash non-negative integers: one uint64 for each element of the broadcast `parts`."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        with np.errstate(over="ignore"):
            state = _mix(state * np.uint64(5) + _GOLDEN + np.asarray(part).astype(np.uint64))
    return state


def uniforms(count: int, *parts: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1), shape (n, count) for `parts` that broadcast to (n,)."""
    keys = hashed(*parts)[:, None]
    return (hashed(keys, np.arange(count)[None, :]) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(length: int, *parts: int) -> np.ndarray:
    """A permutation of 0 … length - 1, determined by `parts`."""
    return np.argsort(hashed(hashed(*parts), np.arange(length)), kind="stable")
