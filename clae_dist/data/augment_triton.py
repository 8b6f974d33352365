"""The augmentation of augment.py for GPUs with Triton: two kernels for all views, with no intermediate image in memory.

The first kernel computes the mean grey that contrast needs, of the image as it is when contrast comes in its order. The second
reads uint8 pixels, computes everything else in registers, and writes the result. Its programs own tiles. Where an image is
blurred, a program computes the pixels around its tile as well, and blurs by two products: down_TC · (colours_CR · across_RT).

# n images, S side, P parameters. T side of a tile, R columns of the tile and its surroundings, C rows of these in one product.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels itself.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from clae_dist.config import Augment
from clae_dist.data.augment import (
    BLUR,
    FLIP,
    GREY,
    JITTER,
    LUMA,
    blur_radius,
    blur_sigmas,
    jitter_factors,
    jitter_orders,
)

_TILE = 32
_CHUNK = 16  # the least that tl.dot takes
_BLOCK = 2048  # pixels of which the first kernel computes the mean at once
_WARPS = 8  # with 4 the second kernel runs out of registers
_NOTHING = tl.constexpr(4)  # instead of an operation, for images without jitter

# Columns of the parameters: operations in their order, factors by operation, the turn of contrast, flip, grey, sigma or 0
_FACTOR = tl.constexpr(4)
_TURN = tl.constexpr(8)
_FLIPPED = tl.constexpr(9)
_GREYED = tl.constexpr(10)
_SIGMA = tl.constexpr(11)
_NUM_PARAMETERS = tl.constexpr(12)
_RED, _GREEN, _BLUE = map(tl.constexpr, LUMA)


def augment_fused(images_Vn3SS: torch.Tensor, draws_VnA: torch.Tensor, settings: Sequence[Augment]) -> torch.Tensor:
    """Augment V views of uint8 images, each with its settings, as augment.augment does in float32.

    The draws are on the CPU. Returns float32 images in [0, 1], (V, n, 3, S, S), contiguous.
    """
    images = images_Vn3SS.flatten(0, 1)
    side = images.shape[-1]
    radius = blur_radius(side)
    parameters_nP = torch.cat([_parameters(draws, one) for draws, one in zip(draws_VnA, settings, strict=True)])
    parameters_nP = parameters_nP.pin_memory() if images.is_cuda else parameters_nP
    parameters_nP = parameters_nP.to(images.device, non_blocking=True)
    means_n = torch.empty(len(images), device=images.device)
    augmented = torch.empty(images.shape, device=images.device)
    reach = triton.next_power_of_2(_TILE + 2 * radius)
    with torch.cuda.device_of(images):
        _grey_means[(len(images),)](images, parameters_nP, means_n, *images.stride(), side, BLOCK=_BLOCK, num_warps=_WARPS)
        _augment_tiles[(len(images), triton.cdiv(side, _TILE) ** 2)](
            images,
            parameters_nP,
            means_n,
            augmented,
            *images.stride(),
            side,
            radius,
            TILE=_TILE,
            REACH=reach,
            CHUNK=_CHUNK,
            num_warps=_WARPS,
        )
    return augmented.view(images_Vn3SS.shape)


def _parameters(draws: torch.Tensor, settings: Augment) -> torch.Tensor:
    """(n, P) float32, in the order of the columns above."""
    jittered = draws[:, JITTER, None] < settings.jitter
    orders = jitter_orders(draws)
    factors = jitter_factors(draws, settings).T * torch.tensor([1.0, 1.0, 1.0, 6.0])  # the circle of the hue is 6 long
    columns = [
        torch.where(jittered, orders, _NOTHING.value),
        factors,
        (orders == 1).int().argmax(1, keepdim=True),
        draws[:, FLIP, None] < settings.flip,
        draws[:, GREY, None] < settings.grey,
        torch.where(draws[:, BLUR] < settings.blur, blur_sigmas(draws, settings), 0.0)[:, None],
    ]
    return torch.cat([column.float() for column in columns], 1)


# ---- kernels ----


@triton.jit
def _grey_means(pixels, parameters, means, image_stride, channel_stride, row_stride, column_stride, side, BLOCK: tl.constexpr):
    """The mean grey of an image after the operations that precede contrast. A program an image."""
    image = tl.program_id(0).to(tl.int64)
    parameters += image * _NUM_PARAMETERS
    pixels += image * image_stride
    if tl.load(parameters) != _NOTHING:
        turns = tl.load(parameters + _TURN).to(tl.int32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, side * side, BLOCK):
            place = start + tl.arange(0, BLOCK)
            valid = place < side * side
            offsets = place // side * row_stride + place % side * column_stride
            red, green, blue = _load(pixels + offsets, channel_stride, valid)
            red, green, blue = _jitter(red, green, blue, parameters, 0.0, turns)
            total += tl.where(valid, _grey(red, green, blue), 0.0)
        tl.store(means + image, tl.sum(total) / (side * side))


@triton.jit
def _augment_tiles(
    pixels, parameters, means, augmented, image_stride, channel_stride, row_stride, column_stride, side, radius,
    TILE: tl.constexpr, REACH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of an image: its colours, blurred where the image is."""
    image = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(side, TILE)
    top, left = tl.program_id(1) // tiles * TILE, tl.program_id(1) % tiles * TILE
    parameters += image * _NUM_PARAMETERS
    pixels += image * image_stride
    mean = tl.load(means + image)
    sigma = tl.load(parameters + _SIGMA)
    tile = tl.arange(0, TILE)
    rows, columns = (top + tile)[:, None], (left + tile)[None, :]
    inside = (rows < side) & (columns < side)
    if sigma == 0.0:
        red, green, blue = _colours(
            pixels, parameters, mean, rows, columns, inside, channel_stride, row_stride, column_stride, side
        )
    else:
        scale = 1 / _sum_of_taps(sigma, radius, REACH)
        around = tl.arange(0, REACH)
        columns_around = (left - radius + around)[None, :]
        needed = (around < TILE + 2 * radius)[None, :] & (columns_around < side + radius)
        across_RT = _taps(around[:, None] - tile[None, :] - radius, sigma, radius) * scale
        red = tl.zeros((TILE, TILE), tl.float32)
        green = tl.zeros((TILE, TILE), tl.float32)
        blue = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, tl.minimum(TILE, side - top) + 2 * radius, CHUNK):
            chunk = start + tl.arange(0, CHUNK)
            rows_around = (top - radius + chunk)[:, None]
            valid = needed & (chunk < TILE + 2 * radius)[:, None] & (rows_around < side + radius)
            red_CR, green_CR, blue_CR = _colours(
                pixels, parameters, mean, _reflect(rows_around, side), _reflect(columns_around, side), valid,
                channel_stride, row_stride, column_stride, side,
            )  # fmt: skip
            down_TC = _taps(chunk[None, :] - tile[:, None] - radius, sigma, radius) * scale
            red = _blur(red_CR, across_RT, down_TC, red)
            green = _blur(green_CR, across_RT, down_TC, green)
            blue = _blur(blue_CR, across_RT, down_TC, blue)
    plane = side * side
    target = augmented + image * 3 * plane + rows * side + columns
    tl.store(target, red, inside)
    tl.store(target + plane, green, inside)
    tl.store(target + 2 * plane, blue, inside)


