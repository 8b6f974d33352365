"""`model.init` with weights of another image size: position embeddings are resampled, and the run says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clae_dist.config import Config, Data, Model
from clae_dist.deploy.initial import resolve
from clae_dist.deploy.resample import resample
from clae_dist.errors import ConfigError
from clae_dist.models.encoders import build_encoder


def config_of(encoder: str, image_size: int, **model: Any) -> Config:
    return Config(data=Data(image_size=image_size), model=Model(encoder=encoder, **model))


def weights_at(encoder: str, image_size: int, path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    state = build_encoder(config_of(encoder, image_size).model, image_size)[0].state_dict()
    save_file(state, path)
    return state


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        *(
            pytest.param(
                f"timm/{name}",
                r"1 of them resampled to this image size \(pos_embed: 4x4 there, 2x2 here\)",
                marks=[] if name == "flexivit_small" else pytest.mark.slow,
            )
            for name in ("eva02_tiny_patch14_224", "cait_xxs24_224", "flexivit_small")
        ),
        pytest.param(
            "timm/swin_tiny_patch4_window7_224",
            r"10 of them resampled .*layers.1.blocks.0.*: 13x13 there, 7x7 here.* and 5 more",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_from_64_to_32_pixels(tmp_path: Path, encoder: str, words: str) -> None:
    """All tensors are loaded, those without a grid bit for bit, and the encoder computes with them."""
    path = tmp_path / "a.safetensors"
    source = weights_at(encoder, 64, path)
    initial = resolve(config_of(encoder, 32, init=str(path)))
    plain, _ = build_encoder(config_of(encoder, 32).model, 32)
    plain.load_state_dict(initial.weights, strict=True)
    assert initial.match.describe().startswith(f"{len(source)} tensors loaded; ")
    assert re.search(words, initial.match.describe())
    assert resolve(config_of(encoder, 64, init=str(path))).match.describe() == f"{len(source)} tensors loaded"
    same = [name for name in source if name not in initial.match.resampled]
    assert all(torch.equal(initial.weights[name], source[name]) for name in same)
    with torch.no_grad():
        assert plain.eval()(torch.rand(2, 3, 32, 32)).isfinite().all()


def ramp(side: int, width: int) -> torch.Tensor:
    """Positions of a grid whose value is their column's centre in (0, 1): (side², width)."""
    return ((torch.arange(side) + 0.5) / side).repeat(side, 1).reshape(-1, 1).repeat(1, width)


@pytest.mark.parametrize(
    ("name", "value", "shape"),
    [
        ("pos_embed", torch.cat([torch.full((1, 4), 9.0), ramp(8, 4)])[None], (1, 17, 4)),  # a class token
        ("blocks.0.pos_embed", torch.cat([torch.full((2, 4), 9.0), ramp(8, 4)])[None], (1, 18, 4)),  # and distillation
        ("encoder.pos_embedding", ramp(8, 4)[None], (1, 16, 4)),
        ("attn.relative_position_bias_table", torch.cat([ramp(13, 4), torch.full((3, 4), 9.0)]), (12, 4)),  # BEiT's three
        ("attn.relative_position_bias_table", ramp(13, 4), (9, 4)),
        ("rel_pos.relative_position_bias_table", ramp(13, 2).T.reshape(2, 13, 13).contiguous(), (2, 3, 3)),
    ],
)
def test_a_ramp_stays_a_ramp_and_extra_tokens_stay(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    result = resample(name, value, torch.Size(shape))
    assert result is not None
    table = result[0] if len(shape) == 3 and shape[0] == 2 else result[0].reshape(-1, 4).T
    assert result[0].shape == shape
    extra, grid = table[table == 9], table[table != 9].reshape(table.shape[0], -1)
    assert len(extra) == (value == 9).sum()
    side = int(grid.shape[1] ** 0.5)
    expected = ramp(side, 1).flatten()
    torch.testing.assert_close(grid, expected.expand_as(grid), atol=0.02, rtol=0)  # at the edges, bicubic bends a ramp


def test_other_shapes_are_not_resampled() -> None:
    assert resample("pos_embed", torch.ones(1, 17, 8), torch.Size((1, 5, 16))) is None
    assert resample("pos_embed", torch.ones(1, 18, 8), torch.Size((1, 40, 8))) is None
    assert resample("fc1.weight", torch.ones(16, 8), torch.Size((4, 8))) is None


def test_an_encoder_with_weights_for_each_position_is_refused_with_the_size_that_works(tmp_path: Path) -> None:
    """A mixer's layers have the number of patches as their width."""
    encoder = "timm/mixer_s16_224"
    weights_at(encoder, 64, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"24 of another shape .*init_missing=random"):
        resolve(config_of(encoder, 32, init=str(tmp_path / "a.safetensors")))


def test_published_weights_say_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **arguments: real(name, pretrained=False, **arguments))
    with pytest.raises(ConfigError, match="Use data.image_size=224, for which they were made, or model.init_missing=random"):
        resolve(config_of("timm/mixer_s16_224", 32, init="pretrained"))
    words = resolve(config_of("timm/flexivit_small", 32, init="pretrained")).match.describe()
    assert "1 of them resampled to this image size (pos_embed: 15x15 there, 2x2 here)" in words
