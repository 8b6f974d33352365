"""Position embeddings of one image size, resampled for another.

# N positions of a grid and T extra tokens (class, distillation), C width, H attention heads.
"""

from __future__ import annotations

import math

import torch

_ABSOLUTE = ("pos_embed", "pos_embedding")  # (1, T + N, C), extra tokens first
_RELATIVE = ("relative_position_bias_table",)  # (N + T, H), extra tokens last; or (H, side, side)
_MOST_EXTRA = 8
Sides = tuple[int, int]


def resample(name: str, value: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, str] | None:
    """The position embedding `value` resampled to `shape`, and both grids in words; None if it is nothing of that kind."""
    kind = name.rpartition(".")[2]
    if kind in _ABSOLUTE and value.dim() == len(shape) == 3 and value.shape[2] == shape[2]:
        from timm.layers import resample_abs_pos_embed

        if (grids := _grids(value.shape[1], shape[1])) is None:
            return None
        old, new = grids
        extra = value.shape[1] - old**2
        return resample_abs_pos_embed(value, [new, new], [old, old], num_prefix_tokens=extra), _words(old, new)
    if kind in _RELATIVE and value.dim() == len(shape):
        from timm.layers import resize_rel_pos_bias_table_simple

        sides = _grids(value.shape[0], shape[0]) if value.dim() == 2 else (value.shape[2], shape[2])
        if sides is None or value.shape[-1 if value.dim() == 2 else 0] != shape[-1 if value.dim() == 2 else 0]:
            return None
        window = (sides[1] + 1) // 2  # a window of that side has 2 · side - 1 relative positions along it
        table = resize_rel_pos_bias_table_simple(value.float(), (window, window), tuple(shape))
        return table.to(value.dtype), _words(*sides)
    return None


def _grids(old: int, new: int) -> Sides | None:
    """The sides of two square grids with as many extra tokens beside each: the fewest that are possible."""
    for extra in range(_MOST_EXTRA + 1):
        sides = math.isqrt(max(0, old - extra)), math.isqrt(max(0, new - extra))
        if min(sides) and sides[0] ** 2 + extra == old and sides[1] ** 2 + extra == new:
            return sides
    return None


def _words(old: int, new: int) -> str:
    return f"{old}x{old} there, {new}x{new} here"
