"""`data_prep index`: existing shards get a manifest that verify and training accept; the shards stay as they are."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Batch, Config, Data
from clae_dist.data.loader import load
from clae_dist.data.manifest import load_manifest
from clae_dist.data.shard_set import open_shards
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import DataError
from clae_dist.world import World
from data_prep import index as indexing
from data_prep.index import IndexSettings, index
from data_prep.verify import verify


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of 10 images, train and val, without a manifest."""
    folder = tmp_path / "shards"
    write_synthetic_set(folder, 20, 20, num_shards=2)
    for path in [*folder.glob("*.npy"), folder / "manifest.json"]:
        path.unlink()
    for number in range(2):
        (folder / f"test-{number:06d}.tar").rename(folder / f"x-val-{number:06d}.tar")
    return folder


def made(*shards: object, to: Path | None = None, said: list[str] | None = None, **options: Any) -> Any:
    settings = IndexSettings(**{key: options.pop(key) for key in ("classes", "name") if key in options})
    lines: list[str] = [] if said is None else said
    return index([str(shard) for shard in shards], to, settings, **{"num_workers": 0, "say": lines.append, **options})


def spoil(tar: Path, number: int) -> None:
    with tarfile.open(tar) as opened:
        member = [m for m in opened if m.name.endswith(".jpg")][number]
    content = bytearray(tar.read_bytes())
    content[member.offset_data : member.offset_data + 8] = b"notaJPEG"
    tar.write_bytes(content)


def test_verify_and_training_accept_it_and_the_shards_stay(shards: Path) -> None:
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    said: list[str] = []
    manifest = made(shards, said=said, name="mine")
    assert {name: path.read_bytes() for name in before if (path := shards / name)} == before
    assert (manifest.name, manifest.classes) == ("mine", ("0", "1"))
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {"train": 20, "test": 20}
    assert "x-val-000000.tar become the split test" in "\n".join(said)
    assert verify(shards) == []
    assert not list(shards.glob(".*"))
    config = Config(data=Data(shards=str(shards), image_size=16, workers=0), batch=Batch(global_size=10))
    seen = [batch.ids.tolist() for batch in load(open_shards(config.data), config, World.single("cpu"), 0, 2)]
    assert sorted(seen[0] + seen[1]) == list(range(20))
    assert made(shards).digest == manifest.digest  # a second time there is nothing to do
    (shards / "train-000000.tar").write_bytes(before["train-000001.tar"] + bytes(512))
    with pytest.raises(DataError, match="has a manifest.json of other shards"):
        made(shards)


def test_links_where_the_shards_cannot_be_written(shards: Path, tmp_path: Path) -> None:
    manifest = made(str(shards / "train-{000000..000001}.tar"), to=tmp_path / "to")
    assert list(manifest.splits) == ["train"]
    assert verify(tmp_path / "to") == []
    assert (tmp_path / "to/train-000000.tar").is_symlink()
    assert len(list(shards.iterdir())) == 4


