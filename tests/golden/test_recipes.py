"""The resolved configuration of every recipe, beside this file: a changed default shows in review.

After a change that is meant:  python tests/golden/test_recipes.py
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import pytest

from clae_dist.recipe import resolve, to_yaml

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RECIPES = sorted(path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml"))


def resolved(recipe: Path) -> str:
    return to_yaml(resolve(ROOT / "configs" / recipe)[0])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.with_suffix("").as_posix())
def test_a_recipe_resolves_to_what_was_reviewed(recipe: Path) -> None:
    golden = HERE / recipe
    reviewed = golden.read_text() if golden.exists() else ""
    difference = "".join(difflib.unified_diff(reviewed.splitlines(True), resolved(recipe).splitlines(True), "reviewed", "now"))
    if difference:
        pytest.fail(f"\n{difference}\nif this is meant: python tests/golden/test_recipes.py", pytrace=False)


def test_no_golden_file_without_a_recipe() -> None:
    assert sorted(path.relative_to(HERE) for path in HERE.rglob("*.yaml")) == RECIPES


def regenerate() -> None:
    for old in HERE.rglob("*.yaml"):
        old.unlink()
    for recipe in RECIPES:
        (HERE / recipe).parent.mkdir(exist_ok=True)
        (HERE / recipe).write_text(resolved(recipe))
        sys.stdout.write(f"wrote {(HERE / recipe).relative_to(ROOT)}\n")


if __name__ == "__main__":
    regenerate()
