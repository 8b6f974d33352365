"""Ranks that are all on this machine talk over loopback: nothing that they open can be reached from elsewhere."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist

from clae_dist.launchers.route import route_to

ADDRESS = "127.0.0.1"
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def loopback_store() -> dist.TCPStore:
    """A store that this process serves on a port of loopback alone; TCPStore by itself listens on every interface."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.bind((ADDRESS, 0))
    port = int(listening.getsockname()[1])
    # From here on the store owns the descriptor.
    return dist.TCPStore(ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def use_loopback() -> None:
    """Has gloo and NCCL of this process, and of those that it starts, use loopback, where the user chose no interface."""
    try:
        interface = route_to(ADDRESS).interface
    except OSError:  # a container without one: their own choice
        return
    for name in _INTERFACES:
        os.environ.setdefault(name, interface)
