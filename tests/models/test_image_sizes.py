"""Encoders that timm makes for one image size: they are made for the run's size, or the settings are refused before any rank
starts. They ended in a bare AssertionError."""

from __future__ import annotations

import pytest
import timm
import torch

from clae_dist.config import Config
from clae_dist.errors import ConfigError
from clae_dist.models import build_model, check_model
from clae_dist.models.encoders import library_arguments
from clae_dist.recipe import resolve


def config_of(encoder: str, image_size: int) -> Config:
    return resolve(None, [f"model.encoder={encoder}", f"data.image_size={image_size}", "model.norm=local"])[0]


@pytest.mark.parametrize(
    ("encoder", "image_size"),
    [
        pytest.param("swin_tiny_patch4_window7_224", 64, marks=pytest.mark.slow),
        ("eva02_tiny_patch14_224", 56),
        pytest.param("cait_xxs24_224", 64, marks=pytest.mark.slow),
        pytest.param("flexivit_small", 48, marks=pytest.mark.slow),
    ],
)
def test_an_encoder_of_fixed_size_is_made_for_the_run_s_size(encoder: str, image_size: int) -> None:
    model = build_model(config_of(f"timm/{encoder}", image_size))
    images = torch.rand(2, 3, image_size, image_size, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    assert gradient.abs().sum() > 0
    # An export is loaded with these arguments: the same shapes.
    arguments = library_arguments("timm", encoder, image_size)
    assert arguments == {"img_size": image_size}
    with torch.device("meta"):
        again = timm.create_model(encoder, num_classes=0, **arguments)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape
        for name, value in model.encoder.state_dict().items()
        if "routes" not in name and "adversarial" not in name
    }


@pytest.mark.parametrize("image_size", [32, *(pytest.param(size, marks=pytest.mark.slow) for size in (64, 96))])
@pytest.mark.parametrize(
    "encoder",
    [
        "swin_tiny_patch4_window7_224",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("beit_base_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224", "flexivit_small")
        ),
    ],
)
def test_each_family_takes_small_images(encoder: str, image_size: int) -> None:
    check_model(config_of(f"timm/{encoder}", image_size))


@pytest.mark.parametrize(
    "encoder",
    [
        "levit_128s",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("beit_base_patch16_224", "swinv2_tiny_window8_256", "mixer_s16_224")
        ),
    ],
)
def test_others_are_checked_without_memory_for_their_weights(encoder: str) -> None:
    check_model(config_of(f"timm/{encoder}", 128))


def test_what_takes_its_own_size_needs_no_argument_and_draws_the_same_weights() -> None:
    assert library_arguments("timm", "swin_tiny_patch4_window7_224", 224) == {}
    assert library_arguments("timm", "resnet18", 64) == {}
    config = config_of("timm/cait_xxs24_224", 64)
    first, second = (build_model(config).state_dict() for _ in range(2))  # the first alone tries arguments
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("encoder", "image_size", "way_out"),
    [
        pytest.param(
            "timm/efficientformer_l1", 64, "use data.image_size=224, or an encoder for any size", marks=pytest.mark.slow
        ),
        ("torchvision/vit_b_16", 100, "use data.image_size=224, or"),
        pytest.param("torchvision/maxvit_t", 128, "use data.image_size=224, or", marks=pytest.mark.slow),
    ],
)
def test_a_size_that_an_encoder_does_not_take(encoder: str, image_size: int, way_out: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"data\.image_size is {image_size}, which model\.encoder {encoder} does not support \(.+\); {way_out}",
    ):
        check_model(config_of(encoder, image_size))
