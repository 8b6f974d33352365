"""AdvCL's cross-entropy with pseudo-labels: against loops over images, over ranks and backends, and in whole runs.

N rows of the global batch, B = N / W a rank.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clae_dist.config import Attack, Batch, Config, Data, Model, Optim, Parallel, Train
from clae_dist.contrast.interface import Moment
from clae_dist.contrast.step import TrainingStep, pretrain_step
from clae_dist.data.manifest import Manifest
from clae_dist.deploy.export import export_encoder
from clae_dist.deploy.layout import WEIGHTS
from clae_dist.errors import ConfigError
from clae_dist.evaluation.kmeans import kmeans
from clae_dist.methods.advcl import AdvClSettings, cross_entropy
from clae_dist.models import build_model
from clae_dist.parallel import make_backend
from clae_dist.parity.observe import _keep_gradients
from clae_dist.recipe import resolve
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.pseudo_labels import read_pseudo_labels
from clae_dist.world import World
from tests import steps
from tests.methods.attacked import PGD, Pair, Tried, noise
from tests.methods.test_every_recipe import check
from tests.networks import small_model
from tests.ranks import RankPool
from tests.small_run import assert_same_weights, train_quietly, weights, whole_run
from tests.training.disturbed import train_on

BATCH = replace(PGD, statistics="untouched")  # batch statistics in the attack, as in AdvCL's code
METHOD = AdvClSettings(radius=2.0, pseudo_labels="somewhere")
COUNTS = METHOD.cluster_counts


def of_each(logits: torch.Tensor, labels: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """The cross-entropy as a loop over images and clusterings."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, clusters in zip(logits, labels.tolist(), strict=True):
        start = 0
        for count, cluster in zip(counts, clusters, strict=True):
            if cluster >= 0:
                own = row[start : start + count]
                total = total + own.exp().sum().log() - own[cluster]
            start += count
    return total / (len(logits) * len(counts))


def test_cross_entropy_is_the_mean_over_images_and_clusterings() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[0, 2], [1, -1], [-1, -1], [0, 0]])
    expected, found = of_each(logits, labels, (2, 3)), cross_entropy(logits, labels, (2, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    for gradients in zip(*(torch.autograd.grad(one, logits) for one in (found, expected)), strict=True):
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)
        assert not gradients[0][2].any(), "an image without labels"


def test_its_own_adversarial_images_value_and_gradient() -> None:
    tried, without = Tried(METHOD, BATCH), Tried(AdvClSettings(radius=2.0), BATCH)
    labels = tried.step.pseudo_labels
    assert labels[0].tolist() == [-1] * 5
    torch.testing.assert_close(tried.attacked[0], without.attacked[0], rtol=0, atol=0)
    torch.testing.assert_close(tried.terms["four_views"][1], without.terms["four_views"][1], rtol=0, atol=0)
    tried.step.total(tried.terms).backward()
    tried.step.run.encoding.backward(*tried.step.waiting())  # type: ignore[attr-defined]

    tried.model.load_state_dict(tried.before)
    at = (tried.third + PGD.epsilon * (2 * noise(0) - 1)).clamp(0, 1)
    for _ in range(PGD.steps):
        at = at.detach().requires_grad_()
        logits = tried.model(at, "classified", output="logits")
        (gradient,) = torch.autograd.grad(of_each(logits, labels, COUNTS), at)
        delta = (at - tried.third + PGD.step_size * gradient.sign()).clamp(-PGD.epsilon, PGD.epsilon)
        at = (tried.third + delta).clamp(0, 1)
    torch.testing.assert_close(tried.attacked[1], at.detach(), rtol=0, atol=1e-12)

    expected = of_each(tried.model(tried.attacked[1], "classified", output="logits"), labels, COUNTS)
    weight, value = tried.terms["pseudo_labels"]
    assert weight == 0.2
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    classifiers, routed = tried.model.classifiers, tried.model.encoder.norm.classified  # type: ignore[union-attr]
    assert classifiers is not None
    wanted = torch.autograd.grad(weight * expected, [*classifiers.parameters(), *routed.parameters()])
    for parameter, gradient in zip([*classifiers.parameters(), *routed.parameters()], wanted, strict=True):
        assert gradient.any()
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)


