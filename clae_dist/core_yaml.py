"""YAML with the core schema of version 1.2, in which numbers and booleans are read as people expect.

PyYAML follows YAML 1.1, where `0256` is 174, `12:30:00` is 45000, `yes` is true and `1e-3` is a string. Here numbers are
decimal (`0256` is 256), octal only as `0o17` and hexadecimal as `0x1F`; booleans are `true` and `false`; all else is a string.

Reference: YAML 1.2.2, section 10.3.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_TAG = "tag:yaml.org,2002:"
NULL, TEXT = f"{_TAG}null", f"{_TAG}str"
MAX_DEPTH = 10
MOST_REPEATED = 8  # lists or mappings; lists of lists of lists of them grow without bound
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", rf"{NUMBER.pattern}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
)


class _CoreSafeLoader(yaml.SafeLoader):
    """The resolvers and constructors of the core schema alone: no merge keys, dates, sets or binaries."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._repeated = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (`<<`) belong to YAML 1.1."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Bounded: a list in a list in a list …, or lists of references to lists, would take all time and memory."""
        event = self.peek_event()
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {MAX_DEPTH} deep", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._repeated += isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode)
        if self._repeated > MOST_REPEATED:
            problem = f"more than {MOST_REPEATED} lists or mappings are repeated (*{event.anchor}); write them out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return node


def _int(loader: _CoreSafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _float(loader: _CoreSafeLoader, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    return float(text.replace(".", "", 1) if text.lstrip("+-") in (".inf", ".nan") else text)


def _mapping(loader: _CoreSafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    """Keys are strings as they were written."""
    values: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is not a plain string", key.start_mark)
        if key.value in values:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is set twice; keep one", key.start_mark)
        values[key.value] = loader.construct_object(value, deep=True)
    return values


def _unknown(loader: _CoreSafeLoader, node: yaml.Node) -> None:
    tag = node.tag.replace(_TAG, "!!")
    raise yaml.constructor.ConstructorError(None, None, f"the tag {tag} is not one of plain data; remove it", node.start_mark)


for _name, _pattern, _first in _RESOLVERS:
    _CoreSafeLoader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
for _name, _constructor in {
    "null": lambda loader, node: None,
    "bool": lambda loader, node: node.value.lower() == "true",
    "int": _int,
    "float": _float,
    "str": lambda loader, node: str(node.value),
    "seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    "map": _mapping,
}.items():
    _CoreSafeLoader.add_constructor(_TAG + _name, _constructor)
_CoreSafeLoader.add_constructor(None, _unknown)


def compose(text: str) -> yaml.Node | None:
    """The tree of nodes of one document, None for an empty one. Raises yaml.YAMLError."""
    return yaml.compose(text, Loader=_CoreSafeLoader)


def construct(node: yaml.Node) -> Any:
    """The value of a node: None, bool, int, float, str, list or dict of these. Raises yaml.YAMLError and ValueError."""
    return _CoreSafeLoader("").construct_object(node, deep=True)


def written(node: yaml.Node) -> Any:
    """Like `construct`, with every scalar as the string that was written: 007 stays 007. A null is None."""
    if isinstance(node, yaml.ScalarNode) and node.tag.startswith(_TAG):
        if node.tag not in (_TAG + name for name in ("null", "bool", "int", "float", "str")):
            return construct(node)
        return None if node.tag == NULL else str(node.value)
    value = construct(node)  # raises for a list that contains itself
    return [written(item) for item in node.value] if isinstance(node, yaml.SequenceNode) else value
