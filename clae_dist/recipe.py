"""From a recipe and the command line to a Config.

A recipe (YAML) holds only what differs from the defaults in config/; `extends: other.yaml` starts from another recipe;
dotted `key=value` overrides come last. `resolve()` returns a Recipe: the Config and the origin of every value.
"""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from clae_dist import core_yaml
from clae_dist.config import Config
from clae_dist.config.conversion import convert
from clae_dist.errors import ConfigError
from clae_dist.home import expand_home
from clae_dist.keys import FIELDS, MOVED, Fields, fields_with, flatten
from clae_dist.methods import method_class
from clae_dist.plugins import PLUGIN_KEYS, find_beside, is_loaded, is_plugin
from clae_dist.reading import ReadError, read_text
from clae_dist.redact import redact_word

_MAX_BYTES = 256 << 10  # of a recipe, which has a few kilobytes
_MOST_EXTENDED = 20


_METHOD = "method."
_SECTIONS = {key.rpartition(".")[0] for key in FIELDS} - {""}


def _is_mapping(key: str) -> bool:
    """True if the value of a key is itself a mapping."""
    hint: Any = FIELDS[key][1] if key in FIELDS else None
    return typing.get_origin(hint) is dict


class Recipe(NamedTuple):
    """The settings of a run, and the origin of each: "default", "file:line", "command line", …"""

    config: Config
    origins: Mapping[str, str] = {}


@dataclass(frozen=True)
class Setting:
    """A value as it was written, and its origin."""

    value: Any
    origin: str
    text: Any = None  # of a method's key, whose type is known with the method: `value` with scalars as they were written


def check_key(key: str, origin: str) -> None:
    """Raise ConfigError for a key that does not exist, with the nearest existing one."""
    if key in FIELDS or (key.startswith(_METHOD) and key.count(".") == 1):  # `build` knows the method and checks its keys
        return
    if key in MOVED:
        raise ConfigError(f"{key} ({origin}) is no longer a key; use {MOVED[key]}.")
    inside = [name for name in FIELDS if name.startswith(key + ".")]
    if inside:
        raise ConfigError(f"{key} ({origin}) is a section; set one of its keys: {', '.join(inside)}.")
    close = [name for name in FIELDS if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]  # right name, wrong section
    if len(close) != 1:
        close = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "`clae config CONFIG` lists the known ones."
    raise ConfigError(f"{redact_word(key)} ({origin}) is not a known key; {hint}")


_AS_WRITTEN = (str, tuple[str, ...])


def _setting(key: str, node: yaml.Node, origin: str) -> Setting:
    """A YAML node as a setting: strings stay as they were written, where YAML would make 7 of 007 or true of a name."""
    if key.startswith(_METHOD) and key != "method.name":
        return Setting(core_yaml.construct(node), origin, core_yaml.written(node))
    return Setting(core_yaml.written(node) if FIELDS[key][1] in _AS_WRITTEN else core_yaml.construct(node), origin)


def _check_key_node(key: str, node: yaml.Node, origin: str) -> None:
    """Raise ConfigError for a key of a recipe that is not a plain word."""
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"a key ({origin}) is a list or a mapping; write a plain word, such as `batch:`.")
    if node.value == "<<":
        raise ConfigError(
            f"{key} ({origin}) is a merge key, which recipes do not have (YAML 1.2); write the keys out, or start from another "
            "recipe with `extends: other.yaml`."
        )