def test_without_weight_it_is_advcl_bit_for_bit() -> None:
    config = Config(method=replace(METHOD, pseudo_weight=0.0), model=Model(encoder="small_resnet"))
    plain = build_model(replace(config, method=AdvClSettings(radius=2.0))).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in build_model(config).state_dict().items())
    with_term = build_model(replace(config, method=METHOD)).state_dict()
    assert all(torch.equal(with_term[name], value) for name, value in plain.items()), "the same start but for the classifiers"
    tried, without = (Tried(method, BATCH) for method in (config.method, AdvClSettings(radius=2.0)))
    assert tried.terms.keys() == without.terms.keys()
    for one in (tried, without):
        one.step.total(one.terms).backward()
    for a, b in zip(tried.step.embeddings, without.step.embeddings, strict=True):
        assert a.z.grad is not None
        assert b.z.grad is not None
        assert torch.equal(a.z.grad, b.z.grad)


@pytest.mark.slow
def test_three_ranks_train_as_one_process(ranks: RankPool) -> None:
    """Others are in test_every_recipe.py."""
    check(ranks, "advcl, pseudo-labels", 3, "ddp")


@dataclass(frozen=True)
class Taken:
    """A step: the loss of the global batch, its gradients, and this rank's images x_ce."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    x_ce: torch.Tensor


def take_step(world: World, parallel: Parallel, norm: str, micro_size: int, epsilon: float = PGD.epsilon) -> Taken:
    """In float64, but under DeepSpeed in float32."""
    dtype = torch.float32 if parallel.backend == "deepspeed" else torch.float64
    config = Config(
        data=Data(image_size=8),
        batch=Batch(global_size=12, micro_size=micro_size),
        method=METHOD,
        attack=replace(BATCH, random_start=False, epsilon=epsilon),
        optim=Optim(name="sgd", warmup_epochs=0),
        train=Train(precision="float32" if dtype == torch.float32 else "float64"),
        parallel=parallel,
    )
    backend = make_backend(config, small_model(norm, 3, world.group, clusters=sum(COUNTS)).to(dtype), world)
    backend.model.train()
    batch = Pair([steps.share(world, steps.images(view, 12, 8, dtype)) for view in range(3)])
    batch.ids = steps.share(world, torch.arange(12))
    kept, taken = _keep_gradients(backend), []

    def watched(*arguments: Any) -> TrainingStep:
        taken.append(TrainingStep(*arguments))
        return taken[0]

    metrics = pretrain_step(steps.pretraining(config, world, backend), batch, Moment(), watched)
    return Taken(world.mean(metrics.loss), kept, taken[0].attacks[1].found.images)


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("norm", "world_size", "micro_size"), [("batch", 2, 0), ("batch", 3, 0), ("group", 2, 3), ("group", 1, 4)]
)
def test_ranks_take_the_step_of_one_process(ranks: RankPool, norm: str, world_size: int, micro_size: int, backend: Any) -> None:
    """Gradients are reduced with the last micro-batch: were it one that uses the classifiers alone, others would be lost."""
    one = take_step(World.single("cpu"), Parallel(), norm, 0)
    found = ranks.run(world_size, take_step, Parallel(backend=backend), norm, micro_size)
    torch.testing.assert_close(torch.cat([rank.x_ce for rank in found]), one.x_ce, rtol=0, atol=1e-12)
    for rank in found:
        torch.testing.assert_close(rank.loss, one.loss, rtol=0, atol=1e-12)
        assert rank.gradients.keys() == one.gradients.keys()
        for name, gradient in one.gradients.items():
            assert gradient.any(), name
            torch.testing.assert_close(rank.gradients[name], gradient, rtol=0, atol=1e-12)


# ---- the table ----


def test_kmeans_finds_separate_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(300) % 6
    rows = 8 * torch.randn(6, 4, generator=generator)[group] + 0.05 * torch.randn(300, 4, generator=generator)
    found = kmeans(rows, 6, 1)
    assert len({(int(a), int(b)) for a, b in zip(group, found, strict=True)}) == len(found.unique()) == 6
    assert torch.equal(found, kmeans(rows, 6, 1))


def test_kmeans_ends_where_rows_have_their_nearest_mean() -> None:
    rows = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = kmeans(rows, 7, 0)
    assert len(found.unique()) == 7
    means = torch.stack([rows[found == cluster].mean(0) for cluster in range(7)])
    assert torch.equal(torch.cdist(rows, means).argmin(1), found)
    assert kmeans(rows[:1].expand(5, 3), 3, 0).tolist() == [0] * 5, "equal rows are one cluster"
    assert len(kmeans(torch.cat([rows[:4], rows[:4]]), 6, 0).unique()) == 4


# ---- runs ----


@pytest.fixture(scope="module")
def source(ranks: RankPool, shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of another image size, which no test changes."""
    data = Data(shards=str(shards.folder), image_size=24, workers=0)
    config = whole_run(shards, tmp_path_factory.mktemp("source"), sections={"data": data}, epochs=1)
    assert train_quietly(World.single("cpu"), config) == "finished"
    return config


