"""The result of a check of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    """One line of the table. `advice` is the consequence and the way out; empty for "ok"."""

    level: Literal["ok", "warning", "problem"]
    what: str
    found: str
    advice: str = ""
