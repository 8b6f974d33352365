"""verify names what differs: every kind of damage, done on purpose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clae_dist.data import manifest as manifests
from clae_dist.data.manifest import Manifest, check_shard
from clae_dist.errors import DataError
from data_prep.verify import verify


@pytest.fixture
def prepared(tmp_path: Path, make_folder: Any, run: Any) -> Manifest:
    result: Manifest = run(make_folder({"cat": 6, "dog": 6}), tmp_path / "dst", test_share=0, shard_samples=4)
    return result


def cut(data: bytes) -> bytes:
    return data[:-512]


def flip(data: bytes) -> bytes:
    return data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]


def replaced(data: bytes) -> bytes:
    return bytes(len(data))


@pytest.mark.parametrize("damage", [cut, flip, replaced])
def test_a_damaged_shard_is_named(prepared: Manifest, damage: Callable[[bytes], bytes]) -> None:
    assert verify(prepared.folder) == []
    shard = prepared.splits["train"][1]
    path = prepared.folder / shard.name
    path.write_bytes(damage(path.read_bytes()))
    (line,) = verify(prepared.folder)
    assert "train-000001.tar" in line
    with pytest.raises(DataError, match=r"train-000001.tar"):
        check_shard(prepared.folder, shard)


def test_everything_that_differs_is_named(prepared: Manifest) -> None:
    folder = prepared.folder
    (folder / "train-000000.tar").unlink()
    np.save(folder / "train-000001.index.npy", np.zeros((4, 3), np.int64))
    (folder / "train-000002.tar").write_bytes(b"")
    (folder / "train-000007.tar").write_bytes(b"")
    lines = verify(folder)
    assert len(lines) == 4
    for line, expected in zip(
        lines, ("000000.tar is missing", "001.index.npy has", "002.tar is 0 bytes", "007.tar is not in"), strict=True
    ):
        assert expected in line


def test_an_edited_manifest_is_a_difference_and_a_missing_one_an_error(prepared: Manifest) -> None:
    path = prepared.folder / "manifest.json"
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    (line,) = verify(prepared.folder)
    assert "does not match its digest" in line
    path.unlink()
    with pytest.raises(DataError, match=r"has no manifest.json"):
        verify(prepared.folder)


@pytest.mark.parametrize(
    "row, expected",
    [
        ([10**9, 100, 0], "in 1 rows, first in row 2: [1000000000, 100, 0]"),
        ([1024, 7, 0], "row 2 of the index points at no member of 7 bytes"),
        (None, "1 samples of the index point at the same bytes"),
        ([512, 3, 5], "has the label 5 in row 2, but there are 2 classes"),
    ],
)
def test_an_index_that_is_wrong_but_signed_is_caught(prepared: Manifest, row: list[int] | None, expected: str) -> None:
    """Guards against a preparation that writes wrong offsets: all its digests would match."""
    shard = prepared.splits["train"][0]
    index = prepared.index(shard)
    index[2] = index[1] if row is None else row
    np.save(prepared.folder / shard.index_name, index)
    path = prepared.folder / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"][0]["index_sha256"] = hashlib.sha256(
        (prepared.folder / shard.index_name).read_bytes()
    ).hexdigest()
    content["digest"] = manifests.content_digest(content)
    path.write_text(json.dumps(content))
    assert any(expected in line for line in verify(prepared.folder)), verify(prepared.folder)


def test_fewer_samples_than_the_manifest_says(prepared: Manifest) -> None:
    path = prepared.folder / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"][0]["samples"] = 5
    content["digest"] = manifests.content_digest(content)
    path.write_text(json.dumps(content))
    (line,) = verify(prepared.folder)
    assert "holds int64 (4, 3), the manifest expects int64 (5, 3)" in line
