"""Regions of an image: their features, their boxes and their pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clae_dist.config import Config, Data, Model, Objective, Train
from clae_dist.contrast.distributed import Contrast
from clae_dist.errors import ConfigError
from clae_dist.methods.dscl import DsclSettings, patch_boxes, patches_of
from clae_dist.models import build_model
from clae_dist.models.model import PretrainModel, check_model
from clae_dist.models.regions import region_features
from clae_dist.objectives.form import Rows
from clae_dist.world import World
from tests.methods.test_supcon import unit_rows

WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def model_of(encoder: str) -> PretrainModel:
    train = Train(precision="float64")
    return build_model(Config(model=Model(encoder=encoder, projector_dim=16), data=Data(image_size=32), train=train)).eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("encoder", ["small_resnet", "torchvision/resnet18", "timm/resnet18"])
def test_the_region_that_is_the_whole_image_has_its_embedding(encoder: str) -> None:
    model, x = model_of(encoder), images()
    found = model(x, boxes_BL4=WHOLE.expand(3, 2, 4))
    torch.testing.assert_close(found.view(3, 2, 16), model(x)[:, None].expand(3, 2, 16), atol=1e-10, rtol=0)


def test_a_region_is_the_mean_of_its_part_of_the_map() -> None:
    features = torch.arange(2 * 5 * 8 * 8, dtype=torch.float64).view(2, 5, 8, 8).sin()
    boxes = torch.tensor([[0.0, 0.5, 0.5, 1.0], [0.25, 0.0, 0.75, 0.5]], dtype=torch.float64).expand(2, 2, 4)
    expected = torch.stack([features[:, :, 4:, :4].mean((2, 3)), features[:, :, :4, 2:6].mean((2, 3))], 1)
    torch.testing.assert_close(region_features(features, boxes).view(2, 2, 5), expected, atol=1e-12, rtol=0)


def test_an_encoder_without_a_map_is_refused() -> None:
    """ConvNeXt normalises what it has pooled: a region's mean is no feature of it."""
    for encoder in ("timm/vit_tiny_patch16_224", "timm/convnext_atto"):
        with pytest.raises(ConfigError, match="model.encoder returns no mean of a map of features"):
            model_of(encoder)(images(), boxes_BL4=WHOLE.expand(3, 1, 4))


def test_the_encoder_is_checked_before_ranks_start() -> None:
    config = Config(method=DsclSettings(patches=2), model=Model(encoder="small_resnet"), data=Data(image_size=32))
    check_model(config)
    with pytest.raises(ConfigError, match="method.patches=0"):
        check_model(replace(config, model=Model(encoder="timm/vit_tiny_patch16_224")))


def test_boxes_are_in_the_view_with_areas_in_their_range() -> None:
    draws = torch.rand(500, 4 * 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    boxes = patch_boxes(draws, (0.05, 0.6))
    assert boxes.shape == (500, 5, 4)
    assert boxes.min() >= 0
    assert boxes.max() <= 1 + 1e-12
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    assert 0.05 - 1e-9 < (width * height).min() < 0.06
    assert 0.55 < (width * height).max() < 0.6 + 1e-9
    assert 3 / 4 - 0.2 < (width / height).min() < 0.9 < 1.1 < (width / height).max() < 4 / 3 + 0.2


def test_a_patch_has_the_pixels_of_its_box() -> None:
    x = images()
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.25, 1.0, 0.75]], dtype=torch.float64).expand(3, 2, 4)
    first, second = patches_of(x, boxes, 0.5)
    torch.testing.assert_close(first, x[:, :, :16, :16], atol=1e-12, rtol=0)
    torch.testing.assert_close(second, x[:, :, 8:24, 16:], atol=1e-12, rtol=0)
    (small,) = patches_of(x, WHOLE.expand(3, 1, 4), 0.5)
    torch.testing.assert_close(small, F.avg_pool2d(x, 2), atol=1e-12, rtol=0)


def test_shares_are_those_that_a_row_would_have_as_a_query() -> None:
    """A patch whose row is that of its region has the entropy of its shares as its loss, and no gradient."""
    contrast = Contrast(Objective(temperature=0.5), World.single("cpu"))
    rows, keys, queue = unit_rows(1, 4), unit_rows(2, 4), unit_rows(3, 6)
    of_keys = Rows(keys, keys)
    shares = contrast.shares(rows, of_keys, queue)
    torch.testing.assert_close(shares.sum(1), torch.ones(4, dtype=torch.float64))
    query = rows.clone().requires_grad_()
    loss = contrast.match(query, of_keys, queue, with_batch=False, index=slice(None), targets=shares)
    torch.testing.assert_close(loss.detach(), -(shares * shares.log()).sum(1).mean(), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(loss, query)
    assert gradient.abs().max() < 1e-12
    lone = contrast.match(query, of_keys, queue[:0], with_batch=False, index=slice(None), targets=torch.ones(4, 1).double())
    assert lone.item() == pytest.approx(0, abs=1e-12)  # no key has been written yet
