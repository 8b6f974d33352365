"""A study file: the methods, seeds and budget of a comparison."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from clae_dist import core_yaml
from clae_dist.errors import ConfigError
from clae_dist.evaluation.suite import DEFAULT, make_suite
from clae_dist.reading import ReadError, read_text
from clae_dist.recipe import check_key, dumped, find_recipe, parse_overrides
from clae_dist.redact import redact_word

BudgetKind = Literal["passes", "epochs", "seconds", "images"]
KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
_MAX_BYTES = 256 << 10
_KEYS = ("name", "folder", "baseline", "seeds", "budget", "recipe", "set", "methods", "select_seed", "evaluate")
_EVALUATE_KEYS = ("suite", "set")
_METHOD_KEYS = ("recipe", "set", "select")
_OWN_KEYS = ("name", "run_dir", "seed", "train.epochs", "train.parent")  # that a study sets for each cell
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_MAX_CHOICES = 64  # of one method's grid


@dataclass(frozen=True)
class Budget:
    """The budget of every cell. The amount of `epochs` is the baseline's: all cells may spend the encoder passes of these."""

    kind: BudgetKind
    amount: float


@dataclass(frozen=True)
class StudyMethod:
    """A method of a study: a recipe, and the settings that differ from it."""

    name: str
    recipe: str
    overrides: Mapping[str, str]
    choices: tuple[Mapping[str, str], ...]  # settings to select from; () without a selection


@dataclass(frozen=True)
class Study:
    """The content of a study file, with paths that hold from any folder."""

    path: Path
    name: str
    folder: Path
    baseline: str
    seeds: tuple[int, ...]
    budget: Budget
    methods: tuple[StudyMethod, ...]
    select_seed: int
    tracking_uri: str  # for methods that set none
    given: Mapping[str, str]  # settings of the command line
    suite: str = ",".join(DEFAULT)  # protocols of `clae evaluate`, and their settings
    suite_overrides: tuple[str, ...] = ()

    @property
    def protocols(self) -> frozenset[str]:
        """Names of the protocols."""
        return frozenset(protocol.name for protocol in make_suite(self.suite, self.suite_overrides))

    def method(self, name: str) -> StudyMethod:
        return next(method for method in self.methods if method.name == name)


def read_study(path: Path, overrides: Sequence[str] = (), folder: Path | None = None, store: str = "") -> Study:
    """Read a study file. Raises ConfigError.

    Args:
        overrides: key=value settings of every method, which take precedence over the file's.
        folder: in place of the file's `folder`.
        store: the tracking server of the environment; without one, runs are recorded in mlflow.db in the study's folder.
    """
    content = _read(path)
    _check_keys(content, _KEYS, path)
    for key in ("budget", "methods"):
        if key not in content:
            raise ConfigError(f"{key} is missing in {path}; a study needs a budget and methods.")
    name = _word(content.get("name", path.stem), f"name in {path}")
    common = _settings(content.get("set", {}), f"set in {path}")
    given = {key: text.split("=", 1)[1] for text in overrides for key in [text.split("=", 1)[0]] if "=" in text}
    parse_overrides(list(overrides))  # its errors name a key that is unknown or given twice
    _refuse_own_keys(given, "command line")
    methods = _methods(content["methods"], content.get("recipe", ""), common, given, path)
    names = [method.name for method in methods]
    baseline = str(content.get("baseline", names[0]))
    if baseline not in names:
        raise ConfigError(f"baseline is {redact_word(baseline)!r} in {path}, which is no method of it; use {', '.join(names)}.")
    seeds = _seeds(content.get("seeds", ["0", "1", "2"]), path)
    written_folder = Path(str(content.get("folder", "")) or f"runs/{name}").expanduser()
    written_folder = Path(os.path.abspath(folder or written_folder))
    return Study(
        path=path.absolute(),
        name=name,
        folder=written_folder,
        given=given,
        tracking_uri=store or f"sqlite:///{written_folder / 'mlflow.db'}",
        baseline=baseline,
        seeds=seeds,
        budget=_budget(content["budget"], path),
        methods=methods,
        **_evaluation(content.get("evaluate", {}), path),
        select_seed=_count(content.get("select_seed", str(max(seeds) + 1)), f"select_seed in {path}"),
    )


def _read(path: Path) -> dict[str, Any]:
    """The file as nested mappings and lists whose scalars are texts as they were written."""
    try:
        node = core_yaml.compose(read_text(path, _MAX_BYTES))
        content = _as_written(node) if node is not None else {}
    except ReadError as error:
        raise ConfigError(f"STUDY is {str(path)!r}, which cannot be read ({error}); name a study file (YAML).") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping; write `methods:` and `budget:` sections.")
    return content


def _as_written(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            line = node.start_mark.line + 1
            raise ValueError(f"{twice!r} is set twice in the mapping at line {line}; keep one")
        return {key: _as_written(value) for key, (_, value) in zip(keys, node.value, strict=True)}
    if isinstance(node, yaml.SequenceNode):
        core_yaml.construct(node)  # raises for a list that contains itself
        return [_as_written(item) for item in node.value]
    return core_yaml.written(node)


def _check_keys(content: Mapping[str, Any], known: Sequence[str], where: object) -> None:
    for key in content:
        if key not in known:
            raise ConfigError(f"{redact_word(key)} in {where} is not a known key of a study; it has {', '.join(known)}.")


def _methods(
    content: Any, recipe: str, common: Mapping[str, str], given: Mapping[str, str], path: Path
) -> tuple[StudyMethod, ...]:
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"methods in {path} is not a mapping; write `methods:` and one `NAME:` section each.")
    methods = []
    for name, entry in content.items():
        entry, where = entry or {}, f"methods.{name} in {path}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where} is {redact_word(str(entry))!r}; write a section with recipe, set or select.")
        _check_keys(entry, _METHOD_KEYS, where)
        own = str(entry.get("recipe", recipe) or "")
        if not own:
            raise ConfigError(f"{where} has no recipe; add `recipe: NAME`, or one at the top for all methods.")
        overrides = {**common, **_settings(entry.get("set", {}), f"{where}, set")}
        choices = _choices(entry.get("select", {}), f"{where}, select")
        both = sorted({key for choice in choices for key in choice} & set(given))
        if both:
            raise ConfigError(f"{both[0]} is given on the command line, but {where} is to select it; remove one.")
        if len(choices) > _MAX_CHOICES:
            raise ConfigError(f"{where} has {len(choices)} combinations to select from; use at most {_MAX_CHOICES}.")
        methods.append(StudyMethod(_word(name, where), str(_recipe(own, path)), overrides, tuple(choices)))
    return tuple(methods)


