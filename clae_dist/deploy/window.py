"""Embeddings of a file that `clae embed` wrote.

# N rows, F width of the features
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clae_dist.deploy.embedding import LOOKS
from clae_dist.errors import ConfigError
from clae_dist.reading import ReadError, read_object


@dataclass(frozen=True)
class Window:
    """float32 features (N, F), the id of each row, and what the file says of its encoder. `looks`: (N,) by name (looks_of)."""

    name: str
    features: torch.Tensor
    ids: list[Any]
    facts: Mapping[str, Any]
    looks: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)


def read_window(path: Path) -> Window:
    """Raises ConfigError for a file that is none of `clae embed`, or has rows that are not finite."""
    readers = {".npy": _read_npy, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ConfigError(f"{str(path)!r} is no file of embeddings; give a FILE.npy or FILE.parquet that `clae embed` wrote.")
    try:
        window = readers[path.suffix](path)
    except (OSError, ReadError, ValueError, KeyError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as embeddings ({error}); write it again with `clae embed`.") from None
    bad = int((~window.features.isfinite().all(1)).sum())
    if bad:
        raise ConfigError(f"{str(path)!r} has {bad} rows with NaN or infinity; embed these images again, or leave them out.")
    return window


def check_same_encoder(reference: Window, window: Window) -> None:
    """Raises ConfigError if the rows are of different encoders, whose features cannot be compared."""
    for key in ("num_features", "encoder", "weights"):
        ours, theirs = reference.facts.get(key), window.facts.get(key)
        if ours != theirs:
            raise ConfigError(
                f"{window.name!r} was embedded by another encoder than the reference ({key} is {theirs}, not {ours}); embed "
                "both with the same one."
            )


def _read_npy(path: Path) -> Window:
    features = np.load(path, allow_pickle=False)
    facts = read_object(path.with_suffix(".ids.json"))
    if features.ndim != 2 or len(facts["ids"]) != len(features):
        raise ValueError(f"{features.shape} features with {len(facts['ids'])} ids")
    looks = {
        name: torch.tensor(facts[name], dtype=torch.float32) for name in LOOKS if len(facts.get(name, ())) == len(features)
    }
    return Window(str(path), torch.from_numpy(features.astype(np.float32)), list(facts["ids"]), facts, looks)


def _read_parquet(path: Path) -> Window:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"{str(path)!r} needs pyarrow; pip install 'pyarrow>=17', or write a .npy file.") from None
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
    facts = json.loads((table.schema.metadata or {})[b"clae-dist"])
    rows = table.column("embedding").combine_chunks()
    features = np.array(rows.flatten(), dtype=np.float32).reshape(len(rows), -1)
    looks = {name: torch.tensor(table.column(name).to_numpy()) for name in LOOKS if name in table.column_names}
    return Window(str(path), torch.from_numpy(features), table.column("id").to_pylist(), facts, looks)
