"""The environment variables that describe ranks, checked before use."""

from __future__ import annotations

import os
import socket

from clae_dist.errors import ConfigError

_COUNTS = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}  # and the least of each
_WAY_OUT = "Start ranks with torchrun (launch/torchrun.sh), or unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."


def check_ranks() -> None:
    """Raise ConfigError for variables of a launcher that are no integers, out of range, or incomplete."""
    values: dict[str, int] = {}
    for name, least in _COUNTS.items():
        text = os.environ.get(name)
        if text is None:
            continue
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise ConfigError(f"{name} is {text!r} in the environment; expected an integer from {least}. {_WAY_OUT}")
        values[name] = int(text)
    size, rank = values.get("WORLD_SIZE", 1), values.get("RANK")
    if size > 1 and rank is None:
        raise ConfigError(f"WORLD_SIZE is {size} in the environment, but RANK is not set. {_WAY_OUT}")
    if rank is not None and rank >= size:
        raise ConfigError(f"RANK is {rank} in the environment, but WORLD_SIZE is {size}. {_WAY_OUT}")


def check_interface() -> None:
    """Raises ConfigError where GLOO_SOCKET_IFNAME names an interface that this machine does not have."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    here = [name for _, name in socket.if_nameindex()]
    missing = [name for name in chosen.split(",") if name and name not in here]
    if missing:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME is {chosen!r} in the environment, but this machine has no interface {missing[0]}; unset it, "
            f"or name one of {', '.join(here)}."
        )
