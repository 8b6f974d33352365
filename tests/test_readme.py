"""Extras, packages and versions that pages and messages name are those of pyproject.toml. The pages: test_pages.py."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from clae_dist.doctor.software import PACKAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCES = [path for folder in ("clae_dist", "data_prep", "launch") for path in (ROOT / folder).rglob("*.*") if path.is_file()]


def bounds() -> dict[str, str]:
    """The lower bound of every dependency in pyproject.toml, by name; "" without one."""
    asked = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    found = [re.fullmatch(r"([\w.-]+)(?:\[\w+\])?(?:>=([\d.]+))?", line) for line in asked]
    return {match[1].lower(): match[2] or "" for match in found if match}


def texts() -> dict[str, str]:
    return {"README.md": README} | {
        str(path.relative_to(ROOT)): path.read_text() for path in SOURCES if path.suffix in (".py", ".sh", ".yaml", ".md")
    }


def test_this_package_is_in_no_registry() -> None:
    """Its extras are installed from a checkout."""
    assert [name for name, text in texts().items() if re.search(r"clae-dist\[\w+\]", text)] == []
    named = {extra for text in texts().values() for extra in re.findall(r"install -e '?\.\[(\w+)\]", text)}
    assert named
    assert named <= set(EXTRAS)


def test_what_messages_ask_to_install_is_what_pyproject_asks_for() -> None:
    asked = bounds()
    found = {
        (package.lower(), version)
        for text in texts().values()
        for package, version in re.findall(r"pip install '?([a-z][\w-]+)(?:\[\w+\])?>=([\d.]+)", text)
    }
    assert ("pyarrow", "17") in found
    assert {package: version for package, version in found if asked.get(package) != version} == {}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_doctor_knows_the_versions_of_pyproject(package) -> None:  # type: ignore[no-untyped-def]
    wanted = tuple(int(part) for part in ([*bounds()[package.name.lower()].split("."), "0"])[:2])
    assert package.oldest == wanted
