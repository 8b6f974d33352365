"""The copy of a run's initial weights in its folder (`model.init`)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from clae_dist.config import Model
from clae_dist.errors import ConfigError
from clae_dist.models.norms import load_every_route
from clae_dist.reading import ReadError, open_regular
from clae_dist.runs.folder import RunFolder


def load_initial(settings: Model, run_dir: Path, encoder: nn.Module) -> None:
    """Put the weights that the run began with into `encoder`, along every route of its norm layers, where it has any.

    Raises ConfigError if the copy is missing or damaged.
    """
    if settings.init:
        load_every_route(encoder, read_weights(RunFolder(run_dir).initial_weights))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file. Raises ConfigError if it cannot be read."""
    try:
        with open_regular(path) as file:
            return load(file.read())
    except (ReadError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the weights in {str(path)!r} cannot be read ({reason}); name or restore a complete file.") from None
