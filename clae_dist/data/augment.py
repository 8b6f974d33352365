"""The rest of SimCLR's augmentation, batched on the device, with every sample's own parameters.

# n images, S side. Every choice comes from uniform numbers in [0, 1) (draws.py), AUGMENT_DRAWS an image: no generator.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from clae_dist.config import Augment

FLIP, JITTER, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SIGMA = range(10)
AUGMENT_DRAWS = 10
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # the jitter's four operations come in a random order
LUMA = (0.2989, 0.587, 0.114)


def augment(images_n3SS: torch.Tensor, draws: torch.Tensor, settings: Augment) -> torch.Tensor:
    """Flip, jitter, grey and blur float images in [0, 1]. Reference: Chen et al. 2020, appendix A.

    `draws` is (n, AUGMENT_DRAWS) on the CPU, so that the images of each operation are known without a synchronisation.
    """
    x = _where(draws[:, FLIP] < settings.flip, images_n3SS.flip(3), images_n3SS)
    x = _jitter(x, draws, settings)
    x = _where(draws[:, GREY] < settings.grey, _grey(x).expand_as(x), x)
    blurred = (draws[:, BLUR] < settings.blur).nonzero()[:, 0]
    if len(blurred):
        chosen = blurred.to(x.device)
        x = x.index_copy(0, chosen, _blur(x[chosen], blur_sigmas(draws[blurred], settings).to(x)))
    return x


def _where(chosen: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    return torch.where(chosen.to(no.device)[:, None, None, None], yes, no)


def _grey(x: torch.Tensor) -> torch.Tensor:
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _jitter(x: torch.Tensor, draws: torch.Tensor, settings: Augment) -> torch.Tensor:
    """Brightness, contrast, saturation and hue in each image's own random order, as torchvision's ColorJitter."""
    factors, order = jitter_factors(draws, settings), jitter_orders(draws)
    jittered = (draws[:, JITTER] < settings.jitter)[:, None]
    x = x.clone()
    # Each image gets each operation once, in its own order: four rounds of four disjoint groups.
    for turn in range(4):
        for operation, adjust in enumerate((_brightness, _contrast, _saturation, _hue)):
            group = (jittered[:, 0] & (order[:, turn] == operation)).nonzero()[:, 0]
            if len(group):
                chosen = group.to(x.device, non_blocking=True)
                x[chosen] = adjust(x[chosen], factors[operation, group].to(x).view(-1, 1, 1, 1))
    return x


def jitter_factors(draws: torch.Tensor, settings: Augment) -> torch.Tensor:
    """(4, n): factors of brightness, contrast and saturation, and the shift of the hue as a share of the circle."""
    return torch.stack(
        [
            _factor(draws[:, BRIGHTNESS], settings.brightness),
            _factor(draws[:, CONTRAST], settings.contrast),
            _factor(draws[:, SATURATION], settings.saturation),
            (2 * draws[:, HUE] - 1) * settings.hue,
        ]
    )


def jitter_orders(draws: torch.Tensor) -> torch.Tensor:
    """(n, 4): brightness, contrast, saturation and hue (0 to 3) in each image's order."""
    return _ORDERS[(draws[:, ORDER] * len(_ORDERS)).long()]


def _factor(draw: torch.Tensor, strength: float) -> torch.Tensor:
    low, high = max(0.0, 1 - strength), 1 + strength
    return low + draw * (high - low)


def _brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    mean = _grey(x).mean((2, 3), keepdim=True)
    return torch.lerp(mean, x, factor).clamp_(0, 1)


def _saturation(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.lerp(_grey(x).expand_as(x), x, factor.expand_as(x)).clamp_(0, 1)


def _hue(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rotate the hue by `shift` of the circle, which is 6 long. Reference: Smith 1978 (RGB to hue, saturation, value and back).

    Red is at 0, green at 2, blue at 4. The distance from red is linear in the channels, and green - blue has its direction.
    """
    red, green, blue = x.unbind(1)
    value, smallest = x.amax(1), x.amin(1)
    chroma = value - smallest
    distance = (green + blue - red - smallest).div_(chroma.clamp_min(1e-8)).add_(1)
    hue = distance.copysign_(green - blue).add_(6 * shift[:, :, 0])
    # A channel is value - chroma · clamp(min(k, 4 - k), 0, 1), k = (n + hue) mod 6, n = 5, 3, 1 for red, green, blue.
    k = (hue[:, None] + x.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)).remainder_(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def blur_sigmas(draws: torch.Tensor, settings: Augment) -> torch.Tensor:
    low, high = settings.blur_sigma
    return low + draws[:, SIGMA] * (high - low)


def blur_radius(side: int) -> int:
    return max(1, side // 20)


def _blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian, one sigma (pixels) an image, kernel a tenth of the side wide."""
    count, channels, height, width = x.shape
    radius = blur_radius(width)
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets[None, :] / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    padded = F.pad(x, [radius] * 4, mode="reflect").reshape(1, count * channels, height + 2 * radius, width + 2 * radius)
    across = F.conv2d(padded, kernel[:, None, None, :], groups=count * channels)
    return F.conv2d(across, kernel[:, None, :, None], groups=count * channels).reshape(x.shape)
