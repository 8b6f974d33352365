"""`clae bench checkpoint` on a small encoder."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_save_to_a_bucket_is_timed_in_turns_with_one_to_a_folder() -> None:
    pytest.importorskip("moto")
    outcome = checkpoint.bench(replace(TINY, bucket=True), lambda text: None)
    folder, bucket = outcome.rows[-2:]
    assert (folder.name, bucket.name) == ("folder", "bucket")
    assert bucket.more["committed_s"] > 5e6 / checkpoint.BYTES_PER_S  # 5 MB over the link
    assert bucket.more["with_work_s"] > bucket.median_s
    assert set(bucket.ratio_to) == {"folder"}
    assert "a save to a bucket blocks for " in outcome.notes[1]


def test_a_bucket_without_its_server_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "checkpoint", "--bucket", "--quick"]) == 2
    assert "moto and s3fs and flask cannot be imported; pip install 'moto[server]' s3fs" in capsys.readouterr().err
    assert cli.main(["bench", "restart", "--bucket"]) == 2
    assert "--bucket is for `clae bench checkpoint`" in capsys.readouterr().err
