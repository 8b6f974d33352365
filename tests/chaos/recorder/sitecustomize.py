"""Imported by every Python process that has this folder on its path: ranks then write down which images they took.

A line a batch, {"time", "pid", "step", "rank", "size", "ids"}, in a file a process of the folder that CLAE_RECORD names. The
project itself has no such option: training knows nothing of being watched.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

_WATCHED = "clae_dist.data.loader"


class _Watch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the loader's module as it is, then puts a recording `load` in the place of its own."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        self._real, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        real = module.load

        def load(manifest: Any, config: Any, world: Any, first_step: int, last_step: int) -> Iterator[Any]:
            path = os.path.join(os.environ["CLAE_RECORD"], f"{time.time_ns()}-{os.getpid()}.jsonl")
            with open(path, "a") as file:
                for step, batch in enumerate(real(manifest, config, world, first_step, last_step), first_step):
                    taken = {"step": step, "rank": world.rank, "size": world.size, "ids": batch.ids.tolist()}
                    file.write(json.dumps({"time": time.time(), "pid": os.getpid(), **taken}) + "\n")
                    file.flush()
                    yield batch

        module.load = load


if os.environ.get("CLAE_RECORD"):
    sys.meta_path.insert(0, _Watch())