STUDIES = "studies"  # the folder of study files in it
RECIPES = Path(__file__).parent / "recipes"  # the repository's configs/, which a wheel holds as well


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package, such as "quickstart" and "cifar10/clae"."""
    files = [path.relative_to(RECIPES) for path in RECIPES.glob("**/*.yaml")]
    return sorted(file.with_suffix("").as_posix() for file in files if file.parts[0] != STUDIES)


def find_recipe(recipe: str | Path, argument: str = "CONFIG", below: str = "") -> Path:
    """The file of a recipe, which is given by its path or by its name in `recipe_names`; an existing file takes precedence.

    Raises ConfigError for a recipe that is neither, naming the argument, and of the recipes those that begin with `below`.
    """
    path, name = Path(recipe), str(recipe)
    if os.path.lexists(path) and not path.is_dir():
        return path
    names = recipe_names()
    if name in names:
        return RECIPES / f"{name}.yaml"
    names = [name for name in names if name.startswith(below)]
    close = difflib.get_close_matches(Path(name).with_suffix("").as_posix().removeprefix("configs/"), names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(
        f"{argument} is {redact_word(name)!r}, which is neither a file nor the name of a recipe{hint}; use the path of a YAML "
        f"file, or one of {', '.join(names)}."
    )


def read_recipe(path: Path, extended_by: tuple[Path, ...] = (), *, may_extend: bool = True) -> dict[str, Setting]:
    """The settings of a YAML file, after those of the file it extends. Raises ConfigError."""
    chain = (*extended_by, path.resolve())
    if path.resolve() in extended_by:
        raise ConfigError(f"{' -> '.join(map(str, chain))}: the recipe extends itself; remove one `extends`.")
    if len(extended_by) > _MOST_EXTENDED:
        raise ConfigError(f"{' -> '.join(map(str, chain))}: more than {_MOST_EXTENDED} recipes extend each other.")
    try:
        text = read_text(path, _MAX_BYTES)
    except ReadError as error:
        raise ConfigError(f"{path} cannot be read ({error}); name a recipe, such as configs/quickstart.yaml.") from None
    try:
        root = core_yaml.compose(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    settings: dict[str, Setting] = {}
    if root is None:
        return settings
    own: dict[str, Setting] = {}
    sections: dict[str, str] = {}

    def walk(node: yaml.MappingNode, prefix: str) -> None:
        for key_node, value_node in node.value:
            key, origin = prefix + str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
            _check_key_node(key, key_node, origin)
            if isinstance(value_node, yaml.MappingNode) and value_node.value and not _is_mapping(key):
                if key not in _SECTIONS:
                    check_key(f"{key}.{value_node.value[0][0].value}", f"{path}:{value_node.start_mark.line + 1}")
                if key in sections:
                    raise ConfigError(f"{key} is a section twice in {path} ({sections[key]} and {origin}); merge them.")
                sections[key] = origin
                walk(value_node, key + ".")
                continue
            if key in own:
                raise ConfigError(f"{key} is set twice in {path} ({own[key].origin} and {origin}); keep one.")
            if key == "extends" and may_extend:
                own[key] = Setting(value_node.value, origin)
                settings.update(read_recipe(path.parent / str(value_node.value), chain))
                continue
            check_key(key, origin)
            try:
                own[key] = _setting(key, value_node, origin)
            except (yaml.YAMLError, ValueError) as error:
                raise ConfigError(
                    f"{key} ({origin}) cannot be read ({' '.join(str(error).split())}); write a plain value."
                ) from None

    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} is not a mapping; write `section:` and `  key: value` lines.")
    walk(root, "")
    own.pop("extends", None)
    return {**settings, **own}


def parse_overrides(overrides: list[str], origin: str = "command line") -> dict[str, Setting]:
    """Settings from `section.key=value` texts. Raises ConfigError, also for a key that comes twice."""
    settings: dict[str, Setting] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(
                f"{redact_word(text)!r} is not an override; write section.key=value, such as batch.global_size=512."
            )
        check_key(key, origin)
        is_text = key in FIELDS and FIELDS[key][1] is str
        if key in settings:
            times = sum(text.startswith(f"{key}=") for text in overrides)
            hint = f", and a shell makes several arguments of unquoted braces: quote them, '{key}=x-{{000000..000003}}.tar'"
            raise ConfigError(f"{key} is given {times} times ({origin}); keep one{hint if is_text else ''}.")
        if is_text:  # a path may hold what YAML would read as a comment or a mapping
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            settings[key] = Setting("" if value == "null" else value[1:-1] if quoted else value, origin)
            continue
        try:
            node = core_yaml.compose(value)
            settings[key] = Setting("", origin) if node is None else _setting(key, node, origin)
        except (yaml.YAMLError, ValueError) as error:
            why = getattr(error, "problem", None) or error
            raise ConfigError(
                f"{key} is {redact_word(repr(value))} ({origin}), which is not valid YAML; quote it. ({why})"
            ) from None
    return settings


def _fields_of(settings: dict[str, Setting]) -> Fields:
    """The fields that the settings choose by their method. Raises ConfigError, also for a key that the method does not have."""
    named = settings.get("method.name", Setting(Config().method.name, "default"))
    name = convert("method.name", named.value, str, named.origin)
    fields = fields_with(name)
    own = [key for key in fields if key.startswith(_METHOD) and key != "method.name"]
    for key, setting in settings.items():
        if key not in fields:
            close = difflib.get_close_matches(key, own, n=1, cutoff=0.7)
            keys = f"has {', '.join(own)}" if own else "has no keys"
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ConfigError(f"{redact_word(key)} ({setting.origin}) is not a key of method.name={name}, which {keys}{hint}")
    return fields


def build(settings: dict[str, Setting]) -> Config:
    """The Config that the settings make over the defaults. Raises ConfigError."""
    fields = _fields_of(settings)
    method = settings.get("method.name")
    hints = {**typing.get_type_hints(Config), "method": method_class(method.value if method else "clae").Settings}
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {"method": {"name": method.value}} if method else {}
    for key, setting in settings.items():
        if key == "attack.name" and setting.value in (None, "none"):
            raise ConfigError(f"attack.name is 'none' ({setting.origin}), which is no longer a value; use method.name=simclr.")
        hint = fields[key][1]
        written = setting.text if setting.text is not None and hint in _AS_WRITTEN else setting.value
        value = expand_home(key, convert(key, written, hint, setting.origin), setting.origin)
        section, dot, name = key.rpartition(".")
        (sections.setdefault(section, {}) if dot else top)[name] = value
    try:
        return Config(**top, **{name: hints[name](**values) for name, values in sections.items()})
    except ConfigError as error:
        key = str(error).split(" ", 1)[0]
        origin = f" [{settings[key].origin}]" if key in settings else ""
        raise ConfigError(f"{error}{origin}") from None


def resolve(recipe: str | Path | None, overrides: list[str] | None = None, defaults: Sequence[str] = ()) -> Recipe:
    """Read a recipe with overrides. Raises ConfigError.

    `defaults` are overrides of the recipe that `overrides` may set again.
    """
    path = find_recipe(recipe) if recipe else None
    settings = read_recipe(path) if path else {}
    is_written_by_hand = len(settings) < len(FIELDS) // 2  # the config.yaml of a run, which may be anybody's, has every key
    settings.update(parse_overrides(list(defaults), "default of this command"))
    settings.update(parse_overrides(overrides or []))
    if path and is_written_by_hand:
        find_beside(path, [str(settings[key].value) for key in PLUGIN_KEYS if key in settings])
    config = build(settings)
    return Recipe(config, {key: settings[key].origin if key in settings else "default" for key in flatten(config)})


def dumped(value: Any) -> str:
    """A value as YAML on one line, with escapes where PyYAML would not read its own characters back (U+0085)."""
    for allow_unicode in (True, False):
        text = yaml.safe_dump(value, default_flow_style=True, width=2**31, allow_unicode=allow_unicode)
        text = text.removesuffix("\n").removesuffix("\n...")
        if text.isprintable():
            break
    return text


def to_yaml(config: Config, comments: Mapping[str, str] | None = None) -> str:
    """The resolved configuration as YAML that `read_recipe` reads back; `comments` are written behind their keys."""
    lines: list[str] = []
    section = ""
    for key, value in flatten(config).items():
        prefix, dot, name = key.rpartition(".")
        if dot and prefix != section:
            lines.append(f"{prefix}:")
            section = prefix
        text = dumped(list(value) if isinstance(value, tuple) else value)
        comment = "".join(letter if letter.isprintable() else "?" for letter in (comments or {}).get(key, ""))
        lines.append(f"{'  ' if dot else ''}{name}: {text}{'  # ' if comment else ''}{comment}")
    return "\n".join(lines) + "\n"


def from_yaml(path: Path, plugins: Container[str] = ()) -> Config:
    """The Config that `to_yaml` wrote, which extends nothing.

    Args:
        plugins: names package.module:Class or :function that may be imported, besides those that are already.

    Raises: ConfigError, also for another plug-in: reading a file runs no code that it names.
    """
    settings = read_recipe(path, may_extend=False)
    for key in PLUGIN_KEYS:
        name = str(settings[key].value) if key in settings else ""
        if is_plugin(name) and name not in plugins and not is_loaded(name):
            raise ConfigError(
                f"{key} is {name!r} in {path}: code that no `clae train` of yours on this machine used in this folder, so it "
                "is not imported; use --trust if you trust it."
            )
    return build(settings)
