"""`clae bench checkpoint` on a small encoder."""

from __future__ import annotations

import json

import pytest
import torch

from clae_dist import cli
from clae_dist.bench import checkpoint
from clae_dist.bench.measure import UnequalError
from clae_dist.runs.checkpoint import Checkpoint

TINY = checkpoint.CheckpointBench("small_resnet", 16, repeats=2)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # async_save without a process group
def test_rows_beside_a_copy_and_torchs_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checkpoint, "QUICK", TINY)
    assert cli.main(["bench", "checkpoint", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["what"].split(":")[0]: row for row in found["rows"]}
    assert list(rows) == ["ours", "copy", "torch_save", "torch_save_fsync", "async_save"]
    assert all(row["median_s"] > 0 and row["floor_s"] == rows["copy"]["median_s"] for row in rows.values())
    assert rows["ours"]["more"]["committed_s"] > rows["ours"]["median_s"]
    assert rows["ours"]["more"]["written_bytes"] > 1e6
    assert "of copy (bar 1.5: " in found["notes"][0]


def test_a_save_that_changes_a_bit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Checkpoint.__getitem__

    def changed(found: Checkpoint, name: str) -> torch.Tensor:
        value = read(found, name)
        return -value if name == "model/projector.2.bias" else value

    monkeypatch.setattr(Checkpoint, "__getitem__", changed)
    with pytest.raises(UnequalError, match=r"model/projector.2.bias is not what was saved"):
        checkpoint.bench(TINY, lambda text: None)
