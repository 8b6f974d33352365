"""The page about run folders: its code reads a checkpoint, and its table has every name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from clae_dist.runs.folder import FILES, FOLDERS, RunFolder
from tests.checkpoints import write_checkpoint

TEXT = (Path(__file__).parents[2] / "clae_dist" / "runs" / "README.md").read_text()


def test_its_code_reads_a_checkpoint(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    weights = {"model/a": torch.arange(12.0).reshape(3, 4), "model/b": torch.tensor(3)}
    write_checkpoint(tmp_path, 7, weights)
    names: dict[str, Any] = {}
    exec(code, names)
    for name, value in weights.items():
        assert torch.equal(names["read_tensor"](RunFolder(tmp_path).checkpoint(7), name), value)


def test_its_table_has_every_name() -> None:
    table = TEXT.partition("## Layout")[2].partition("## Checkpoint")[0]
    words = set(re.findall(r"`([\w.-]+)", table))
    assert words >= FILES | FOLDERS - {"ray"}, FILES | FOLDERS - words
