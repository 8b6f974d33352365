"""Control characters in names of files, classes and sets, written out for terminals, logs, pages and plots.

A name may hold an escape sequence that clears the screen, a line feed that forges a line, or a mark that turns the direction
of writing. `shown` writes such characters as `\\x1b`, `\\n` or `\\u202e`; every other character stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

# C0 and C1 controls; marks of direction, invisible separators and fillers; halves of characters; tags.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _written(found: re.Match[str]) -> str:
    number = ord(found[0])
    form = f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
    return _SHORT.get(found[0], form)


def shown(text: object) -> str:
    """The text in one line that controls nothing."""
    return _CONTROLS.sub(_written, str(text))


def shown_lines(text: str) -> str:
    """A text of several lines, each as `shown` has it; names in it must have been through `shown`, or they may add lines."""
    return "\n".join(map(shown, text.split("\n")))


def in_json(text: str) -> str:
    """JSON with such characters as JSON writes them; line feeds between its values stay."""
    return _CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else _json(found[0]), text)


def _json(letter: str) -> str:
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def say(text: Any, **options: Any) -> None:
    """Print one line, as `shown` has it; `options` are those of print."""
    print(shown(text), **options)
