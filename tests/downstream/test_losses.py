"""The losses of the tasks against formulas written once more, in float64 on several ranks.

# N rows on all ranks, C classes, F feature width
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clae_dist.config import Attack, Batch, Config, Data, Model, Optim, Train
from clae_dist.config.method import MethodSettings
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import TrainingStep, pretrain_step
from clae_dist.downstream.adversarial import AdversarialSettings, divergence
from clae_dist.downstream.classify import ClassifySettings
from clae_dist.downstream.domain import DomainSettings
from clae_dist.errors import ConfigError
from clae_dist.models import build_model
from clae_dist.models.domain_head import MOST_PRODUCTS, DomainHead
from clae_dist.parity.observe import SyntheticRun
from clae_dist.world import World
from tests.ranks import RankPool

N, C = 12, 3
LABELS = torch.tensor([0, 1, 2, -1, 0, 0, 1, 2, 2, 1, 0, -1])


def settings(method: MethodSettings, **sections: Any) -> Config:
    defaults: dict[str, Any] = {
        "data": Data(image_size=16),
        "batch": Batch(global_size=N),
        "model": Model(encoder="small_resnet"),
        "optim": Optim(name="sgd", scaling="none", warmup_epochs=0),
        "train": Train(precision="float64", epochs=4),
    }
    return Config(method=method, **{**defaults, **sections})


def one_step(world: World, config: Config, step: int = 0) -> dict[str, Any]:
    """Terms of the loss (means over ranks), gradients, and the images of the attack, of one step with LABELS. Collective."""
    run = SyntheticRun(config, world)
    _warm_head(run)
    batch = run._batch(0)
    rows = len(batch.ids)
    batch = batch._replace(labels=LABELS[world.rank * rows : (world.rank + 1) * rows])
    found: dict[str, Any] = {}
    update = run.backend.update

    def keeping(loss: torch.Tensor | None = None) -> Any:
        found["grads"] = {name: value.clone() for name, value in run.backend.gradients().items()}
        return update(loss)

    run.backend.update = keeping  # type: ignore[method-assign]
    seen: list[TrainingStep] = []

    def watched(*given: Any) -> TrainingStep:
        seen.append(TrainingStep(*given))
        return seen[0]

    metrics = pretrain_step(run._run, batch, Moment(step, 1, config.train.epochs), watched)
    found["terms"] = {name: world.mean(value).item() for name, value in metrics.terms.items()}
    found["moved"] = [one.found.images for one in seen[0].attacks]
    found["views"] = batch.views
    return found


def _warm_head(run: SyntheticRun) -> None:
    """A head that is not zero, so that gradients reach the encoder."""
    head = run.backend.model.classifiers
    assert head is not None
    layer = head.classes if isinstance(head, DomainHead) else head
    assert isinstance(layer, torch.nn.Linear)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw, dtype=torch.float64))


def model_of(config: Config) -> Any:
    run = SyntheticRun(config, World.single("cpu"))
    _warm_head(run)
    return run.backend.model


@pytest.mark.parametrize("world_size", [1, 3])
def test_classify_is_the_weighted_cross_entropy(ranks: RankPool, world_size: int) -> None:
    config = settings(ClassifySettings(classes=C, balanced=True, class_counts=(6, 3, 1), smoothing=0.1))
    found = ranks.run(world_size, one_step, config)
    model = model_of(config)
    logits = model(torch.cat([one["views"][0] for one in found]), output="logits")
    log_p, expected = logits.log_softmax(1), logits.new_zeros(())
    for row, label in enumerate(LABELS.tolist()):
        if label >= 0:
            weight = 10 / (3 * (6, 3, 1)[label])
            expected = expected - weight * (0.9 * log_p[row, label] + 0.1 * log_p[row].mean()) / N
    expected.backward()
    for one in found:
        assert one["terms"]["clean"] == pytest.approx(expected.item(), abs=1e-12)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(one["grads"][name], parameter.grad, atol=1e-10, rtol=0)


def test_trades_is_the_cross_entropy_and_beta_times_the_divergence(ranks: RankPool) -> None:
    attack = Attack(name="pgd", epsilon=8 / 255, steps=2, random_start=True, statistics="running")
    config = settings(AdversarialSettings(classes=C, beta=2.0), attack=attack)
    found = ranks.run(2, one_step, config)
    model = model_of(config)
    x, moved = (torch.cat(parts) for parts in zip(*[(one["views"][0], one["moved"][0]) for one in found], strict=True))
    assert 0 < (moved - x).abs().max() <= 8 / 255 + 1e-12
    clean, attacked = model(x, output="logits"), model(moved, output="logits")
    p, q = clean.softmax(1), attacked.softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    log_p = clean.log_softmax(1)
    ce = -torch.stack([log_p[row, label] for row, label in enumerate(LABELS.tolist()) if label >= 0]).sum() / N
    (ce + 2 * kl).backward()
    for one in found:
        assert one["terms"] == {"clean": pytest.approx(ce.item()), "divergence": pytest.approx(kl.item())}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(one["grads"][name], parameter.grad, atol=1e-10, rtol=0)


def test_the_attack_of_trades_raises_the_divergence_that_random_noise_does_not() -> None:
    config = settings(
        AdversarialSettings(classes=C), attack=Attack(name="pgd", epsilon=0.1, steps=5, random_start=True, statistics="running")
    )
    found = one_step(World.single("cpu"), config)
    model, x = model_of(config).eval(), found["views"][0]
    noise = x + 0.1 * torch.sign(torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) - 0.5)
    clean, attacked, noisy = (model(images, output="logits") for images in (x, found["moved"][0], noise.clamp(0, 1)))
    assert divergence(clean, attacked) > 2 * divergence(clean, noisy)


def test_trades_from_the_image_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"attack\.random_start is false.*no gradient.*method\.form=at"):
        settings(AdversarialSettings(classes=C), attack=Attack(name="pgd", random_start=False))


def test_without_a_domain_weight_the_encoder_learns_from_the_source_alone(ranks: RankPool) -> None:
    """Bit for bit: the reversed gradient is zero, and the target has no other."""
    found = ranks.run(2, one_step, settings(DomainSettings(classes=C, domain_weight=0.0)), 3)
    full = ranks.run(2, one_step, settings(DomainSettings(classes=C, domain_weight=0.0, hidden=8)), 3)
    for name, gradient in found[0]["grads"].items():
        if name.startswith("encoder."):
            assert torch.equal(gradient, full[0]["grads"][name]), name
            assert gradient.any(), name
    assert any(value.any() for name, value in found[0]["grads"].items() if ".domain." in name)


@pytest.mark.parametrize("form", ["dann", "cdan", "cdan_e"])
@pytest.mark.parametrize("norms", ["joint", "separate"])
def test_the_reversed_gradient_is_minus_weight_times_the_domain_losss(ranks: RankPool, form: Any, norms: Any) -> None:
    """A float64 reference without any reversal: the gradients of both losses are taken apart and added with their signs."""
    method = DomainSettings(classes=C, form=form, norms=norms, rise=2.0)
    config = settings(method)
    found = ranks.run(3, one_step, config, 3)
    model = model_of(config)
    x = torch.cat([one["views"][0] for one in found])
    if norms == "joint":
        features = model.features(x, "clean")
        source, target = features[0::2], features[1::2]
    else:
        source, target = model.features(x[0::2], "clean"), model.features(x[1::2], "adversarial")
    head = model.classifiers
    log_p = head.classes(source).log_softmax(1)
    ce = -torch.stack([log_p[row, label] for row, label in enumerate(LABELS[0::2].tolist()) if label >= 0]).sum() / (N // 2)
    both = torch.cat([source, target])
    p = head.classes(both).softmax(1).detach()
    seen = both if form == "dann" else torch.stack([torch.outer(f, g).flatten() for f, g in zip(both, p, strict=True)])
    logit = head.domain(seen)[:, 0]
    of_source = torch.arange(N) < N // 2
    each = -torch.where(of_source, logit.sigmoid().log(), (-logit).sigmoid().log())
    if form == "cdan_e":
        entropy = -(p * p.log()).sum(1)
        weight = 1 + torch.exp(-entropy)
        each = each * weight / weight.mean()
    weight_now = 2 / (1 + math.exp(-2 * 3 / 4)) - 1
    trained = dict(model.named_parameters())
    by_class = torch.autograd.grad(ce, list(trained.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
    by_domain = torch.autograd.grad(each.mean(), list(trained.values()), allow_unused=True, materialize_grads=True)
    for one in found:
        assert one["terms"] == {"clean": pytest.approx(ce.item()), "domain": pytest.approx(each.mean().item())}
        for name, a, b in zip(trained, by_class, by_domain, strict=True):
            expected = a + b * (-weight_now if name.startswith("encoder.") else 1.0)
            torch.testing.assert_close(one["grads"][name], expected, atol=1e-10, rtol=0, msg=name)


def test_labels_of_the_target_change_nothing(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(DomainSettings(classes=C))
    before = one_step(World.single("cpu"), config, 2)
    monkeypatch.setitem(globals(), "LABELS", torch.where(torch.arange(N) % 2 == 1, (LABELS + 1) % C, LABELS))
    after = one_step(World.single("cpu"), config, 2)
    assert before["terms"] == after["terms"]


def test_many_products_are_projected_at_random_and_keep_their_inner_products() -> None:
    """(R_f f) ∘ (R_g g) / √d has the inner product (f·f')(g·g') in the mean (Long et al. 2018, theorem 1)."""
    torch.manual_seed(0)
    width, classes = 512, 10
    head = DomainHead(width, classes, 4, conditional=True).double()
    assert head.projects is (width * classes > MOST_PRODUCTS)
    f, g = F.normalize(torch.randn(2, width).double()), torch.randn(2, classes).double().softmax(1)
    f[1] = F.normalize(f[0] + 0.5 * f[1], dim=0)
    rows = (f @ head.of_features) * (g @ head.of_classes) / math.sqrt(1024)
    assert (rows[0] @ rows[1]).item() == pytest.approx(((f[0] @ f[1]) * (g[0] @ g[1])).item(), rel=0.3)


def test_an_odd_number_of_rows_is_refused() -> None:
    config = settings(DomainSettings(classes=C), batch=Batch(global_size=6))
    with pytest.raises(ConfigError, match="half of them from each domain"):
        config.rows_per_rank(2)


def test_the_head_starts_at_zero_and_the_encoder_as_pretrained() -> None:
    for method in (ClassifySettings(classes=C), DomainSettings(classes=C)):
        model = build_model(settings(method))
        logits = model(torch.rand(2, 3, 16, 16, dtype=torch.float64), output="logits")
        assert not logits[:, :C].any()
