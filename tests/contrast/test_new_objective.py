"""README's "Changing the objective", done to the letter in a copy of the checkout, whose tests must pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Decoupled contrastive loss (Yeh et al. 2022), one direction: the positive is not among the columns.
DENSE = '''
def decoupled(a: Rows, b: Rows, start: int, temperature: float, chunk: int = 0) -> torch.Tensor:
    """A dense loss: (B, N) similarities at once."""
    s_BN = at_least_float32(a.mine) @ at_least_float32(b.all).T / temperature
    rows = torch.arange(len(s_BN), device=s_BN.device)
    others = s_BN.index_put((rows, start + rows), s_BN.new_tensor(float("-inf")))
    return (others.logsumexp(1) - s_BN[rows, start + rows]).mean()
'''
DOUBLE_LOOP = """
def decoupled(a_ND: torch.Tensor, b_ND: torch.Tensor, temperature: float) -> torch.Tensor:
    total = a_ND.new_zeros(())
    for i in range(len(a_ND)):
        others = [torch.exp((a_ND[i] * b_ND[j]).sum() / temperature) for j in range(len(b_ND)) if j != i]
        total = total + torch.log(sum(others)) - (a_ND[i] * b_ND[i]).sum() / temperature
    return total / len(a_ND)
"""


def insert(path: Path, before: str, text: str) -> None:
    content = path.read_text()
    assert content.count(before) == 1, f"{path} holds {before!r} {content.count(before)} times"
    path.write_text(content.replace(before, f"{text.strip()}\n\n\n{before}"))


def add_name(path: Path, pattern: str, entry: str) -> None:
    content, count = re.subn(pattern, lambda found: found[1] + entry + found[2], path.read_text())
    assert count == 1, f"{path} holds {pattern!r} {count} times"
    path.write_text(content)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout with the objective `decoupled`, and nothing else changed than what README names."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Changing the objective")[1].split("\n## ")[0]
    for name in ("`objectives.py`", "`OBJECTIVES`", "`Objective.name` in `config/method.py`", "`tests/reference.py`"):
        assert name in section, f"README no longer names {name}: this test does what it says"
    assert "`clae parity CONFIG objective.name=yours`" in section
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("clae_dist", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    losses, loop = folder / "clae_dist/contrast/objectives.py", folder / "tests/reference.py"
    insert(losses, "OBJECTIVES: dict", DENSE)
    add_name(losses, r"(OBJECTIVES: dict.* = \{.*)(\})", ', "decoupled": decoupled')
    add_name(folder / "clae_dist/config/method.py", r'( name: Literal\["nt_xent".*?)(\])', ', "decoupled"')
    insert(loop, "OBJECTIVES = {", DOUBLE_LOOP)
    add_name(loop, r"(OBJECTIVES = \{.*)(\})", ', "decoupled": decoupled')
    return folder


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_tests_take_a_new_objective(copy: Path) -> None:
    files = ("tests/contrast/test_objectives.py", "tests/contrast/test_parity.py")
    chosen = "test_objectives or decoupled"  # of the parity tests those of the new one
    told = run(copy, "pytest", *files, "-k", chosen, "-v", "-p", "no:cacheprovider")
    for test in (
        "test_value_and_gradient_equal_the_double_loop[0-0.05-plain-decoupled]",
        "test_the_mean_over_ranks_is_the_whole[decoupled]",
        "test_other_objectives[decoupled-reduce_scatter]",
    ):
        assert f"{test} PASSED" in told


@pytest.mark.slow
def test_parity_of_a_new_objective(copy: Path) -> None:
    told = run(
        copy,
        *("clae_dist", "parity", "configs/quickstart.yaml", "--world-size", "2", "--rows", "2"),
        *("objective.name=decoupled", "model.norm=global", "data.image_size=16"),
    )
    assert "parity: passed" in told
