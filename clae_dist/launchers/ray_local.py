"""Ray Train's process group for workers that are all on this machine: its store is on loopback, as that of local ranks."""

from __future__ import annotations

import os
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend, get_address_and_port

from clae_dist.launchers.loopback import ADDRESS, loopback_store, use_loopback

_KEPT: list[Any] = []  # the store of the worker that serves it


def _prepare() -> None:
    """On every worker: the store is served already, so that no rank opens one on all interfaces."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    use_loopback()


def _serve() -> tuple[str, int]:
    """On the first worker: where it serves the store."""
    _KEPT[:] = [loopback_store()]
    return ADDRESS, _KEPT[0].port


class _Workers:
    """Ray's worker group, in which the first worker answers with a store's address when it is asked for an address."""

    def __init__(self, workers: Any) -> None:
        self._workers = workers

    def __len__(self) -> int:
        return len(self._workers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workers, name)

    def execute_single(self, index: int, function: Any, *arguments: Any, **settings: Any) -> Any:
        chosen = _serve if function is get_address_and_port else function
        return self._workers.execute_single(index, chosen, *arguments, **settings)


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_prepare)
        super().on_start(_Workers(worker_group), backend_config)


class LoopbackTorchConfig(TorchConfig):
    """TorchConfig for workers of this machine."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