def test_bad_images_are_left_out_and_listed(shards: Path) -> None:
    spoil(shards / "train-000001.tar", 3)
    with pytest.raises(DataError, match=r"1 of 40 images are bad, more than --max-bad 0\.01 allows, such as train-0"):
        made(shards)
    manifest = made(shards, max_bad=0.1)
    (line,) = (shards / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "train-000001.tar/000013"
    assert (manifest.num_samples("train"), manifest.quarantined) == (19, 1)
    assert verify(shards) == []


def test_labels_get_names(shards: Path) -> None:
    assert made(shards, classes=("cat", "dog")).classes == ("cat", "dog")
    (shards / "manifest.json").unlink()
    with pytest.raises(DataError, match="has the label 1, but --classes names only 0 to 0"):
        made(shards, classes=("cat",))


def shard_of(path: Path, image: bytes, labels: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            for name, data in ((f"{number}.jpg", image), (f"{number}.cls", label)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_labels_that_are_names(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    """Each shard numbers the names that it has; the set numbers them all, and a number among them is a name, too."""
    folder, lines = tmp_path / "shards", list[str]()
    folder.mkdir()
    wanted = [[b"dog", b"cat"], [b"ant", b"dog", b"ant"], [b"7", b"-2"]]
    for number, labels in enumerate(wanted):
        shard_of(folder / f"train-{number}.tar", encoded(0), labels)
    manifest = made(folder, to=tmp_path / "to", said=lines)
    assert manifest.classes == ("7", "ant", "cat", "dog")
    found = [
        [manifest.classes[label] if label >= 0 else "" for label in manifest.index(shard)[:, 2]]
        for shard in manifest.splits["train"]
    ]
    assert found == [["dog", "cat"], ["ant", "dog", "ant"], ["7", ""]]
    assert "Labels that are neither names nor non-negative integers, ignored: 1, such as '1.cls (-2 is negative)'." in lines
    assert "Images of train without a label (-1): 1 of 7." in lines
    assert verify(tmp_path / "to") == []
    with pytest.raises(DataError, match=r"train-1\.tar has the label 'ant', which --classes does not name"):
        made(folder, to=tmp_path / "other", classes=("dog", "cat", "7"))
    assert made(folder, to=tmp_path / "other", classes=("dog", "cat", "7", "ant")).classes == ("dog", "cat", "7", "ant")


def test_ids_with_gaps_are_names(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    """There were a million classes for six images."""
    (folder := tmp_path / "shards").mkdir()
    for number, labels in enumerate(([b"999999", b"7"], [b"123456", b"7", b"1000000000000"])):
        shard_of(folder / f"train-{number}.tar", encoded(0), labels)
    manifest = made(folder, to=tmp_path / "to")
    assert manifest.classes == ("7", "123456", "999999", "1000000000000")
    assert manifest.class_counts == {"train": (2, 1, 1, 1)}
    assert [manifest.index(shard)[:, 2].tolist() for shard in manifest.splits["train"]] == [[2, 0], [1, 0, 3]]
    assert verify(tmp_path / "to") == []
    with pytest.raises(DataError, match="has the label 1000000000000, but --classes names only 0 to 1"):
        made(folder, to=tmp_path / "other", classes=("cat", "dog"))


def test_names_in_two_forms_of_unicode_are_one_class(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    shard_of(tmp_path / "a.tar", encoded(0), ["café".encode(), "cafe\u0301".encode(), b"bar"])
    manifest = made(tmp_path / "a.tar", to=tmp_path / "to")
    assert (manifest.classes, manifest.class_counts) == (("bar", "café"), {"train": (1, 2)})


def test_images_without_labels(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(encoded(number))
            tar.addfile(info, io.BytesIO(encoded(number)))
    manifest = made(tmp_path / "plain.tar", to=tmp_path / "to")
    assert (manifest.classes, manifest.num_samples("train")) == ((), 3)
    assert verify(tmp_path / "to") == []


def test_an_interrupted_run_goes_on(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done, most = indexing.index_shard, list[str](), 2

    def work(task: Any, report: Any) -> Any:
        if len(done) == most:
            raise KeyboardInterrupt
        done.append(task.tar.name)
        return real(task, report)

    monkeypatch.setattr(indexing, "index_shard", work)
    with pytest.raises(KeyboardInterrupt):
        made(shards)
    assert not (shards / "manifest.json").exists()
    (shards / done[0]).touch()  # may have changed: it is looked at again
    kept, most, said = done[1], 99, []
    done.clear()
    made(shards, said=said)
    assert "1 of 4 shards were checked before and are kept." in said
    assert len(done) == 3
    assert kept not in done
    assert verify(shards) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.tar", "nothing.tar is no shard"),
        (".", "is no shard: no file .tar"),
        ("https://user:pass@host/x.tar", r"https://host/x\.tar is not on this machine"),
    ],
)
def test_what_is_no_shard_is_said(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(name if "://" in name else tmp_path / name)


def test_a_damaged_shard_is_named_before_any_image_is_looked_at(shards: Path) -> None:
    (shards / "train-000001.tar").write_bytes((shards / "train-000001.tar").read_bytes()[:-10_000])
    with pytest.raises(DataError, match=r"train-000001\.tar .*cut short"):
        made(shards)
    assert not (shards / "manifest.json").exists()


def test_shards_of_several_folders_need_a_place(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "b")
    for path in (tmp_path / "b").iterdir():
        os.rename(path, path.with_name("b-" + path.name))
    with pytest.raises(DataError, match="several folders"):
        made(shards, tmp_path / "b")
    assert made(shards, tmp_path / "b", to=tmp_path / "to").num_samples("train") == 40
    with pytest.raises(DataError, match=r"two shards are called train-000000\.tar"):
        made(shards, shards)


def test_the_command(shards: Path, tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    done = command("index", shards, "--classes", tmp_path / "classes.txt", "--licence", "mine", "--workers", "2")
    assert (done.returncode, "40 of 40 images" in done.stderr) == (0, True), done.stderr
    manifest = load_manifest(shards)
    assert (manifest.licence, manifest.classes) == ("mine", ("cat", "dog"))
    assert command("verify", shards).returncode == 0
    failed = command("index", tmp_path / "nowhere")
    assert (failed.returncode, "is no shard" in failed.stderr) == (2, True)
