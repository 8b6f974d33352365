"""The resolved configuration of every recipe, as differences from defaults.yaml: a changed default shows in review.

After an intended change:  python tests/golden/test_recipes.py
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import pytest

from clae_dist.config import Config
from clae_dist.keys import flatten
from clae_dist.recipe import recipe_names, resolve

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RECIPES = [Path(f"{name}.yaml") for name in recipe_names()]


DEFAULTS = HERE / "defaults.yaml"


def lines(config: Config, without: Config | None = None) -> str:
    """One line per setting, without those that `without` has."""
    known = flatten(without) if without else {}
    return "".join(f"{key}: {value!r}\n" for key, value in flatten(config).items() if known.get(key, ...) != value)


def golden() -> dict[Path, str]:
    """The contents that each golden file is expected to have."""
    recipes = {HERE / recipe: lines(resolve(ROOT / "configs" / recipe)[0], Config()) for recipe in RECIPES}
    return {DEFAULTS: lines(Config()), **recipes}


@pytest.mark.parametrize("path", [DEFAULTS, *(HERE / recipe for recipe in RECIPES)], ids=lambda path: path.stem)
def test_a_recipe_resolves_to_what_was_reviewed(path: Path) -> None:
    reviewed = path.read_text() if path.exists() else ""
    difference = "".join(difflib.unified_diff(reviewed.splitlines(True), golden()[path].splitlines(True), "reviewed", "now"))
    if difference:
        pytest.fail(f"\n{difference}\nif this is intended: python tests/golden/test_recipes.py", pytrace=False)


def test_no_golden_file_without_a_recipe() -> None:
    assert sorted(HERE.rglob("*.yaml")) == sorted(golden())


def regenerate() -> None:
    for old in HERE.rglob("*.yaml"):
        old.unlink()
    for path, text in golden().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    regenerate()
