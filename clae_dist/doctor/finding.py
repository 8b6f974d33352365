"""The result of a check of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    """One line of the table. `advice` says what then does not work and what to do; it is empty for "ok"."""

    level: Literal["ok", "warning", "problem"]
    what: str
    found: str
    advice: str = ""
