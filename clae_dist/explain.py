"""Explanations of settings: `clae config --explain`, the table in configs/README.md and tab completion share them."""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
import typing
from dataclasses import dataclass
from typing import Any, Literal

from clae_dist.config.rules import Rule
from clae_dist.errors import ConfigError
from clae_dist.keys import FIELDS, Fields, fields_with
from clae_dist.methods import KNOWN
from clae_dist.recipe import dumped
from clae_dist.redact import redact_word

_NAMES = {int: "integer", float: "number", str: "string", bool: "true or false"}


@dataclass(frozen=True)
class Explanation:
    """Everything that is known about one setting, in words.

    Args:
        choices: the allowed values, where they are a list; empty otherwise.
        kind: the type, such as "integer" or "list of 3 numbers".
        bounds: the allowed range, such as "0 (automatic) or more"; may be empty.
        used_by: the settings under which this one has a meaning; empty: always.
        changes_result: False if a resumed run may change the setting.
        of_run: False for a setting of an evaluation protocol.
    """

    key: str
    help: str
    kind: str
    bounds: str
    choices: tuple[str, ...]
    default: str
    used_by: str
    changes_result: bool
    of_run: bool = True  # a setting of a recipe

    @property
    def values(self) -> str:
        """Type, choices and bounds in one phrase."""
        if self.choices and self.kind != _NAMES[bool]:
            return ", ".join(self.choices)
        return f"{self.kind}, {self.bounds}" if self.bounds else self.kind

    def text(self) -> str:
        """Several lines for a terminal."""
        lines = [self.key, *textwrap.wrap(self.help, 96), f"values: {self.values}", f"default: {self.default}"]
        if self.used_by:
            lines.append(f"used by: {self.used_by}")
        if self.of_run:
            lines.append(f"may change when a run resumes: {'no' if self.changes_result else 'yes'}")
        return "\n  ".join(lines)


def _kind(hint: Any) -> str:
    arguments = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Literal:
            return "one of"
        case origin if origin is dict:
            return "mapping"
        case origin if origin is tuple:
            several = f"{_NAMES[arguments[0]]}s"
            return f"list of {several}" if arguments[-1] is Ellipsis else f"list of {len(arguments)} {several}"
    return _NAMES[hint]


def _choices(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is Literal:
        return tuple(map(str, typing.get_args(hint)))
    return ("true", "false") if hint is bool else ()


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if callable(field.default_factory) else field.default
    return dumped(list(value) if isinstance(value, tuple) else value)


def explanations() -> dict[str, Explanation]:
    """Key → explanation of every setting of every built-in method, in the order of `clae config`."""
    fields = dict(FIELDS)
    methods: dict[str, list[str]] = {}
    for method in KNOWN:
        for key, typed_field in fields_with(method).items():
            fields.setdefault(key, typed_field)
            methods.setdefault(key, []).append(method)
    order = {section: place for place, section in enumerate(dict.fromkeys(map(_section, FIELDS)))}
    known = {}
    for key in sorted(fields, key=lambda key: order[_section(key)]):
        several = "" if len(methods[key]) == len(KNOWN) else f"method.name={' or '.join(methods[key])}"
        known[key] = _explanation(key, *fields[key], several)
    return known


def _explanation(key: str, field: dataclasses.Field[Any], hint: Any, used_by: str, *, of_run: bool = True) -> Explanation:
    rule: Rule = field.metadata["rule"]
    return Explanation(
        key=key,
        help=rule.help,
        kind=_kind(hint),
        bounds=rule.bounds(),
        choices=_choices(hint),
        default=_default(field),
        used_by=rule.used_by or used_by,
        changes_result=not rule.no_effect,
        of_run=of_run,
    )


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def explain(key: str, of_protocols: Fields | None = None) -> str:
    """The explanation of a setting, of all settings of a section or an evaluation protocol, or of all settings of a run ("").

    Raises ConfigError for a key that does not exist.
    """
    known = explanations()
    for name, typed_field in (of_protocols or {}).items():
        known[name] = _explanation(name, *typed_field, f"clae evaluate --suite {name.partition('.')[0]}", of_run=False)
    chosen = [one for name, one in known.items() if name == key or name.startswith(f"{key}.") or not key]
    if not chosen:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "`clae config --explain` explains all settings."
        raise ConfigError(f"{redact_word(key)} is not a known key; {hint}")
    return "\n\n".join(one.text() for one in chosen)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def markdown_table() -> str:
    """The table of all settings in configs/README.md."""
    lines = ["| Setting | Default | Values | Meaning |", "|---|---|---|---|"]
    for one in explanations().values():
        default = f"`{one.default}`" if one.default not in ("''", "{}", "[]") else ""
        use = f" Used by {one.used_by}." if one.used_by else ""
        mark = "" if one.changes_result else " ↻"
        lines.append(f"| `{one.key}`{mark} | {_cell(default)} | {_cell(one.values)} | {_cell(one.help + use)} |")
    return "\n".join(lines) + "\n"