@triton.jit
def _colours(pixels, parameters, mean, rows, columns, valid, channel_stride, row_stride, column_stride, side):
    """Red, green and blue before the blur."""
    columns = tl.where(tl.load(parameters + _FLIPPED) != 0.0, side - 1 - columns, columns)
    red, green, blue = _load(pixels + rows * row_stride + columns * column_stride, channel_stride, valid)
    red, green, blue = _jitter(red, green, blue, parameters, mean, 4)
    if tl.load(parameters + _GREYED) != 0.0:
        red = _grey(red, green, blue)
        green = red
        blue = red
    return red, green, blue


@triton.jit
def _load(pixels, channel_stride, valid):
    red = tl.load(pixels, valid, 0).to(tl.float32) / 255
    green = tl.load(pixels + channel_stride, valid, 0).to(tl.float32) / 255
    blue = tl.load(pixels + 2 * channel_stride, valid, 0).to(tl.float32) / 255
    return red, green, blue


@triton.jit
def _jitter(red, green, blue, parameters, mean, turns):
    """The first `turns` operations of an image, in its order."""
    for turn in range(turns):
        operation = tl.load(parameters + turn).to(tl.int32)
        factor = tl.load(parameters + _FACTOR + operation, operation < _NOTHING, 0.0)
        if operation == 3:
            red, green, blue = _hue(red, green, blue, factor)
        elif operation < 3:  # factor · colour + (1 - factor) · another one: black, the mean grey or the pixel's grey
            other = tl.where(operation == 0, 0.0, tl.where(operation == 1, mean, _grey(red, green, blue)))
            red = _clamp(other + factor * (red - other))
            green = _clamp(other + factor * (green - other))
            blue = _clamp(other + factor * (blue - other))
    return red, green, blue


@triton.jit
def _grey(red, green, blue):
    return red * _RED + green * _GREEN + blue * _BLUE


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _hue(red, green, blue, shift):
    value = tl.maximum(tl.maximum(red, green), blue)
    smallest = tl.minimum(tl.minimum(red, green), blue)
    chroma = value - smallest
    distance = 1 + (green + blue - red - smallest) / tl.maximum(chroma, 1e-8)
    hue = tl.where(green < blue, -distance, distance) + shift
    return _channel(value, chroma, hue + 5), _channel(value, chroma, hue + 3), _channel(value, chroma, hue + 1)


@triton.jit
def _channel(value, chroma, place):
    place -= 6 * tl.floor(place / 6)
    return value - chroma * _clamp(tl.minimum(place, 4 - place))


@triton.jit
def _reflect(place, side):
    place = tl.abs(place)
    return tl.where(place >= side, 2 * (side - 1) - place, place)


@triton.jit
def _taps(offset, sigma, radius):
    return tl.where(tl.abs(offset) <= radius, tl.exp(-0.5 * (offset / sigma) * (offset / sigma)), 0.0)


@triton.jit
def _sum_of_taps(sigma, radius, REACH: tl.constexpr):
    return tl.sum(_taps(tl.arange(0, REACH) - radius, sigma, radius))


@triton.jit
def _blur(colours_CR, across_RT, down_TC, blurred_TT):
    return tl.dot(down_TC, tl.dot(colours_CR, across_RT, input_precision="ieee"), blurred_TT, input_precision="ieee")