def _recipe(recipe: str, path: Path) -> Path:
    """A recipe by its path beside the study file, its path, or its name in the package."""
    beside = path.parent / recipe
    return (beside if beside.is_file() else find_recipe(recipe)).absolute()


def _settings(content: Any, where: str) -> dict[str, str]:
    """Dotted keys and their values as texts for an override, from sections and dotted keys."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is not a mapping; write key: value lines.")
    settings: dict[str, str] = {}

    def walk(section: Mapping[str, Any], prefix: str) -> None:
        for name, value in section.items():
            key = prefix + name
            if isinstance(value, dict):
                walk(value, key + ".")
                continue
            check_key(key, where)
            if key in settings:
                raise ConfigError(f"{key} is set twice ({where}); keep one.")
            settings[key] = _text(value)

    walk(content, "")
    _refuse_own_keys(settings, where)
    return settings


def _choices(content: Any, where: str) -> list[dict[str, str]]:
    """The settings to select from: the entries of a list, or every combination of key: [value, value] lines."""
    if isinstance(content, list):
        choices = [_settings(entry, f"{where}, entry {number}") for number, entry in enumerate(content, start=1)]
        same = [choice for choice in choices if choices.count(choice) > 1]
        if same:
            raise ConfigError(f"{where} has {same[0]} twice; keep one.")
        return choices
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is not a mapping; write key: [value, value] lines, or a list of sections to select from.")
    combinations: list[dict[str, str]] = [{}] if content else []
    for key, values in content.items():
        check_key(key, where)
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{key} ({where}) is not a list; write the values to select from, as in [0.004, 0.008].")
        texts = tuple(_text(value) for value in values)
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise ConfigError(f"{key} ({where}) has {twice} twice; keep one.")
        combinations = [{**chosen, key: value} for chosen in combinations for value in texts]
    _refuse_own_keys(content, where)
    return combinations


def _refuse_own_keys(settings: Mapping[str, Any], where: str) -> None:
    for key in _OWN_KEYS:
        if key in settings:
            raise ConfigError(
                f"{key} ({where}) is set by the study for each cell; remove it (seeds, budget, folder set these)."
            )


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return dumped(value) if isinstance(value, str) and set(value) & set(",[]{}#:\"'") else str(value)


def _budget(content: Any, path: Path) -> Budget:
    if not isinstance(content, dict) or len(content) != 1 or next(iter(content)) not in KINDS:
        raise ConfigError(
            f"budget in {path} is {str(content)[:60]!r}; write exactly one of {', '.join(KINDS)}, as in passes: 3e6."
        )
    kind: BudgetKind = next(kind for kind in KINDS if kind in content)
    amount = _number(content[kind], f"budget.{kind} in {path}", float, "a positive number")
    if not 0 < amount < 1e18:
        raise ConfigError(f"budget.{kind} in {path} is {amount:g}; use a positive number.")
    return Budget(kind, amount)


def _evaluation(content: Any, path: Path) -> dict[str, Any]:
    """The protocols of the study, checked. Raises ConfigError."""
    where = f"evaluate in {path}"
    if not isinstance(content, dict) or not isinstance(content.get("set", {}), dict):
        raise ConfigError(f"{where} is not a mapping; write suite: knn,linear and set: lines.")
    _check_keys(content, _EVALUATE_KEYS, where)
    names = content.get("suite", ",".join(DEFAULT))
    suite = ",".join(map(str, names)) if isinstance(names, list) else str(names)
    overrides = tuple(f"{key}={_text(value)}" for key, value in content.get("set", {}).items())
    try:
        make_suite(suite, overrides)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return {"suite": suite, "suite_overrides": overrides}


def _seeds(content: Any, path: Path) -> tuple[int, ...]:
    if not isinstance(content, list) or not content:
        raise ConfigError(f"seeds in {path} is not a list; write integers, as in [0, 1, 2].")
    seeds = tuple(_count(seed, f"seeds in {path}") for seed in content)
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ConfigError(f"seeds in {path} has {twice[0]} twice; a seed counts once.")
    return seeds


def _count(value: Any, where: str) -> int:
    number = _number(value, where, int, "an integer of 0 or more")
    if not 0 <= number < 2**62:
        raise ConfigError(f"{where}: {number} is out of range; expected an integer of 0 or more.")
    return int(number)


def _number(value: Any, where: str, kind: Callable[[str], float], expected: str) -> float:
    try:
        return kind(str(value))
    except ValueError:
        raise ConfigError(f"{where}: {redact_word(str(value))!r} is not a number; expected {expected}.") from None


def _word(value: Any, where: str) -> str:
    """A name that is a folder's name, too."""
    if not _NAME.fullmatch(str(value)):
        raise ConfigError(f"{where}: {redact_word(str(value))!r} is not a plain name; use letters, digits, -, _ and dots.")
    return str(value)
