"""Checkpoints: one file a step, written whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clae_dist.config import Config, ConfigError
from clae_dist.models import PretrainModel, build_model
from clae_dist.recipe import from_yaml

_NAME = re.compile(r"step-(\d{8})\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; older ones are untouched."""


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def save_checkpoint(run_dir: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `state` as the checkpoint of `step` and deletes all but the newest `keep`.

    The file gets its name only when its bytes are on the disk: whatever happens before, the older ones stay the newest.
    Raises CheckpointError.
    """
    folder = run_dir / "checkpoints"
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        older = find_checkpoints(run_dir)
        rest = f"{older[0].name} is untouched" if older else "there is no older one"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}); {rest}. "
            "Free some space and start the same command again: it goes on from there."
        ) from None
    for old in find_checkpoints(run_dir)[keep:]:
        old.unlink()
    return path


def load_checkpoint(run_dir: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The state of the newest checkpoint that can be read whole, or None without any; damaged ones are named.

    Raises ConfigError when there are checkpoints and none can be read.
    """
    found = find_checkpoints(run_dir)
    for path in found:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = " ".join(repr(error).split())[:120]
            say(f"{path} cannot be read ({reason}); trying the one before.")
            continue
        return state
    if found:
        raise ConfigError(
            f"run_dir is {str(run_dir)!r}, where none of the {len(found)} checkpoints can be read; "
            "delete the folder to start anew."
        )
    return None


def load_model(run_dir: Path) -> tuple[Config, PretrainModel, dict[str, Any]]:
    """A run's configuration, its model with the (averaged) weights of the newest whole checkpoint, and {"step", "images_seen"}.

    The model is on the CPU, in evaluation mode. Raises ConfigError without a run folder or checkpoint.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"RUN is {str(run_dir)!r}, which holds no config.yaml; name the folder of a run, such as runs/clae.")
    config = from_yaml(run_dir / "config.yaml")
    state = load_checkpoint(run_dir, print)
    if state is None:
        raise ConfigError(f"RUN is {str(run_dir)!r}, which holds no checkpoint yet; start `clae train` with run_dir={run_dir}.")
    model = build_model(config)
    model.load_state_dict(state.get("average", state["model"]))
    return config, model.eval(), {"step": state["step"], "images_seen": state["images_seen"]}
