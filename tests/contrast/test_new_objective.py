"""The guide in clae_dist/methods/README.md, "Add an objective", followed to the letter in a copy of the checkout."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.processes import ROOT


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout with the objective of the guide."""
    guide = (ROOT / "clae_dist/methods/README.md").read_text().split("## Add an objective")[1].split("\n## ")[0]
    function, double_loop = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (path,) = re.findall(r"`(clae_dist/objectives/\w+\.py)`:", guide)
    assert "at the end of `tests/reference.py`" in guide
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("clae_dist", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / path).write_text(function)
    with (folder / "tests/reference.py").open("a") as file:
        file.write("\n\n" + double_loop)
    return folder


def run(folder: Path, *command: str) -> str:
    done = processes.run(sys.executable, "-m", *command, cwd=folder, env=processes.environment(PYTHONPATH=str(folder)))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_tests_take_a_new_objective(copy: Path) -> None:
    files = ("tests/contrast/test_objectives.py", "tests/contrast/test_parity.py")
    chosen = "test_objectives or margin_nt_xent"  # of the parity tests only the new objective's
    printed = run(copy, "pytest", *files, "-k", chosen, "-v", "-p", "no:cacheprovider")
    for test in (
        "test_value_and_gradient_equal_the_double_loop[0-0.05-log_sum_exp-margin_nt_xent]",
        "test_the_mean_over_ranks_is_the_loss_of_the_global_batch[margin_nt_xent]",
        "test_other_objectives[margin_nt_xent-log_sum_exp, 3 ranks]",
    ):
        assert f"{test} PASSED" in printed


@pytest.mark.slow
def test_parity_of_a_new_objective(copy: Path) -> None:
    printed = run(
        copy,
        *("clae_dist", "parity", "configs/quickstart.yaml", "--world-size", "2", "--rows", "2"),
        *("objective.name=margin_nt_xent", "model.norm=global", "data.image_size=16"),
    )
    assert "parity: passed" in printed
