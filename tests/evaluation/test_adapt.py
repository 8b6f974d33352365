"""Test-time adaptation: transport codes with known answers, and streams of batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clae_dist.errors import ConfigError
from clae_dist.evaluation.adaptation import (
    METHODS,
    Adapted,
    How,
    Method,
    Prototypes,
    class_means,
    entropy,
    norm_parameters,
    prototypes,
    transport_codes,
    transport_loss,
)
from clae_dist.evaluation.evaluate import evaluate_run
from clae_dist.evaluation.features import Features
from clae_dist.evaluation.suite import make_suite
from clae_dist.models import PretrainModel

UNIFORM = torch.full((4,), 0.25)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- codes ----


def test_codes_have_the_marginals() -> None:
    """Rows exactly; classes nearly after three rounds, and closer with more."""
    logits = rows(200, 4)
    for marginal in (UNIFORM, torch.tensor([0.55, 0.25, 0.15, 0.05])):
        off = []
        for rounds in (1, 3, 100):
            codes = transport_codes(logits, marginal, 0.7, rounds)
            torch.testing.assert_close(codes.sum(1), torch.ones(200).double())
            off.append(float((codes.mean(0) / marginal - 1).abs().max()))
        assert off[0] > off[1] > off[2]
        assert off[1] < 0.1
        assert off[2] < 1e-6


def test_codes_between_uniform_and_an_assignment() -> None:
    logits = rows(8, 4)
    torch.testing.assert_close(transport_codes(logits, UNIFORM, 1e6, 50), torch.full((8, 4), 0.25).double(), atol=1e-4, rtol=0)
    sharp = transport_codes(logits, UNIFORM, 0.01, 5000)
    assert float(sharp.amax(1).min()) > 0.99
    assert sharp.round().sum(0).tolist() == [2, 2, 2, 2]


def test_codes_of_large_logits_are_finite_and_have_no_gradient() -> None:
    """exp(100 / 0.7) overflows float32."""
    logits = (100 * rows(20, 4)).requires_grad_()
    codes = transport_codes(logits, UNIFORM, 0.7)
    assert codes.isfinite().all()
    assert not codes.requires_grad
    torch.testing.assert_close(codes, transport_codes(logits + 50, UNIFORM, 0.7))


def test_a_batch_of_one_class_exposes_the_marginal() -> None:
    """Under equal shares most rows of one class are given to the others; under the predicted shares few are."""
    logits = torch.tensor([4.0, 0.0, 0.0, 0.0]) + 0.1 * rows(40, 4)
    for marginal, least, most in ((UNIFORM, 8, 12), (logits.softmax(1).mean(0), 36, 40)):
        assert least <= int((transport_codes(logits, marginal, 0.01, 1000).argmax(1) == 0).sum()) <= most


def test_losses_are_those_of_the_definitions() -> None:
    logits, codes = rows(5, 4), rows(5, 4, seed=1).softmax(1)
    p = logits.double().softmax(1)
    assert float(transport_loss(logits.double(), codes)) == pytest.approx(
        -sum(float(codes[i, c] * p[i, c].log()) for i in range(5) for c in range(4)) / 5
    )
    assert float(entropy(logits)) == pytest.approx(float(torch.distributions.Categorical(probs=p).entropy().mean()), rel=1e-5)


def test_a_rotation_of_features_and_centroids_changes_nothing() -> None:
    bank, query = rows(60, 6), rows(20, 6, seed=1)
    labels = torch.arange(60) % 4
    rotation = torch.linalg.qr(rows(6, 6, seed=2).double()).Q.float()
    codes = []
    for turn in (torch.eye(6), rotation):
        turned = Features(bank @ turn, labels, torch.arange(60))
        codes.append(transport_codes(prototypes(turned, class_means(turned, 4)).logits(query @ turn)[0], UNIFORM, 0.7))
    torch.testing.assert_close(codes[0], codes[1], rtol=1e-3, atol=1e-5)


def test_the_scale_fits_the_labels_of_the_bank() -> None:
    """Clear classes take a large one, labels at random the smallest."""
    labels = torch.arange(200) % 4
    clear = Features(5 * torch.eye(4)[labels] + 0.1 * rows(200, 4), labels, torch.arange(200))
    noise = Features(rows(200, 4), labels, torch.arange(200))
    assert prototypes(clear, class_means(clear, 4)).scale > 30
    assert prototypes(noise, class_means(noise, 4)).scale < 3


# ---- streams ----


class _Net(nn.Module):
    """Mean colours after a norm layer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x).mean((2, 3))


