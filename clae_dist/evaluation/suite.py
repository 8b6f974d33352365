"""The protocols of `clae evaluate --suite`, in the order of tables, and their settings from the command line.

A new protocol is a file here and an entry in PROTOCOLS.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any

import yaml

from clae_dist import core_yaml
from clae_dist.config.conversion import convert
from clae_dist.errors import ConfigError
from clae_dist.evaluation.adapt import Adapt
from clae_dist.evaluation.calibration import Calibration
from clae_dist.evaluation.corruptions import Corruptions
from clae_dist.evaluation.finetune import Finetune
from clae_dist.evaluation.geometry import Geometry
from clae_dist.evaluation.knn import Knn
from clae_dist.evaluation.learnability import LearnabilityProtocol
from clae_dist.evaluation.linear import LinearProbe
from clae_dist.evaluation.linear_sgd import LinearSgd
from clae_dist.evaluation.ood import Ood
from clae_dist.evaluation.protocol import EvaluationProtocol
from clae_dist.evaluation.retrieval import RetrievalProtocol
from clae_dist.evaluation.robust import Robust
from clae_dist.evaluation.semi import Semi
from clae_dist.evaluation.transfer import Transfer
from clae_dist.redact import redact_word

_ALL: tuple[type[EvaluationProtocol], ...] = (
    Knn,
    LinearProbe,
    Robust,
    LinearSgd,
    Semi,
    Finetune,
    Corruptions,
    Adapt,
    Calibration,
    Ood,
    Transfer,
    RetrievalProtocol,
    LearnabilityProtocol,
    Geometry,
)
PROTOCOLS: dict[str, type[EvaluationProtocol]] = {protocol.name: protocol for protocol in _ALL}
DEFAULT = ("knn", "linear")


def default_suite() -> list[EvaluationProtocol]:
    return [PROTOCOLS[name]() for name in DEFAULT]


def setting_keys() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Field and type of every setting of a protocol, by its key NAME.SETTING."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for name, protocol in PROTOCOLS.items():
        cls: Any = protocol.Settings  # a dataclass
        hints = typing.get_type_hints(cls)
        found |= {f"{name}.{field.name}": (field, hints[field.name]) for field in dataclasses.fields(cls)}
    return found


def make_suite(names: str, overrides: Sequence[str] = ()) -> list[EvaluationProtocol]:
    """The protocols of a comma-separated list of names, or "all"; `overrides` are texts key=value of their settings.

    Raises ConfigError for a name or a key that does not exist, and for a setting of a protocol that is not in the list.
    """
    asked = [name.strip() for name in names.split(",")]
    chosen = list(PROTOCOLS) if asked == ["all"] else asked
    for name in chosen:
        if name not in PROTOCOLS:
            close = difflib.get_close_matches(name, PROTOCOLS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use all, or some of {', '.join(PROTOCOLS)}."
            raise ConfigError(f"--suite has {redact_word(name)!r}, which is no protocol; {hint}")
    values: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for text in overrides:
        key, value = _override(text)
        protocol, _, setting = key.partition(".")
        if protocol not in values:
            raise ConfigError(f"{key} is a setting of {protocol}, which is not in the suite; use --suite {names},{protocol}")
        if setting in values[protocol]:
            raise ConfigError(f"{key} is given twice; keep one.")
        values[protocol][setting] = value
    return [protocol(protocol.Settings(**values[name])) for name, protocol in PROTOCOLS.items() if name in values]


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts key=value of protocols' settings, and the others."""
    own = [text for text in overrides if text.partition("=")[0].partition(".")[0] in PROTOCOLS]
    return own, [text for text in overrides if text not in own]


def _override(text: str) -> tuple[str, Any]:
    """Key and converted value of a text key=value."""
    key, equals, written = text.partition("=")
    known = setting_keys()
    if not equals:
        raise ConfigError(f"{redact_word(text)!r} is not an override; write protocol.setting=value, such as robust.images=500.")
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"`clae config --explain {key.partition('.')[0]}` lists its settings."
        raise ConfigError(f"{redact_word(key)} is not a setting of an evaluation protocol; {hint}")
    try:
        node = core_yaml.compose(written)
        value = "" if node is None else core_yaml.construct(node)
    except (yaml.YAMLError, ValueError) as error:
        why = getattr(error, "problem", None) or error
        raise ConfigError(f"{key} is {redact_word(repr(written))}, which is not valid YAML; quote it. ({why})") from None
    hint = known[key][1]
    as_text = written if hint is str else value
    return key, convert(key, as_text, hint, "command line")
