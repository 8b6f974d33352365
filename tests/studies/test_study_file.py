"""Study files: what they may hold, and one readable line for what they may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ConfigError
from clae_dist.studies.cells import count_cells, plan_cells
from clae_dist.studies.study import read_study
from tests.studies.conftest import STUDY, WriteStudy

SHIPPED = Path(__file__).parents[2] / "configs" / "studies" / "cifar10.yaml"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("small.yaml", "no-such-recipe", "no-such-recipe"),
        ("seeds: [0, 1]", "seeds: [0, 1, 0]", "has 0 twice"),
        ("seeds: [0, 1]", "seeds: [0, one]", "'one' is not a number; expected an integer"),
        ("seeds: [0, 1]", "seeds: 3", "is not a list"),
        ("passes: 1000", "passes: 10, images: 3", "write exactly one of passes, epochs, seconds, images"),
        ("passes: 1000", "passes: -1", "use a positive number"),
        ("passes: 1000", "passes: nan", "use a positive number"),
        ("passes: 1000", "passes: 10", "too small for one step of method.name=simclr, which needs 144"),
        ("passes: 1000", "images: 23", "too small for one step"),
        ("  clae:", "  simclr:", "'simclr' is set twice"),
        ("name: tiny", "name: tiny\nevaluate: {suite: 'knn,lineer'}", "did you mean linear?"),
        ("name: tiny", "name: tiny\nevaluate: {set: {knn.nothing: 1}}", "knn.nothing"),
        ("name: tiny", "name: tiny\nset: {launch.launcher: torchrun}", "use launch.launcher=local or ray"),
        ("  clae:", "  ../clae:", "is not a plain name"),
        ("name: tiny", "name: tiny\nbaseline: moco", "is no method of it; use simclr, clae"),
        ("name: tiny", "nmae: tiny", "nmae in"),
        ("method.name: clae}", "method.name: clae, seed: 1}", "is set by the study for each cell"),
        ("method.name: clae}", "method.name: clae, attack.epsilom: 1}", "did you mean attack.epsilon?"),
        ("{set: {method.name: clae}}", "{select: {attack.epsilon: 1}}", "is not a list"),
        ("{set: {method.name: clae}}", "{select: {attack.epsilon: [1/255, 1/255]}}", "has 1/255 twice"),
        ("{set: {method.name: clae}}", "{set: {method.name: simclr, method.alpha: 1}}", "is not a key of method.name=simclr"),
    ],
)
def test_a_study_that_cannot_be_used(
    write_study: WriteStudy, capsys: pytest.CaptureFixture[str], old: str, new: str, words: str
) -> None:
    assert old in STUDY
    path = write_study(STUDY.replace(old, new))
    assert main(["study", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_methods_of_different_sets_are_refused(write_study: WriteStudy, tmp_path: Path) -> None:
    other = write_synthetic_set(tmp_path / "other", 60, 16, num_shards=1).folder
    path = write_study(STUDY.replace("method.name: clae}", f"method.name: clae, data.shards: {other}}}"))
    with pytest.raises(ConfigError, match=r"methods.clae .* trains on .* but methods.simclr on .* name one set"):
        plan_cells(read_study(path))


def test_settings_of_the_command_line_come_last(write_study: WriteStudy) -> None:
    plan = plan_cells(read_study(write_study(), ["model.projector_dim=8"]))
    assert [cell.recipe.config.model.projector_dim for cell in plan.cells if cell.recipe] == [8] * 4
    with pytest.raises(ConfigError, match="is set by the study"):
        read_study(write_study(), ["seed=4"])


def test_values_survive_as_they_were_written(write_study: WriteStudy) -> None:
    """A list, a fraction and a colour-like text reach the configuration of the cells unchanged."""
    settings = "method.name: clae, attack.epsilon: 8/255, augment: {crop_scale: [0.5, 1.0]}, tracking.experiment: 007"
    plan = plan_cells(read_study(write_study(STUDY.replace("method.name: clae", settings))))
    config = next(cell.recipe.config for cell in plan.cells if cell.recipe and cell.method == "clae")
    assert config.attack.epsilon == pytest.approx(8 / 255)
    assert config.augment.crop_scale == (0.5, 1.0)
    assert config.tracking.experiment == "007"


def test_cells_are_numbered_without_the_images(write_study: WriteStudy, shards: Manifest) -> None:
    """A Slurm script asks for --count before anything is there."""
    grid = STUDY.replace("{set: {method.name: clae}}", "{set: {method.name: clae}, select: {attack.epsilon: [1/255, 2/255]}}")
    study = read_study(write_study(grid))
    plan = plan_cells(study)
    assert count_cells(study) == len(plan.cells) == 2 + 4
    assert [cell.index for cell in plan.cells] == list(range(6))
    assert [(cell.method, cell.seed) for cell in plan.of("compare")] == [("simclr", 0), ("clae", 0), ("simclr", 1), ("clae", 1)]
    assert all(cell.seed == 2 for cell in plan.of("select"))  # none of the comparison's
    assert all(cell.recipe and cell.recipe.config.train.knn_every == 0 for cell in plan.of("select"))  # no test image
    assert [cell.recipe is None for cell in plan.of("compare")] == [False, True, False, True]


def test_choices_may_be_a_list(write_study: WriteStudy) -> None:
    """For settings whose combinations are not all of interest; a choice replaces what the method sets."""
    choices = "[{}, {attack.epsilon: 2/255}, {attack.epsilon: 1/255, method: {every: 4}}]"
    changed = STUDY.replace("set: {method.name: clae}}", f"set: {{method.name: clae, method.every: 2}}, select: {choices}}}")
    cells = plan_cells(read_study(write_study(changed))).of("select")
    configs = [cell.recipe.config for cell in cells if cell.recipe]
    assert [(round(255 * c.attack.epsilon, 3), c.method.every) for c in configs] == [(4, 2), (2, 2), (1, 4)]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"select has \{\} twice"):
        read_study(write_study(changed.replace(choices, "[{}, {}]")))


def test_the_shipped_study_is_valid() -> None:
    study = read_study(SHIPPED)
    assert [method.name for method in study.methods] == ["simclr", "clae", "clae_fused", "hcl", "rocl"]
    assert (study.baseline, study.seeds, study.budget.kind) == ("simclr", (0, 1, 2), "passes")


def test_a_cell_is_finished_when_it_has_every_protocol(write_study: WriteStudy) -> None:
    """A protocol that is added to a finished study is evaluated by the same command."""
    from tests.studies.test_study import finish

    plan = plan_cells(read_study(write_study()))
    finish(plan.cells[0], plan.manifest.digest, 40.0)
    assert plan.cells[0].done
    more = plan_cells(read_study(write_study(STUDY + "evaluate: {suite: 'knn,linear,geometry'}\n")))
    assert not more.cells[0].done
    assert more.cells[0].evaluation() is not None  # its results are in the table