def model_with(norm: nn.Module) -> PretrainModel:
    return PretrainModel(_Net(norm), 3, nn.Sequential(), 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).eval()


AXES = Prototypes(torch.full((3,), 0.5), torch.eye(3)[None] - 1 / 3, 10.0)


def coloured(labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Noisy images in which the channel of the class is brighter."""
    noise = torch.rand((len(labels), 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    return (0.5 * noise + 0.2 * torch.eye(3)[labels][:, :, None, None] + 0.15).clamp(0, 1)


def accuracy(method: Method, how: How, model: PretrainModel, batches: list[torch.Tensor], labels: torch.Tensor) -> float:
    adapted, source = Adapted(model, AXES, method, how), Adapted(model, AXES, "source", how)
    found = [adapted.predict(batch, source.probabilities(batch).mean(0)) for batch in batches]
    return float(torch.stack([(one == labels).double().mean() for one in found]).mean())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.GroupNorm(1, 3)])
def test_without_a_step_nothing_is_learnt(norm: nn.Module) -> None:
    """Learning rate 0: TENT and codes are batch statistics, and where there are none, no adaptation at all."""
    labels = torch.arange(30) % 3
    model, batches = model_with(norm), [coloured(labels, seed) for seed in range(3)]
    found = {method: accuracy(method, How(learning_rate=0), model, batches, labels) for method in METHODS}
    assert found["tent"] == found["ot"] == found["bn"]
    if isinstance(norm, nn.GroupNorm):
        assert found["bn"] == found["source"]


def test_batch_statistics_undo_a_shift_and_steps_undo_more() -> None:
    """Images too blue for the running statistics; then a scale of the norm layer that is wrong for one channel."""
    labels = torch.arange(60) % 3
    tint = torch.tensor([0.0, 0.0, 0.3])[:, None, None]
    batches = [coloured(labels, seed) * 0.7 + tint for seed in range(20)]
    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.full((3,), 0.45), torch.full((3,), 0.03)
    model = model_with(norm)
    source, bn = (accuracy(method, How(), model, batches, labels) for method in ("source", "bn"))
    assert bn > source + 0.2
    torch.nn.init.constant_(norm.weight, 1.0)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([0.9, 0.0, 0.0]))
    wrong = accuracy("bn", How(), model, batches, labels)
    assert accuracy("ot", How(learning_rate=0.05), model, batches, labels) > wrong + 0.1


def test_the_encoder_itself_stays_and_only_norm_layers_move() -> None:
    model = model_with(nn.BatchNorm2d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in METHODS:
        adapted = Adapted(model, AXES, method, How(learning_rate=0.1))
        adapted.predict(coloured(torch.arange(6) % 3), torch.full((3,), 1 / 3))
        moved = [name for name, value in adapted._model.state_dict().items() if not torch.equal(value, before[name])]
        assert moved == (["encoder.norm.weight", "encoder.norm.bias"] if method in ("tent", "ot") else [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(norm_parameters(model.encoder)) == 2


# ---- the protocol ----

SMALL = ["adapt.images=12", "adapt.batch=5", "adapt.kinds=[contrast]"]


def run_protocol(run: Path, *overrides: str) -> dict[str, Any]:
    content = evaluate_run(run, lambda _: None, suite=make_suite("adapt", [*SMALL, *overrides]))
    return {name: pair["after"] for name, pair in content["results"]["adapt"].items()}


def test_centroids_of_a_file(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Two templates for each of the three classes; files that do not fit are refused with the shape that does."""
    run, file = make_run(), tmp_path / "texts.safetensors"
    found = run_protocol(run)
    assert found["accuracy"] == found["ot_accuracy"]
    save_file({"centroids": torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 256)).astype(np.float32))}, file)
    assert run_protocol(run, f"adapt.centroids={file}")["source_accuracy"] != found["source_accuracy"]
    save_file({"centroids": torch.zeros(3, 7)}, file)
    with pytest.raises(ConfigError, match=r"has the shape \(3, 7\); this encoder and set need finite values of"):
        run_protocol(run, f"adapt.centroids={file}", "adapt.seeds=2")
    save_file({"other": torch.zeros(3, 7)}, file)
    with pytest.raises(ConfigError, match="cannot be read as a safetensors file with a tensor `centroids`"):
        run_protocol(run, f"adapt.centroids={file}", "adapt.seeds=2")