def run_of(shards: Manifest, folder: Path, source: Path, **train: Any) -> Config:
    sections = {
        "method": replace(METHOD, pseudo_labels=str(source)),
        "attack": Attack("pgd", steps=1, random_start=True),
        "data": Data(shards=str(shards.folder), image_size=16, workers=0),
    }
    return whole_run(shards, folder, 2, sections, **{"epochs": 1, "precision": "float64", **train})


@pytest.mark.slow
def test_a_lost_run_resumes_on_other_ranks_without_the_source(
    ranks: RankPool, shards: Manifest, source: Config, tmp_path: Path
) -> None:
    shutil.copytree(source.folder, tmp_path / "source")
    undisturbed, lost = (run_of(shards, tmp_path / name, tmp_path / "source") for name in ("undisturbed", "lost"))
    assert ranks.run(2, train_quietly, undisturbed) == ["finished"] * 2
    assert ranks.run(2, train_on, lost, 3) == ["lost"] * 2
    shutil.rmtree(tmp_path / "source")
    table = RunFolder(lost.folder).pseudo_label_table.read_bytes()
    again, other = tmp_path / "again", tmp_path / "other"
    for copy, world_size in ((again, 2), (other, 1)):
        shutil.copytree(lost.folder, copy)
        assert ranks.run(world_size, train_on, replace(lost, run_dir=str(copy))) == ["finished"] * world_size
        assert RunFolder(copy).pseudo_label_table.read_bytes() == table
    assert_same_weights(again, undisturbed.folder, 4)
    expected = weights(undisturbed.folder, 4)
    for name, value in weights(other, 4).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-8)  # float64 over two steps of Adam

    folder, count = RunFolder(undisturbed.folder), shards.num_samples("train")
    labels = read_pseudo_labels(folder, count, COUNTS)
    assert [len(column.unique()) for column in labels.T[:4]] == [2, 10, 50, min(100, count)]
    identity = folder.read_identity()
    assert identity.pseudo_labels["source"] == str(tmp_path / "source")
    assert identity.tags["pseudo_labels_digest"] == identity.pseudo_labels["digest"]
    exported = export_encoder(folder.path)
    assert not any("classif" in name for name in load_file(exported / WEIGHTS))
    assert json.loads((exported / "config.json").read_text())["pseudo_labels"] == identity.pseudo_labels


def test_a_source_that_changed_before_the_table_was_made(
    ranks: RankPool, shards: Manifest, source: Config, tmp_path: Path
) -> None:
    config = run_of(shards, tmp_path / "run", source.folder)
    assert train_quietly(World.single("cpu"), config) == "finished"
    folder = RunFolder(config.folder)
    damaged = bytearray(folder.pseudo_label_table.read_bytes())
    damaged[-1] ^= 1
    folder.pseudo_label_table.write_bytes(damaged)
    with pytest.raises(ConfigError, match="cannot be read .labels.safetensors has another sha256"):
        train_quietly(World.single("cpu"), config)
    shutil.rmtree(folder.pseudo_labels)
    with pytest.raises(ConfigError, match="is missing, with which this run was trained; restore it"):
        train_quietly(World.single("cpu"), config)  # other clusters would be learned from here on
    for checkpoint in folder.find_checkpoints():
        shutil.rmtree(checkpoint)
    identity = json.loads(folder.identity_file.read_text())
    identity["pseudo_labels"]["digest"] = "0" * 64
    folder.identity_file.write_text(json.dumps(identity))
    with pytest.raises(ConfigError, match="whose weights have changed since this run was begun"):
        train_quietly(World.single("cpu"), config)


def test_refused(ranks: RankPool, shards: Manifest, tmp_path: Path) -> None:
    config = run_of(shards, tmp_path / "run", tmp_path)
    with pytest.raises(ConfigError, match=r"method.pseudo_labels is .*which cannot be used: .*holds neither a run's"):
        train_quietly(World.single("cpu"), config)
    assert not RunFolder(config.folder).identity_file.exists()
    with pytest.raises(ConfigError, match="method.pseudo_labels"):
        resolve("cifar10/simclr", ["method.pseudo_labels=somewhere"])
