"""The augmentation of augment.py for GPUs: few kernels, one copy, and no host wait.

Brightness and the division by 255 are scales, and contrast, saturation, hue, grey and blur commute with scales. So an image is
kept without its scale, every clamp to [0, 1] becomes one to [0, 1 / scale], and brightness costs a smaller bound on the clamp
before it. The other three operations of the jitter have six orders. Images are sorted by them, so that the images of each
operation are neighbours: slices of the batch instead of indices.

# n images, S side, T taps of the blur. G groups: the six orders, and images without jitter.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clae_dist.config import Augment
from clae_dist.data.augment import (
    BLUR,
    FLIP,
    GREY,
    JITTER,
    LUMA,
    ORDER,
    blur_radius,
    blur_sigmas,
    jitter_factors,
    jitter_orders,
)
from clae_dist.devices import tf32

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_OPERATIONS = (_CONTRAST, _SATURATION, _HUE)
_GROUPS = ("SCH", "CHS", "CSH", "SHC", "HCS", "HSC")
_ALONE = len(_GROUPS)  # the group of images without jitter
_STAGES = (  # each with its first group, and the group after its last
    ("saturation", 0, 1),
    ("contrast", 0, 3),
    ("saturation", 2, 4),
    ("hue", 0, 6),
    ("saturation", 5, 6),
    ("contrast", 3, 6),
    ("last", 1, 5),  # saturation of CHS and HCS; the two groups between them have an identity here
)
_ALL_ORDERS = tuple(itertools.permutations(range(4)))
_GROUP_OF = torch.tensor([_GROUPS.index("".join("BCSH"[op] for op in order if op)) for order in _ALL_ORDERS])
_STARTS_BRIGHT = torch.tensor([order[0] == _BRIGHTNESS for order in _ALL_ORDERS])
_TINY = 1e-30  # a chroma of 0 has no hue, and shows none


@dataclass(frozen=True)
class _Parameters:
    """The parameters of n sorted images on their device, and where each group begins."""

    edges: list[int]
    integers: dict[str, torch.Tensor]
    numbers: dict[str, torch.Tensor]  # (n, k)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.numbers[name][:, :, None, None]


def augment_batched(
    images_Vn3SS: torch.Tensor, draws_VnA: torch.Tensor, settings: Sequence[Augment], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Augment V views, each with its settings, as augment.augment does. Returns images in [0, 1], (V, n, 3, S, S).

    `images_Vn3SS` are uint8, or floats in [0, 1]; the draws are on the CPU.
    """
    images = images_Vn3SS.flatten(0, 1)
    scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
    side = images.shape[-1]
    p = _to_device(*_parameters(draws_VnA, settings, scale, side), images.device, dtype)
    with tf32(allowed=False):
        i = p.integers
        x = torch.minimum(images[i["image"][..., None, None], i["channel"], i["row"], i["column"][:, None]], p["bound"])
        for operation, first, last in _STAGES:
            begin, end = p.edges[first], p.edges[last]
            if begin < end:
                part = _Parameters([], {}, {name: values[begin:end] for name, values in p.numbers.items()})
                _APPLY.get(operation, _matrix)(x[begin:end], part, operation)
        x = _mix_channels(p.numbers["mix"], x)[i["place"]]
        if len(i["blurred"]):
            x.index_copy_(0, i["blurred"], _blur(x[i["blurred"]], p.numbers["taps"]))
    return x.view(images_Vn3SS.shape)


# ---- parameters, on the CPU ----


