"""Docstrings, comments, messages and pages are in ordinary engineering English, as far as a list of words can tell."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = [path for folder in ("clae_dist", "data_prep") for path in sorted((ROOT / folder).rglob("*.py"))]
SCRIPTS = [path for path in sorted((ROOT / "launch").iterdir()) if path.suffix in (".sh", ".sbatch", ".yaml")]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "launch").glob("*.md"), *(ROOT / "clae_dist").rglob("README.md")]

OPENINGS = re.compile(r"^\W*(What|Whether|Those|Whoever)\b")
# Phrase → the usual one.
PHRASES = {
    r"go(es|ing)? on (where|from|with|without|by|until|after|when|here|there|under)": "resume, continue",
    r"went on": "resumed, continued",
    r"mend(s|ed|ing)?": "fix",
    r"would do": "try …",
    r"whole numbers?": "integer",
    r"(sit|sits|sat) (out|this|an)": "skip",
    r"left out|leaves out|leaving out": "skip, omit",
    r"(gets?|got) no further": "makes no progress",
    r"(whose|its) patience": "timeout, retry, backoff",
    r"it wants|wants (a|an|the|its|their)\b": "expected, needs",
    r"for ever": "forever",
    r"numbers? that (is|are) not finite": "non-finite, NaN",
    r"in good order": "cleanly",
    r"lest": "so that … not",
    r"growing pauses": "backoff",
}
WORDS = re.compile("|".join(rf"\b(?:{phrase})\b" for phrase in PHRASES), re.IGNORECASE)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every comment and every string of more than one word."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in kinds and " " in token.string.strip():
            yield token.start[0], " ".join(token.string.split())


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_docstring_opens_with_a_clause() -> None:
    """A docstring's first line is an imperative or descriptive sentence with a subject noun."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{name(path)}: {getattr(node, 'name', 'module')}: {text.splitlines()[0]}"
        for path in PYTHON
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, nodes) and (text := ast.get_docstring(node)) and OPENINGS.match(text)
    ]
    assert found == [], "\n".join(found)


def test_words_of_docstrings_comments_and_messages() -> None:
    found = [
        f"{name(path)}:{line}: {match[0]}" for path in PYTHON for line, text in texts(path) if (match := WORDS.search(text))
    ]
    assert found == [], "\n".join(found)


def test_words_of_scripts_and_pages() -> None:
    lines = [(path, number, line) for path in SCRIPTS + PAGES for number, line in enumerate(path.read_text().splitlines(), 1)]
    found = [f"{name(path)}:{number}: {match[0]}" for path, number, line in lines if (match := WORDS.search(line))]
    assert found == [], "\n".join(found)


def test_the_list_finds_what_it_is_for() -> None:
    for text in ("it goes on from there", "mend that", "960 or 1008 would do", "a whole number", "sits out an epoch"):
        assert WORDS.search(text)
    for text in ("recommend it", "the run resumes", "based on where", "amended"):
        assert not WORDS.search(text)
    assert OPENINGS.match("Whether a rank waits.")
