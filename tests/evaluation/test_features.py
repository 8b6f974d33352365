from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clae_dist.evaluation.features import Features, extract, extract_each, gather
from clae_dist.models import PretrainModel, build_model
from clae_dist.recipe import resolve


@pytest.fixture
def model() -> PretrainModel:
    return build_model(resolve(None, ["model.encoder=small_resnet", "data.image_size=16"])[0])


@pytest.fixture
def images(in_memory: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (37, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return in_memory(pixels, torch.arange(37) % 4)


def test_are_those_of_the_clean_route_in_evaluation_mode(model: PretrainModel, images: Any) -> None:
    for name, value in model.encoder.named_parameters():
        if "adversarial" in name:
            value.data.fill_(3.0)
    found = extract(model, images, "cpu", batch_size=10)
    with torch.no_grad():
        expected = model.eval().features(images.images / 255, route="clean")
    # Batch sizes differ, and with them the order of summation.
    torch.testing.assert_close(found.features_NF, expected, atol=1e-5, rtol=1e-5)
    assert found.features_NF.dtype == torch.float32
    assert found.labels_N.tolist() == images.labels.tolist()
    assert found.ids_N.tolist() == list(range(37))


def test_model_is_left_as_it_was(model: PretrainModel, images: Any) -> None:
    model.train()
    model.projector.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    extract(model, images, "cpu", batch_size=10)
    assert model.encoder.training
    assert not model.projector.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_modes_are_restored_when_reading_fails(model: PretrainModel) -> None:
    def broken(*_: int) -> Any:
        raise OSError("gone")

    model.train()
    with pytest.raises(OSError, match="gone"):
        extract(model, SimpleNamespace(batches=broken), "cpu", 10)  # type: ignore[arg-type]
    assert model.training


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_of_ranks_join_to_the_whole(model: PretrainModel, images: Any, size: int) -> None:
    """Five ranks and four batches: the last rank has nothing, and still takes part."""
    shares = [extract(model, images, "cpu", 10, rank, size) for rank in range(size)]

    class World:
        def gather_objects(self, value: Any) -> list[Any]:
            assert len(value) == 3
            return [tuple(t.numpy() for t in (s.features_NF, s.labels_N, s.ids_N)) for s in shares]

    whole, joined = extract(model, images, "cpu", 10), gather(shares[0], World())
    assert torch.equal(whole.features_NF, joined.features_NF)
    assert torch.equal(whole.labels_N, joined.labels_N)
    assert joined.ids_N.tolist() == list(range(37))


def test_two_models_in_one_pass_are_as_each_alone(model: PretrainModel, images: Any) -> None:
    other = build_model(resolve(None, ["model.encoder=small_resnet", "data.image_size=16", "seed=5"])[0])
    together = extract_each([model, other], images, "cpu", 10)
    for alone, features in zip((model, other), together, strict=True):
        assert torch.equal(extract(alone, images, "cpu", 10).features_NF, features.features_NF)
    assert not torch.equal(together[0].features_NF, together[1].features_NF)


def test_labelled_only_when_every_image_is(features_of: Callable[..., Features]) -> None:
    assert features_of(torch.ones(2, 1), [0, 1]).labelled
    assert not features_of(torch.ones(2, 1), [0, -1]).labelled
    assert not features_of(torch.ones(0, 1), []).labelled