def _parameters(
    draws_VnA: torch.Tensor, settings: Sequence[Augment], scale: float, side: int
) -> tuple[list[int], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Edges of the groups, integers, and float64 numbers (n, k) in the order of the groups; taps of blurred images alone."""
    columns = [_image_parameters(draws, one, scale, side) for draws, one in zip(draws_VnA, settings, strict=True)]
    numbers = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    groups = numbers.pop("group")[:, 0].long()
    order = groups.argsort(stable=True)
    edges = [0, *groups.bincount(minlength=_ALONE + 1).cumsum(0).tolist()]
    flipped = numbers.pop("flipped")[order].bool()
    taps, blurred = numbers.pop("taps"), numbers.pop("blurred")[:, 0].nonzero()[:, 0]
    numbers = {**{name: values[order] for name, values in numbers.items()}, "taps": taps[blurred]}
    forward = torch.arange(side)
    integers = {
        "image": order[:, None],
        "column": torch.where(flipped, forward.flip(0), forward)[:, None],
        "channel": torch.arange(3)[:, None, None],
        "row": forward[:, None],
        "place": order.argsort(),
        "blurred": blurred,
    }
    return edges, integers, numbers


def _image_parameters(draws: torch.Tensor, settings: Augment, scale: float, side: int) -> dict[str, torch.Tensor]:
    """Parameters of images with the same settings, (n, k) in float64, in the order of the draws."""
    bright, contrast, saturation, shift = jitter_factors(draws, settings).double()
    jittered = draws[:, JITTER] < settings.jitter
    orders = jitter_orders(draws)
    number = (draws[:, ORDER] * len(_ALL_ORDERS)).long()
    bright = torch.where(jittered, bright, 1.0).clamp_min(1e-13)  # an image of factor 0 is black: 1e-13 of its values
    place = orders.argsort(1)  # of each operation in the order
    after = place > place[:, :1]  # operations that follow brightness
    next_is_bright = place + 1 == place[:, :1]
    least = bright.clamp_min(1)
    # The largest stored value after an operation: 1 / scale, with the brightness that follows at once.
    bounds = torch.where(after, 1 / bright[:, None], torch.where(next_is_bright, 1 / least[:, None], 1.0)) / scale
    begins = torch.where(_STARTS_BRIGHT[number] & jittered, 1 / least, 1.0) / scale
    group = torch.where(jittered, _GROUP_OF[number], _ALONE)
    waits = (group == _GROUPS.index("CSH")) | (group == _GROUPS.index("SHC"))
    grey = (draws[:, GREY] < settings.grey).double()
    return {
        "group": group[:, None],
        "flipped": (draws[:, FLIP] < settings.flip)[:, None],
        "bound": begins[:, None],
        "zero": torch.zeros(len(draws), 1, dtype=torch.float64),
        "luma": torch.tensor([LUMA], dtype=torch.float64).expand(len(draws), 3),
        "contrast": contrast[:, None],
        "contrast_bound": bounds[:, _CONTRAST, None],
        "saturation": _towards_grey(saturation),
        "saturation_bound": bounds[:, _SATURATION, None],
        "last": _towards_grey(torch.where(waits, 1.0, saturation)),
        "last_bound": torch.where(waits, torch.inf, bounds[:, _SATURATION])[:, None],
        "hue_bound": bounds[:, _HUE, None],
        "shift": 6 * shift[:, None] + torch.tensor([6.0, 4.0, 2.0], dtype=torch.float64),
        "from_red": _FROM_RED.expand(len(draws), 6),
        "one": torch.ones(len(draws), 1, dtype=torch.float64),
        "mix": _towards_grey(1 - grey) * (scale * bright)[:, None],
        "blurred": (draws[:, BLUR] < settings.blur)[:, None],
        "taps": _taps(draws, settings, blur_radius(side)),
    }


_FROM_RED = torch.tensor([-1.0, 1, 1, 0, 1, -1], dtype=torch.float64)  # green + blue - red, green - blue


def _towards_grey(factor: torch.Tensor) -> torch.Tensor:
    """(n, 9): matrices of factor · x + (1 - factor) · grey(x)."""
    grey = torch.tensor([LUMA * 3], dtype=torch.float64)
    return factor[:, None] * torch.eye(3, dtype=torch.float64).view(1, 9) + (1 - factor)[:, None] * grey


def _taps(draws: torch.Tensor, settings: Augment, radius: int) -> torch.Tensor:
    """(n, T): Gaussians."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / blur_sigmas(draws, settings).double()[:, None]) ** 2)
    return weights / weights.sum(1, keepdim=True)


def _to_device(
    edges: list[int],
    integers: dict[str, torch.Tensor],
    numbers: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> _Parameters:
    """One copy of everything, from pinned memory to a GPU."""
    tensors = [*integers.values(), *(values.to(dtype) for values in numbers.values())]
    packed = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
    packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
    parts = packed.split([tensor.numel() * tensor.element_size() for tensor in tensors])
    there = [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    return _Parameters(
        edges,
        dict(zip(integers, there, strict=False)),
        dict(zip(numbers, there[len(integers) :], strict=True)),
    )


# ---- operations, on the device and in place ----


def _mix_channels(matrices_nk: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.bmm(matrices_nk.unflatten(1, (-1, 3)), x.flatten(2)).unflatten(2, x.shape[2:])


def _matrix(x: torch.Tensor, p: _Parameters, name: str) -> None:
    torch.clamp(_mix_channels(p.numbers[name], x), p["zero"], p[f"{name}_bound"], out=x)


def _contrast(x: torch.Tensor, p: _Parameters, name: str) -> None:
    mean = torch.bmm(p.numbers["luma"][:, None], x.mean((2, 3))[:, :, None])[..., None]
    torch.lerp(mean, x, p[name], out=x).clamp_(p["zero"], p["contrast_bound"])


def _hue(x: torch.Tensor, p: _Parameters, _: str) -> None:
    """As augment.augment; a channel is smallest + chroma · clamp(d - 1, 0, 1), d its distance from where it is smallest."""
    smallest, value = x.aminmax(dim=1, keepdim=True)
    chroma = (value - smallest).clamp_min_(_TINY)
    away, direction = _mix_channels(p.numbers["from_red"], x).split(1, 1)
    hue = torch.addcdiv(p["one"], away - smallest, chroma).copysign_(direction)
    distance = (hue + p["shift"]).remainder_(6).sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(smallest - chroma, chroma, distance, out=x)
    torch.minimum(x, p["hue_bound"], out=x)


_APPLY = {"contrast": _contrast, "hue": _hue}


def _blur(x: torch.Tensor, taps_nT: torch.Tensor) -> torch.Tensor:
    """Two products with each image's own band matrix. Each transposes the images, so that no copy is needed."""
    n, channels, side, _ = x.shape
    bands = _bands(side, taps_nT.shape[1] // 2, taps_nT.device, taps_nT.dtype)
    band_nSS = (taps_nT @ bands).view(n, side, side)
    columns_first = torch.bmm(band_nSS, x.flatten(1, 2).transpose(1, 2)).view(n, side * channels, side)
    return torch.bmm(columns_first, band_nSS.transpose(1, 2)).view(n, side, channels, side).permute(0, 2, 3, 1)


@functools.lru_cache(maxsize=8)
def _bands(side: int, radius: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(T, S · S): for each tap the 0/1 matrix of its pixels, reflected at the borders."""
    row, tap = torch.arange(side), torch.arange(2 * radius + 1)
    column = (row[None] + tap[:, None] - radius).abs()
    column = torch.where(column >= side, 2 * (side - 1) - column, column)
    bands = torch.zeros(len(tap), side, side, dtype=dtype)
    bands[tap[:, None], row[None], column] = 1
    return bands.flatten(1).to(device)
