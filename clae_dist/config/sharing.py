"""The configuration without secrets, for files and servers that other people read."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from clae_dist.config import Config
from clae_dist.redact import redact_text, uri_without_secrets, without_secrets


def shareable(config: Config) -> Config:
    """The configuration without secrets in URLs, as it is written to files and trackers that other people read."""
    mixture = {without_secrets(name): share for name, share in config.data.mixture.items()}
    kept: Config = _redacted(config)
    return replace(
        kept,
        data=replace(kept.data, shards=without_secrets(config.data.shards), mixture=mixture),
        tracking=replace(kept.tracking, uri=uri_without_secrets(config.tracking.uri)),
    )


def _redacted(section: Any) -> Any:
    """A section and its subsections with every string redacted, as any of them may hold a URL."""
    values = {one.name: getattr(section, one.name) for one in fields(section)}
    texts = {name: redact_text(value) for name, value in values.items() if isinstance(value, str)}
    sections = {name: _redacted(value) for name, value in values.items() if is_dataclass(value)}
    return replace(section, **texts, **sections)
