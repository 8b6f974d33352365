"""The trained encoder as a model of the run's tracker."""

from __future__ import annotations

from collections.abc import Callable

from clae_dist.config import Config
from clae_dist.data.manifest import Manifest
from clae_dist.deploy.export import export_encoder
from clae_dist.errors import ConfigError
from clae_dist.tracking import Tracker

Say = Callable[[str], None]


def log_encoder(config: Config, tracker: Tracker, manifest: Manifest, say: Say) -> None:
    """Log the encoder as a model. The run is complete and saved: a failure here is printed and does not undo it."""
    try:
        tracker.log_model(export_encoder(config.folder), manifest.digest)
    except (ConfigError, OSError) as error:
        say(f"the encoder was not logged ({error}); `clae export {config.folder}` tries again.")
