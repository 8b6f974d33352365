"""A host that fails in the first step of every start."""

from __future__ import annotations

import os
from pathlib import Path

KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
BAD_GPU = "raise torch.AcceleratorError('CUDA error: uncorrectable ECC error encountered')"

_SITE = """
import platform
if platform.node() == {host!r}:
    import importlib.abc, os, signal, sys
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == {module!r}:
                sys.meta_path.remove(self)
                import torch
                import clae_dist.contrast.step as contrast_step
                def pretrain_step(*arguments):
                    {how}
                contrast_step.pretrain_step = pretrain_step
            return None
    sys.meta_path.insert(0, Finder())
"""


def break_host(folder: Path, host: str, how: str) -> dict[str, str]:
    """The environment in which ranks on `host` do `how` instead of a step."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE.format(host=host, how=how, module="clae_dist.training.train"))
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
