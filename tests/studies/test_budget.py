"""Equal budgets: encoder passes against a count of forwards, and the lengths that follow."""

from __future__ import annotations

import pytest

from clae_dist.bench.step import one_step
from clae_dist.bench.steps import Kind, make_images, prepare, variants
from clae_dist.config import Attack, Batch, Config, Views
from clae_dist.contrast.interface import Moment
from clae_dist.devices import local_device
from clae_dist.errors import ConfigError
from clae_dist.methods.clae import Clae
from clae_dist.methods.moco import MoCo
from clae_dist.methods.simclr import SimClr
from clae_dist.models.flops import flops_of
from clae_dist.studies.budget import Cost, steps_for_images, steps_for_seconds
from clae_dist.studies.cells import plan_cells
from clae_dist.studies.study import read_study
from tests.studies.conftest import STUDY, WriteStudy


def config_of(method: object, **attack: object) -> Config:
    return Config(method=method, attack=Attack(**attack), batch=Batch(global_size=24))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["plain", "original", "exact", "fused", "fused_half"])
def test_passes_are_the_operations_of_a_step(name: str) -> None:
    """The ratio of two methods' passes is that of the floating-point operations that torch counts, within 2 %.

    The projector and the loss, which are operations but not passes, are the rest.
    """
    kind = Kind("small", "small_resnet", 16, 24, "float32")
    device = local_device()
    images, compared = make_images(kind, device), variants(kind)
    flops = {one: flops_of(one_step(prepare(kind, compared[one], device), images)) for one in ("plain", name)}
    passes = {one: Cost.of(config_of(compared[one].method)).passes(1, 4) for one in ("plain", name)}
    assert flops[name] / flops["plain"] == pytest.approx(passes[name] / passes["plain"], rel=0.02)


def test_every_step_counts_the_terms_that_it_has() -> None:
    """total_units adds what the method does step by step: `present` decides in training, too."""

    class At:
        def __init__(self, step: int) -> None:
            self.moment = Moment(step, 4, 3.0)
            self.step = step

        def steps(self, epochs: float) -> int:
            return round(epochs * self.moment.steps_per_epoch)

    for settings in (
        Clae.Settings(every=3, start_epoch=0.5),
        Clae.Settings(fraction=0.5, every=2),
        Clae.Settings(alpha=0.0),
        Clae.Settings(start_epoch=9),
        MoCo.Settings(alpha=1.0, queue=24, every=2),
    ):
        without = 4 if isinstance(settings, MoCo.Settings) else 6
        counted = 0.0
        for step in range(13):
            assert settings.total_units(Attack(), step, 4) == pytest.approx(counted)
            counted += float(settings.units(Attack()) or 0) if settings.present(At(step)) else without  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [SimClr.Settings(), Clae.Settings(), Clae.Settings(every=3, start_epoch=1.0)])
@pytest.mark.parametrize("passes", [400, 1000, 12345])
def test_a_cell_spends_its_budget_and_no_step_more(method: object, passes: float) -> None:
    cost = Cost.of(config_of(method))
    steps = cost.steps_for(passes, 4)
    assert cost.passes(steps, 4) <= passes < cost.passes(steps + 1, 4)


def test_images_and_seconds() -> None:
    config = config_of(SimClr.Settings())
    assert steps_for_images(config, 24 * 7 + 23) == 7
    assert steps_for_seconds(config, 10.0, images_per_s=48.0) == 20
    with pytest.raises(ConfigError, match="too small for one step"):
        steps_for_seconds(config, 0.1, images_per_s=48.0)


def test_a_cost_that_is_not_counted_is_refused() -> None:
    config = Config(method=SimClr.Settings(), views=Views(local_crops=2))
    with pytest.raises(ConfigError, match=r"use budget.seconds or budget.images"):
        Cost.of(config)


def test_lengths_of_a_study(write_study: WriteStudy) -> None:
    """1,000 passes of 24 images: 6 steps of SimCLR (6 units), 3 of CLAE (11 units); the warm-up keeps its share of the run."""
    plan = plan_cells(read_study(write_study()))
    for cell in plan.cells:
        expected = 6 if cell.method == "simclr" else 3
        assert cell.recipe is not None
        config = cell.recipe.config
        assert cell.steps == expected == round(config.train.epochs * 4)
        assert config.optim.warmup_epochs / config.train.epochs == pytest.approx(0.5 / 6)
        assert cell.passes == expected * 24 * (6 if cell.method == "simclr" else 11)
    of_baseline = plan_cells(read_study(write_study(STUDY.replace("passes: 1000", "epochs: 2"))))
    assert of_baseline.passes == 2 * 4 * 24 * 6
    assert [cell.steps for cell in of_baseline.cells] == [8, 4, 8, 4]
    images = plan_cells(read_study(write_study(STUDY.replace("passes: 1000", "images: 100"))))
    assert [cell.steps for cell in images.cells] == [4] * 4


def test_seconds_need_a_measured_speed(write_study: WriteStudy) -> None:
    study = read_study(write_study(STUDY.replace("passes: 1000", "seconds: 2")))
    with pytest.raises(ConfigError, match="--measure` once"):
        plan_cells(study)
    plan = plan_cells(study, {"simclr": 48.0, "clae": 24.0})
    assert [cell.steps for cell in plan.cells] == [4, 2, 4, 2]
