"""A registered model of MLflow: its versions, and the aliases `champion` and `previous`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from clae_dist.data.urls import uri_without_secrets
from clae_dist.errors import BAD_CONFIG, ClaeError
from clae_dist.tracking.mlflow import RUN_KEY_TAG, connect, find_experiment, refusals, require_mlflow, store_problem
from clae_dist.tracking.mlflow_model import write_model
from clae_dist.tracking.tracker import Refused, brief

CHAMPION, PREVIOUS = "champion", "previous"
_SHOWN = 20  # models that a message names
_WEIGHTS, _FACTS = "clae.weights", "clae.facts"


class RegistryError(ClaeError, RuntimeError):
    """The registry is away or refuses. The message says what has been changed there."""

    exit_code: ClassVar[int] = BAD_CONFIG


@dataclass(frozen=True)
class Version:
    """A version of the model: its number, the digest of its weights, and the facts that its promotion stored."""

    number: str
    weights: str
    facts: Mapping[str, Any]


class Registry:
    """The registered model `name` at `uri`. Nothing there is changed by opening it."""

    def __init__(self, uri: str, name: str) -> None:
        """Raises RegistryError unless the store answers, ConfigError without mlflow."""
        require_mlflow()
        self.name, self.address = name, f"MLflow at {uri_without_secrets(uri)}"
        self._uri = uri
        if urlsplit(uri).scheme in ("", "file"):
            raise RegistryError(
                f"{self.address} is a folder, and a registry of models needs a database; use --uri sqlite:///FILE.db, or a "
                "server such as http://host:5000."
            )
        problem = store_problem(uri)
        if problem:
            raise RegistryError(f"{self.address} {problem}; nothing was changed.")
        with self._asking():
            self._client = connect(uri)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            with refusals():
                yield
        except (Refused, MlflowException, OSError) as error:
            raise RegistryError(f"{self.address} failed ({brief(error)}); run the same command again.") from error

    # ---- read ----

    def versions(self) -> dict[str, Version]:
        """All versions by number; empty if there is no such model."""
        with self._asking():
            found = self._client.search_model_versions(f"name = '{self.name}'")
        return {str(one.version): _version(one) for one in found}

    def check_exists(self) -> None:
        """Raise RegistryError if there is no such model, naming those that are there."""
        with self._asking():
            known = [one.name for one in self._client.search_registered_models(max_results=_SHOWN)]
            if self.name in known or self._client.search_registered_models(f"name = '{self.name}'"):
                return
        raise RegistryError(
            f"{self.address} has no model {self.name!r}; it has {', '.join(sorted(known)) or 'none'}. `clae promote` makes one."
        )

    def aliased(self, alias: str) -> str:
        """The number that the alias names, "" for none. The version may have been deleted."""
        with self._asking():
            models = self._client.search_registered_models(f"name = '{self.name}'")
            if not models:
                return ""
            return str(self._client.get_registered_model(self.name).aliases.get(alias, ""))

    def version_of(self, alias: str) -> Version | None:
        """The version with the alias; None without one. Raises RegistryError if the version was deleted."""
        number = self.aliased(alias)
        if not number:
            return None
        versions = self.versions()
        if number not in versions:
            raise RegistryError(
                f"alias {alias!r} of model {self.name!r} names version {number}, which was deleted; give the alias to another "
                f"version, or delete it, at {self.address}."
            )
        return versions[number]

    # ---- change ----

    def register(self, export: Path, weights: str, experiment: str, run_key: str, facts: Mapping[str, Any]) -> Version:
        """The version of these weights, made unless there is one. Its files are artifacts of the run that trained it."""
        known = next((one for one in self.versions().values() if one.weights == weights), None)
        if known is not None:
            self._store_facts(known.number, facts)
            return Version(known.number, weights, facts)
        with self._asking():
            if not self._client.search_registered_models(f"name = '{self.name}'"):
                self._client.create_registered_model(self.name)
            run = self._run(experiment, run_key)
            folder = f"promoted/{weights[:16]}"
            with tempfile.TemporaryDirectory() as scratch:
                write_model(export, Path(scratch), run_id=run.info.run_id, artifact_path=folder)
                self._client.log_artifacts(run.info.run_id, str(export), folder)
                self._client.log_artifacts(run.info.run_id, scratch, folder)
            source = f"{run.info.artifact_uri}/{folder}"
            made = self._client.create_model_version(self.name, source, run.info.run_id, tags={_WEIGHTS: weights})
        self._store_facts(str(made.version), facts)
        return Version(str(made.version), weights, facts)

    def _run(self, experiment: str, run_key: str) -> Any:
        """The run of this key, made if training was not tracked here."""
        place = find_experiment(self._client, self._uri, experiment)
        found = self._client.search_runs([place], f"tags.`{RUN_KEY_TAG}` = '{run_key}'") if run_key else []
        if found:
            return found[0]
        run = self._client.create_run(place, tags={RUN_KEY_TAG: run_key} if run_key else {}, run_name=self.name)
        self._client.set_terminated(run.info.run_id)
        return run

    def _store_facts(self, number: str, facts: Mapping[str, Any]) -> None:
        with self._asking():
            self._client.set_model_version_tag(self.name, number, _FACTS, json.dumps(facts, sort_keys=True))

    def set_alias(self, alias: str, number: str) -> None:
        with self._asking():
            self._client.set_registered_model_alias(self.name, alias, number)

    def note(self, number: str, tag: str, text: str) -> None:
        """Set a tag of a version."""
        with self._asking():
            self._client.set_model_version_tag(self.name, number, tag, text)


def _version(found: Any) -> Version:
    try:
        facts = json.loads(found.tags.get(_FACTS, "{}"))
    except ValueError:
        facts = {}
    return Version(str(found.version), str(found.tags.get(_WEIGHTS, "")), facts if isinstance(facts, dict) else {})
