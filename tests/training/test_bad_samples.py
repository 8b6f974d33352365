"""The list of samples that cannot be decoded, where it cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clae_dist.errors import DataError
from clae_dist.runs.folder import BAD_SAMPLES_FILE
from clae_dist.training.bad_samples import BadSamples
from clae_dist.world import World


def test_a_list_that_cannot_be_written_is_said_and_written_later(tmp_path: Path) -> None:
    """A full disk ended the run here, for a list that the checkpoint holds, too."""
    said: list[str] = []
    folder = tmp_path / "gone"
    bad = BadSamples(2, 100, folder, {})
    bad.add({"sample 1": "cut"}, World.single("cpu"), said.append)
    assert any(f"{BAD_SAMPLES_FILE} cannot be written (" in line for line in said)
    folder.mkdir()
    bad.add({"sample 2": "cut"}, World.single("cpu"), said.append)
    assert [json.loads(line)["sample"] for line in (folder / BAD_SAMPLES_FILE).read_text().splitlines()] == [
        "sample 1",
        "sample 2",
    ]
    with pytest.raises(DataError, match="3 of 100 images cannot be decoded"):
        bad.add({"sample 3": "cut"}, World.single("cpu"), said.append)
