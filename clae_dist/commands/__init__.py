"""The commands of `clae`, one module each: arguments, output and exit code.

A command's module has `SUMMARY` (a line of `clae --help`), `add_arguments(parser)` and `run(arguments) -> int`, and optionally
`DESCRIPTION`. Its top level imports nothing slow (torch, numpy, …), so that a wrong argument is answered at once; `run` imports
the code that does the work.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# In the order of `clae --help`.
NAMES = (
    "train",
    "finetune",
    "config",
    "plan",
    "dry-run",
    "evaluate",
    "report",
    "compare",
    "runs",
    "status",
    "study",
    "export",
    "embed",
    "search",
    "monitor",
    "promote",
    "rollback",
    "checkpoints",
    "replay",
    "parity",
    "bench",
    "doctor",
    "verify",
    "completion",
)


def module_of(name: str) -> ModuleType:
    """The module of the command `name`."""
    return importlib.import_module(f"clae_dist.commands.{name.replace('-', '_')}")
