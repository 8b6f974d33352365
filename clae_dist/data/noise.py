"""Uniform noise for the attack's random start, as a pure function: equal on every rank and device."""

from __future__ import annotations

import torch


def uniform_noise(draws_BK: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """float32 in [0, 1), (B, *shape), from two or more uniform numbers a sample (loader.LoadedBatch.draws).

    SplitMix64 (Steele et al. 2014) of a counter, on the device.
    """
    first, second = (draws_BK[:, :2].double() * 2**24).long().to(device).unbind(1)
    seeds = (first << 24) | second
    count = torch.Size(shape).numel()
    z = _mix(seeds)[:, None] + torch.arange(count, device=device)[None, :] * -0x61C8864680B583EB  # 2^64 / golden ratio
    return ((_mix(z) >> 40) & 0xFFFFFF).float().mul_(2.0**-24).view(len(draws_BK), *shape)


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64; products of 64-bit integers wrap around."""
    z = (z ^ _shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shift(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, by: int) -> torch.Tensor:
    """Without the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
