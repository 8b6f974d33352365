"""Who starts the ranks: this process (local), torchrun or Ray Train. No training logic."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clae_dist.config import Config
    from clae_dist.launchers.rank import Ending


def start(config: Config, origins: dict[str, str], debug: bool = False) -> Ending:
    """Trains under the launcher that `launch.launcher` names. Raises ConfigError and DataError."""
    import importlib

    from clae_dist.runs.folder import STOP_FILE, make_folder

    make_folder(config.folder)
    (config.folder / STOP_FILE).unlink(missing_ok=True)  # a request that a killed launcher left behind
    launcher = importlib.import_module(f"clae_dist.launchers.{config.launch.launcher}")
    ending: Ending = launcher.launch(config, origins, debug)
    return ending
