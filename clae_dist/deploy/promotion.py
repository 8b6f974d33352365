"""Move the aliases `champion` and `previous` of a registered model, so that a kill at any point leaves a champion.

`previous` is written first: between the two writes both aliases name the old champion. Every step can be repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from clae_dist.config import Config
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.gate import Facts, Gate, facts_of, failures, measured
from clae_dist.deploy.layout import CONFIG, WEIGHTS
from clae_dist.errors import ConfigError
from clae_dist.reading import ReadError, read_object
from clae_dist.runs.folder import RunFolder
from clae_dist.storage import writing
from clae_dist.tracking.mlflow_registry import CHAMPION, PREVIOUS, Registry, RegistryError, Version

Say = Callable[[str], None]
_PROMOTED, _ROLLED_BACK = "clae.promoted", "clae.rolled_back"


def promote(run_dir: Path, config: Config, gate: Gate, registry: Registry, say: Say) -> list[str]:
    """Make the run's export the champion if it passes the gate; return the rules that it breaks, [] if it is the champion now.

    Raises ConfigError for a run without export or evaluation and for metrics that cannot be compared; RegistryError.
    """
    export = RunFolder(run_dir).export
    candidate = facts_of(run_dir, export, _images_seen(export, run_dir))
    encoder = load_encoder(export)
    found = measured(gate, run_dir, export, encoder)
    candidate = Facts({**candidate.metrics, **found.metrics}, {**candidate.settings, **found.settings})
    # Not of the file, whose header another export of the same weights may write in another order.
    champion, weights = registry.version_of(CHAMPION), encoder.weights_digest()
    # A champion is not compared with itself: after an evaluation with other settings, its facts are to be replaced.
    other = champion if champion and champion.weights != weights else None
    broken = failures(gate, candidate, Facts.of(other.facts) if other else None)
    if broken:
        return broken
    run_key = RunFolder(run_dir).read_identity().run_key
    version = registry.register(export, weights, config.tracking.experiment, run_key, asdict(candidate))
    if champion is not None and champion.number == version.number:
        say(f"version {version.number} of {registry.name} is the champion already")
        return []
    if registry.aliased(CHAMPION) != (champion.number if champion else ""):
        raise RegistryError(f"another promotion has changed the champion of {registry.name!r} meanwhile; run this one again.")
    _move(registry, version, champion)
    registry.note(version.number, _PROMOTED, f"{_now()} over {champion.number if champion else 'none'}")
    _log(run_dir, {"promoted": version.number, "over": champion.number if champion else "", "model": registry.name})
    say(f"version {version.number} of {registry.name} is the champion at {registry.address}" + _over(champion))
    return []


def _move(registry: Registry, version: Version, champion: Version | None) -> None:
    if champion is not None:
        registry.set_alias(PREVIOUS, champion.number)
    registry.set_alias(CHAMPION, version.number)
    now = registry.aliased(CHAMPION)
    if now != version.number:
        raise RegistryError(f"another promotion has made version {now} the champion of {registry.name!r} at the same time.")


def _over(champion: Version | None) -> str:
    return f", version {champion.number} the previous one" if champion else ""


def roll_back(registry: Registry, reason: str, say: Say) -> None:
    """Give `champion` to the version that `previous` names. Raises RegistryError if there is none."""
    previous, champion = registry.version_of(PREVIOUS), registry.aliased(CHAMPION)
    if previous is None:
        registry.check_exists()
        raise RegistryError(
            f"model {registry.name!r} has no alias {PREVIOUS!r} at {registry.address}, so nothing to roll back to."
        )
    if previous.number == champion:
        say(f"version {champion} of {registry.name} is the champion already")
        return
    registry.set_alias(CHAMPION, previous.number)
    if champion in registry.versions():
        registry.note(champion, _ROLLED_BACK, f"{_now()} {reason}".strip())
    say(f"version {previous.number} of {registry.name} is the champion again, instead of version {champion or 'none'}")


def _images_seen(export: Path, run_dir: Path) -> int:
    try:
        seen: object = read_object(export / CONFIG).get("images_seen")
    except ReadError as error:
        raise ConfigError(f"{export} cannot be used ({error}); run `clae export {run_dir}` first.") from None
    if not isinstance(seen, int) or not (export / WEIGHTS).is_file():
        raise ConfigError(f"{export} is no export; run `clae export {run_dir}` first.")
    return seen


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _log(run_dir: Path, entry: dict[str, str]) -> None:
    path = RunFolder(run_dir).registry_file
    with writing(path), path.open("a") as file:
        file.write(json.dumps({"at": _now(), **entry}) + "\n")
