"""Results that a run leaves at its end: the encoder as a model of its tracker, and doubted labels."""

from __future__ import annotations

from collections.abc import Callable

from clae_dist.config import Config
from clae_dist.data.manifest import Manifest
from clae_dist.deploy.export import export_encoder
from clae_dist.errors import ConfigError
from clae_dist.parallel import Backend
from clae_dist.tracking import Tracker
from clae_dist.training.session import Session
from clae_dist.training.suspects import write_suspects

Say = Callable[[str], None]


def leave_results(session: Session, backend: Backend, train: Manifest, tracker: Tracker) -> None:
    """On rank 0; elsewhere nothing."""
    config, say = session.config, session.say
    if not session.world.is_main:
        return
    if "belief" in backend.method_state:
        say(write_suspects(config, backend.method_state, train))
    if config.tracking.uses("mlflow"):
        log_encoder(config, tracker, train, say)


def log_encoder(config: Config, tracker: Tracker, manifest: Manifest, say: Say) -> None:
    """Log the encoder as a model. The run is complete and saved: a failure here is printed and does not undo it."""
    try:
        tracker.log_model(export_encoder(config.folder), manifest.digest)
    except (ConfigError, OSError) as error:
        say(f"the encoder was not logged ({error}); `clae export {config.folder}` tries again.")
