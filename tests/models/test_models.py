"""Encoders by name, and routes of norm layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clae_dist.config import Config, Data, Model
from clae_dist.errors import ConfigError
from clae_dist.methods.simclr import SimClr
from clae_dist.models import build_model
from clae_dist.models.encoders import build_encoder
from clae_dist.models.norms import (
    RoutedNorm,
    add_routes,
    random_layers,
    route_parameters,
    set_route,
    single_route_state,
    untouched_statistics,
)


def model_of(encoder: str, image_size: int = 32, **settings: object) -> nn.Module:
    return build_model(Config(data=Data(image_size=image_size), model=Model(encoder=encoder, projector_dim=8, **settings)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "encoder",
    ["small_resnet", "torchvision/resnet18", "timm/resnet10t", "timm/mobilenetv3_small_050", "timm/vit_tiny_patch16_224"],
)
def test_encoders_give_unit_rows(encoder: str) -> None:
    model = model_of(encoder).eval()
    z = model(torch.rand(2, 3, 32, 32), "adversarial")
    assert z.shape == (2, 8)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))
    assert model.features(torch.rand(2, 3, 32, 32)).shape == (2, model.feature_dim)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("timm/resnet5", "did you mean timm/resnet"),
        ("torchvision/resnet19", "did you mean torchvision/resnet"),
        ("resnet50", "use small_resnet, timm/NAME or torchvision/NAME, such as timm/resnet50"),
        ("small_resnet/x", "use small_resnet"),
    ],
)
def test_an_unknown_encoder_names_the_nearest(encoder: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(Model(encoder=encoder), 32)


@pytest.mark.parametrize("encoder", ["timm/resnet10t", "timm/vit_tiny_patch16_224", "timm/mobilenetv3_small_050"])
@pytest.mark.parametrize("key", ["drop_rate", "drop_path_rate"])
def test_drop_rates_reach_the_encoder(encoder: str, key: str) -> None:
    """Two forwards differ while training, and only then; without a rate they are the same."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 32, 32)
    for rate in (0.0, 0.5):
        model = model_of(encoder, **{key: rate})
        with torch.no_grad():  # residual branches of timm's ResNets start at 0
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.train()  # batch statistics are the same in both forwards
        assert torch.equal(model(images), model(images)) == (rate == 0)
        assert bool(random_layers(model)) == (rate > 0)
        model.eval()
        assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("encoder", "key", "message"),
    [
        ("small_resnet", "drop_rate", r"model.drop_rate is 0.1, but model.encoder is 'small_resnet'; use 0, or .* timm"),
        ("torchvision/resnet18", "drop_path_rate", "model.drop_path_rate is 0.1, but model.encoder is 'torchvision/resnet18'"),
        ("timm/vgg11", "drop_path_rate", "model.drop_path_rate is 0.1, which timm/vgg11 does not support; use 0, or"),
    ],
)
def test_a_drop_rate_without_effect_is_refused(encoder: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(Model(encoder=encoder, **{key: 0.1}), 32)  # type: ignore[arg-type]


def test_cifar_stem_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="defined for ResNets with one 7x7 convolution, not for timm/vit"):
        build_encoder(Model(encoder="timm/vit_tiny_patch16_224", stem="cifar"), 32)


def test_cifar_stem_keeps_the_resolution() -> None:
    small, _ = build_encoder(Model(encoder="torchvision/resnet18"), 32)
    large, _ = build_encoder(Model(encoder="torchvision/resnet18"), 224)
    assert small.conv1.stride == (1, 1)
    assert small.conv1.kernel_size == (3, 3)
    assert large.conv1.stride == (2, 2)


