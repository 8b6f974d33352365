"""Commands, links, files, settings, messages and formats that the pages (*.md) and CITATION.cff name exist as written."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from clae_dist import __version__
from clae_dist.cli import make_parser, parse
from clae_dist.config import Config
from clae_dist.data import manifest
from clae_dist.errors import EXIT_CODES
from clae_dist.evaluation import protocol
from clae_dist.keys import flatten
from clae_dist.methods import KNOWN, method_class
from clae_dist.recipe import find_recipe, resolve
from clae_dist.runs.checkpoint import index
from data_prep import arguments
from data_prep.audit import summary

ROOT = Path(__file__).parents[1]
SKIPPED = (".git", "build", "tests", "recipes", "runs")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in SKIPPED for part in path.relative_to(ROOT).parts)
}
SOURCES = [path for folder in ("clae_dist", "data_prep") for path in (ROOT / folder).rglob("*.py")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
README = PAGES["README.md"]


def shell_lines(page: str) -> Iterator[list[str]]:
    """The words of every command in a page's code blocks, without comments."""
    for language, block in FENCE.findall(PAGES[page]):
        if language:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|;", line.partition("  #")[0]):
                if command.strip():
                    yield shlex.split(command, posix=True) if command.count('"') % 2 == 0 else command.split()


def commands(first: str) -> list[tuple[str, list[str]]]:
    """(page, the words after `first`) of every command line in a code block that begins with `first`."""
    start = first.split()
    return [(page, words[len(start) :]) for page in PAGES for words in shell_lines(page) if words[: len(start)] == start]


def prose(text: str) -> list[str]:
    """Inline code outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


CLAE = commands("clae")


@pytest.mark.parametrize(("page", "words"), CLAE, ids=[f"{page}:{' '.join(words)}" for page, words in CLAE])
def test_clae_commands_in_code_blocks_parse(page: str, words: list[str]) -> None:
    found = parse(words)
    recipe = getattr(found, "config", None)
    if recipe and recipe != "CONFIG":
        resolve(find_recipe(recipe), [text for text in found.overrides if "…" not in text])


def test_there_are_commands() -> None:
    assert len({words[0] for _, words in CLAE}) > 8


def test_data_prep_commands_parse() -> None:
    found = commands("python -m data_prep")
    assert {words[0] for _, words in found} >= {"prepare", "verify", "info", "audit", "index"}
    for _, words in found:
        arguments.parse(words)


def test_clae_commands_in_prose_exist_with_their_options() -> None:
    known = next(action.choices for action in make_parser()._actions if action.dest == "command" and action.choices)
    named = [(page, text) for page, content in PAGES.items() for text in prose(content) if re.match(r"clae [a-z]", text)]
    assert len(named) > 15
    for page, text in named:
        command, *rest = text.split()[1:]
        assert command in known, f"{page}: {text}"
        options = {option for option in (word.partition("=")[0] for word in rest) if option.startswith("--")}
        assert options <= set(known[command]._option_string_actions), f"{page}: {text}"


def test_scripts_have_the_options_that_pages_use() -> None:
    lines = [(page, words) for page in PAGES for words in shell_lines(page) if words[0].startswith("./launch/")]
    assert len(lines) > 8
    for page, (script, *rest) in lines:
        text = (ROOT / script).read_text()
        options = [word for word in rest if word.startswith("--")]
        recipes = [word for word in rest if word.endswith(".yaml")]
        assert all(option in text for option in options), f"{page}: {script} {options}"
        assert all((ROOT / recipe).is_file() for recipe in recipes), f"{page}: {recipes}"


def anchors(text: str) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[page])):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page: str) -> None:
    if page in ("CHANGELOG.md", "clae_dist/methods/README.md"):  # they name files that are gone, or that a reader writes
        return
    here = (ROOT / page).parent
    for text in prose(PAGES[page]):
        if re.fullmatch(r"(\./)?[\w./-]+\.(py|sh|sbatch|toml|cff|md)", text):
            name = text.removeprefix("./")
            assert any((folder / name).exists() for folder in (here, ROOT, ROOT / "clae_dist")), f"{page}: {text}"
        if re.fullmatch(r"(clae_dist|configs|launch|tests|data_prep)/[\w./-]*\w/?", text):
            assert (ROOT / text).exists(), f"{page}: {text}"


def test_settings_that_pages_name_exist() -> None:
    known = {*flatten(Config())}
    known |= {f"method.{field.name}" for name in KNOWN for field in fields(method_class(name).Settings)}
    sections = {key.partition(".")[0] for key in known if "." in key}
    named = {
        (page, key)
        for page, text in PAGES.items()
        if page != "CHANGELOG.md"
        for code in prose(text)
        for key in re.findall(r"(?<![\w./\"])([a-z]+\.[a-z_]+)\b(?!\.)", code)
        if key.partition(".")[0] in sections and not key.endswith((".json", ".jsonl", ".py", ".log", ".html"))
    }
    assert len(named) > 40
    assert sorted((page, key) for page, key in named if key not in known) == []


def texts_of(path: Path) -> Iterator[str]:
    """Every string of a file; values inside f-strings are "…"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_that_troubleshooting_lists_exist() -> None:
    section = PAGES["launch/README.md"].partition("## Troubleshooting by message")[2].partition("\n## ")[0]
    fragments = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(fragments) > 10
    texts = [text for path in SOURCES for text in texts_of(path)]
    assert [fragment for fragment in fragments if not any(fragment in text for text in texts)] == []


def test_exit_codes_are_those_of_the_commands() -> None:
    section = PAGES["launch/README.md"].partition("## Restarts and exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)} == set(EXIT_CODES)


def test_formats_are_those_of_the_code() -> None:
    section = PAGES["CHANGELOG.md"].partition("## Formats")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)`[^|]* \| `?([^|`]+)`? \|", section, re.MULTILINE))
    assert rows["manifest.json"] == manifest.FORMAT
    assert rows["checkpoint.json"].strip() == str(index.FORMAT)
    assert rows["evaluation.json"].strip() == str(protocol.FORMAT)
    assert rows["audit.json"] == summary.FORMAT


def test_readme_is_a_door() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 128] == []


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_fit_an_editor(page: str) -> None:
    long = [line for line in PAGES[page].splitlines() if len(line) > 140 and not line.startswith("|") and "](" not in line]
    assert long == []


CFF = {
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license"),
    *("license-url", "message", "preferred-citation", "references", "repository", "repository-artifact", "repository-code"),
    *("title", "type", "url", "version"),
}
CFF_REFERENCE = {"authors", "collection-title", "identifiers", "title", "type", "url", "year"}


def test_citation_is_cff() -> None:
    """The keys that CFF 1.2.0 knows and requires (of a reference: those used here)."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert set(citation) <= CFF
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset")
    assert str(citation["version"]) == __version__
    assert all(citation[key] for key in ("message", "title", "authors"))
    for reference in citation["references"]:
        assert {"authors", "title", "type"} <= set(reference) <= CFF_REFERENCE
    people = [person for entry in (citation, *citation["references"]) for person in entry["authors"]]
    assert all(set(person) <= {"family-names", "given-names"} or set(person) == {"name"} for person in people)
