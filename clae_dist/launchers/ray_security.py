"""Who may use the Ray that a run starts or joins: this machine alone, or whoever has the cluster's token.

Whoever reaches a Ray without a token runs code on all of its hosts.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from clae_dist.errors import ConfigError
from clae_dist.launchers.loopback import use_loopback

OLDEST = (2, 60)  # older ones start clusters without a token by default
ALLOW = "CLAE_RAY_WITHOUT_TOKEN"  # =yes: the user's own decision
_LOOPBACK = re.compile(r"(ray://)?(local|localhost|127\.[\d.]+|\[?::1\]?)(:\d+)?")


def check_version(version: str) -> None:
    """Raises ConfigError for a Ray that starts clusters without a token."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise ConfigError(f"Ray is {version}, whose clusters may have no token; pip install 'ray[train]>=2.60'.")


def secure_ray() -> None:
    """Before Ray is imported: a Ray of this machine is on loopback and has a token of its own; a cluster must have one.

    Raises ConfigError for a cluster without one that others can reach.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        if not has_token() and not _LOOPBACK.fullmatch(address) and os.environ.get(ALLOW) != "yes":
            mode = os.environ.get("RAY_AUTH_MODE", "")
            raise ConfigError(
                f"RAY_ADDRESS is {address!r}, but there is no token (RAY_AUTH_MODE is {mode!r}): whoever reaches that cluster "
                "can run code on its hosts. Start it with launch/ray-cluster.sh, which makes a token, or name the cluster's "
                f"(RAY_AUTH_TOKEN_PATH); {ALLOW}=yes does without."
            )
        return
    # Ray's own switch for a cluster of one machine: else it listens on all interfaces.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        del os.environ["RAY_AUTH_MODE"]  # Ray's default is the token
    # Of this process alone: Ray would leave one in a file that others can read.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    use_loopback()


def has_token() -> bool:
    """True if Ray is going to ask for a token, and has one."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return False
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or Path("~/.ray/auth_token").expanduser().is_file()