def test_a_linear_projector_is_one_layer_with_torchs_initial_weights() -> None:
    """The head of the paper's code for instance discrimination and UEL."""
    model = model_of("small_resnet", projector="linear")
    assert [(name, tuple(value.shape)) for name, value in model.projector.named_parameters()] == [  # type: ignore[union-attr]
        ("0.weight", (8, model.feature_dim)),
        ("0.bias", (8,)),
    ]
    bound = int(model.feature_dim) ** -0.5  # type: ignore[arg-type]
    assert 0.9 * bound < model.get_parameter("projector.0.weight").abs().max() <= bound
    images = torch.rand(4, 3, 32, 32)
    model.eval()
    wanted = model.features(images) @ model.get_parameter("projector.0.weight").T + model.get_parameter("projector.0.bias")  # type: ignore[operator]
    torch.testing.assert_close(model(images), F.normalize(wanted, dim=1))
    with pytest.raises(ConfigError, match=r"model.projector_hidden is 5; model.projector=linear has no hidden layer"):
        Model(projector="linear", projector_hidden=5)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first = model_of("small_resnet").state_dict()
    torch.manual_seed(123)  # the global generator has no say
    second = model_of("small_resnet").state_dict()
    other = build_model(
        Config(seed=1, data=Data(image_size=32), model=Model(encoder="small_resnet", projector_dim=8))
    ).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("origin", "gain"), [("library", 2.0), ("torch", 1 / 3)])
def test_initial_weights_of_a_convolution(origin: str, gain: float) -> None:
    """torchvision: N(0, 2 / fan-out); torch: uniform with variance 1 / (3 fan-in), as in the paper's code."""
    model = model_of("torchvision/resnet18", initial_weights=origin)
    for name in ("layer1.0.conv1", "layer4.1.conv2"):  # fan-in and fan-out are the same
        weight = model.encoder.get_submodule(name).weight  # type: ignore[operator, union-attr]
        fan = weight.shape[0] * 9
        torch.testing.assert_close(weight.var(), torch.tensor(gain / fan), rtol=0.05, atol=0)  # of 36,864 draws and more
    again = model_of("torchvision/resnet18", initial_weights=origin).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_routes_share_weights_but_not_norms() -> None:
    model = model_of("small_resnet")
    x = torch.rand(8, 3, 32, 32)
    clean, adversarial = model(x, "clean"), model(x, "adversarial")
    torch.testing.assert_close(clean, adversarial)  # both routes start equal
    for parameter in route_parameters(model, "adversarial"):
        nn.init.normal_(parameter)
    assert not torch.allclose(model(x, "clean"), model(x, "adversarial"))
    torch.testing.assert_close(model(x, "clean"), clean)


def test_a_route_touches_its_own_statistics_only() -> None:
    model = model_of("small_resnet").train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.rand(8, 3, 32, 32), "adversarial")
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed
    assert all(".adversarial." in name for name in changed)


def test_untouched_statistics_uses_batch_statistics_and_leaves_no_trace() -> None:
    model = model_of("timm/resnet10t").train()
    x = torch.rand(8, 3, 32, 32)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with untouched_statistics(model):
        inside = model(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    torch.testing.assert_close(model(x), inside)
    assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_simclr_without_attack_has_one_route() -> None:
    model = build_model(Config(data=Data(image_size=32), model=Model(encoder="small_resnet"), method=SimClr.Settings()))
    assert not any(isinstance(m, RoutedNorm) for m in model.modules())


@pytest.mark.parametrize("encoder", ["small_resnet", "timm/resnet10t"])
def test_single_route_state_loads_into_the_plain_encoder(encoder: str) -> None:
    model = model_of(encoder).eval()
    plain, _ = build_encoder(Model(encoder=encoder), 32)
    plain.load_state_dict(single_route_state(model.encoder.state_dict()), strict=True)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()((x - model.mean) / model.std).flatten(1), model.features(x))


def test_routes_then_global_statistics_keep_both() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert add_routes(encoder, 0.01) == 1
    set_route(encoder, "adversarial")
    assert isinstance(encoder[1], RoutedNorm)
    assert encoder[1].adversarial.momentum == 0.01
