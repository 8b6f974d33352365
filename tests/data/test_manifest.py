"""The manifest: what was written is what is read, and nothing that differs passes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clae_dist import __version__, files
from clae_dist.data import manifest as manifests
from clae_dist.data.manifest import Manifest, Shard, check_shard, load_manifest, write_manifest
from clae_dist.errors import DataError
from clae_dist.files import file_sha256

SHARD = {"name": "train-000000.tar", "samples": 2, "bytes": 2560, "sha256": "", "index_sha256": ""}


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """A file that stands for a shard of two samples, with its index."""
    (tmp_path / "train-000000.tar").write_bytes(bytes(range(256)) * 10)
    np.save(tmp_path / "train-000000.index.npy", np.array([[512, 100, 0], [1536, 90, 1]], np.int64))
    shas = [file_sha256(tmp_path / name) for name in ("train-000000.tar", "train-000000.index.npy")]
    return Shard("train-000000.tar", 2, 2560, *shas)


def write(folder: Path, shard: Shard, **changes: object) -> Manifest:
    settings: dict[str, object] = {
        "name": "set",
        "source": "here",
        "licence": "none",
        "classes": ("a", "é"),
        "quarantined": 0,
        "preparation": {"seed": 0},
    }
    return write_manifest(folder, splits={"train": (shard,)}, **{**settings, **changes})  # type: ignore[arg-type]


def test_what_is_written_is_read_back(tmp_path: Path, shard: Shard) -> None:
    written = write(tmp_path, shard)
    assert load_manifest(tmp_path) == written
    assert written.num_samples("train") == 2
    assert written.index(shard).tolist() == [[512, 100, 0], [1536, 90, 1]]
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "train-000000.index.npy", "train-000000.tar"]


def test_the_digest_covers_everything_but_the_time(tmp_path: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path, shard)

    class Later:
        @staticmethod
        def now(_: object) -> datetime:
            return datetime(2001, 1, 1)

    monkeypatch.setattr(manifests, "datetime", Later)
    later = write(tmp_path, shard)
    assert later.created != first.created
    assert later.digest == first.digest
    assert write(tmp_path, replace(shard, sha256="0" * 64)).digest != first.digest
    assert write(tmp_path, shard, preparation={"seed": 1}).digest != first.digest


def test_it_counts_the_classes_and_names_the_version_and_the_digest_covers_both(
    tmp_path: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / shard.index_name, np.array([[512, 100, -1], [1536, 90, 1]], np.int64))
    first = write(tmp_path, shard)
    assert first.class_counts == {"train": (0, 1)}  # the unlabelled image is in no count
    assert first.version == __version__
    np.save(tmp_path / shard.index_name, np.array([[512, 100, 0], [1536, 90, 1]], np.int64))
    assert write(tmp_path, shard).digest != first.digest
    monkeypatch.setattr(manifests, "__version__", "99")
    assert write(tmp_path, shard).version == "99"
    np.save(tmp_path / shard.index_name, np.array([[512, 100, 0], [1536, 90, 2]], np.int64))
    with pytest.raises(DataError, match=r"has the label 2, but there are 2 classes"):
        write(tmp_path, shard)


def test_a_manifest_from_before_classes_were_counted_is_read(tmp_path: Path, shard: Shard) -> None:
    write(tmp_path, shard)
    path = tmp_path / "manifest.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("class_counts", "version")}
    content["digest"] = manifests.content_digest(content)
    path.write_text(json.dumps(content))
    old = load_manifest(tmp_path)
    assert (old.class_counts, old.version, old.num_samples("train")) == ({}, "", 2)


def test_an_edited_manifest_is_refused(tmp_path: Path, shard: Shard) -> None:
    write(tmp_path, shard)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"here"', '"there"'))
    with pytest.raises(DataError, match="does not match its digest"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"text"', "null"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="is not a manifest"):
        load_manifest(tmp_path)


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "clae-dist shards 99"}))
    with pytest.raises(DataError, match="'clae-dist shards 99', this version reads 'clae-dist shards 1'"):
        load_manifest(tmp_path)


def test_missing_folder_and_missing_manifest_say_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder; name the folder"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is empty; name the folder that `python -m data_prep prepare"):
        load_manifest(tmp_path)


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path: Path, shard: Shard) -> None:
    with pytest.raises(DataError, match="no split 'val'; it has train"):
        write(tmp_path, shard).num_samples("val")


def test_an_index_of_another_length_is_refused(tmp_path: Path, shard: Shard) -> None:
    manifest = write(tmp_path, shard)
    np.save(tmp_path / shard.index_name, np.zeros((5, 3), np.int64))
    with pytest.raises(DataError, match=r"holds int64 \(5, 3\), the manifest expects int64 \(2, 3\)"):
        manifest.index(shard)
    (tmp_path / shard.index_name).write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        manifest.index(shard)


def test_check_shard_accepts_what_was_written(tmp_path: Path, shard: Shard) -> None:
    check_shard(tmp_path, shard)
    check_shard(tmp_path, shard, "size")


def test_check_shard_names_what_differs(tmp_path: Path, shard: Shard) -> None:
    path, index = tmp_path / shard.name, tmp_path / shard.index_name
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    for how in ("size", "sha256"):
        with pytest.raises(DataError, match=r"train-000000.tar is 2559 bytes, the manifest expects 2560"):
            check_shard(tmp_path, shard, how)
    path.write_bytes(good[:100] + b"X" + good[101:])
    check_shard(tmp_path, shard, "size")  # what the cheap check cannot see
    with pytest.raises(DataError, match=r"train-000000.tar has sha256 .* the manifest expects"):
        check_shard(tmp_path, shard)
    path.write_bytes(good)
    np.save(index, np.zeros((2, 3), np.int64))
    with pytest.raises(DataError, match=r"train-000000.index.npy has sha256"):
        check_shard(tmp_path, shard)
    index.unlink()
    with pytest.raises(DataError, match=r"train-000000.index.npy is missing"):
        check_shard(tmp_path, shard, "size")


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda npy: npy.replace(b"}", b" ", 1),  # tokenize.TokenError
        lambda npy: b"PK\3\4" + npy[4:],  # zipfile.BadZipFile, and a file left open
        lambda npy: b"",
        lambda npy: npy[:-1],
    ],
)
def test_a_damaged_index_is_a_data_error_whatever_numpy_makes_of_it(tmp_path: Path, shard: Shard, damage: Any) -> None:
    """Found by fuzzing: numpy's reader has errors of its own for damaged headers."""
    path = tmp_path / shard.index_name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-000000.index.npy cannot be read"):
        write(tmp_path, shard).index(shard)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("name", 5, "name is 5"),
        ("classes", ["a", 7], "7 is no str"),
        ("splits", [], "no attribute 'items'"),
        ("quarantined", -1, "quarantined is -1"),
        ("preparation", None, "preparation is None"),
        ("splits", {"train": [{"name": "train-000000.tar"}]}, "missing 4 required"),
        ("splits", {"train": [{**SHARD, "name": "../train-000000.tar"}]}, "no plain file name"),
        ("splits", {"train": [{**SHARD, "name": ""}]}, "no plain file name"),
        ("splits", {"train": [{**SHARD, "name": ".."}]}, "no plain file name"),
        ("splits", {"train": [{**SHARD, "samples": 10**30}]}, "integer of 31 digits"),
        ("splits", {"train": [{**SHARD, "bytes": 0}]}, "bytes is 0"),
    ],
)
def test_a_signed_manifest_of_another_shape_is_refused(
    tmp_path: Path, shard: Shard, key: str, value: object, said: str
) -> None:
    """Found by fuzzing: TypeErrors where the manifest was used, long after it was read."""
    write(tmp_path, shard)
    path = tmp_path / "manifest.json"
    content = {**json.loads(path.read_text()), key: value}
    content["digest"] = manifests.content_digest(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"is not a manifest .*{said}"):
        load_manifest(tmp_path)
