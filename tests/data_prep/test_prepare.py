"""From a folder to shards: what is in them, how bad images are set aside, what is refused."""

from __future__ import annotations

import gc
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clae_dist.data.decode import decode_rgb
from clae_dist.data.manifest import Manifest, load_manifest
from clae_dist.errors import DataError
from data_prep.verify import verify

Run = Callable[..., Manifest]
Folder = Callable[..., Path]
Encoded = Callable[..., bytes]


def read_all(manifest: Manifest) -> dict[str, tuple[str, bytes, int]]:
    """By key: (split, image bytes, label), read with tarfile, and compared with what the index points at."""
    found: dict[str, tuple[str, bytes, int]] = {}
    for split, shards in manifest.splits.items():
        for shard in shards:
            data = (manifest.folder / shard.name).read_bytes()
            with tarfile.open(manifest.folder / shard.name) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
                assert all((member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644) for member in tar)
            images = [(name, content) for name, content in members.items() if not name.endswith(".cls")]
            for (name, content), (offset, size, label) in zip(images, manifest.index(shard).tolist(), strict=True):
                key = name.rpartition(".")[0]
                assert data[offset : offset + size] == content
                assert int(members[key + ".cls"]) == label
                found[f"{split}:{key}"] = (split, content, label)
    return found


def test_every_image_is_in_the_shards_with_its_own_bytes_and_label(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    source = make_folder({"train/dog": 7, "train/cat": 6, "test/cat": 2, "test/dog": 3})
    manifest = run(source, tmp_path / "dst", shard_samples=5)
    assert manifest.classes == ("cat", "dog")
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {"train": 13, "test": 5}
    assert [shard.samples for shard in manifest.splits["train"]] == [4, 4, 5]
    found = read_all(manifest)
    for split, name, label in (("train", "cat", 0), ("train", "dog", 1), ("test", "cat", 0), ("test", "dog", 1)):
        for path in (source / split / name).iterdir():
            assert found.pop(f"{split}:{name}/{path.stem}") == (split, path.read_bytes(), label)
    assert not found
    assert load_manifest(tmp_path / "dst") == manifest
    assert verify(tmp_path / "dst") == []
    left = {path.name for path in (tmp_path / "dst").iterdir() if path.suffix not in (".tar", ".npy")}
    assert left == {"manifest.json", "plan.json"}


def read_with_webdataset(url: str) -> list[dict[str, Any]]:
    import webdataset

    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
    gc.collect()  # it leaves its files to the collector
    return samples


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset does not close what it opens
def test_plain_webdataset_reads_the_shards(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    manifest = run(make_folder({"cat": 4, "dog": 4}), tmp_path / "dst", test_share=0, shard_samples=4)
    urls = str(tmp_path / "dst" / "train-{000000..000001}.tar")
    samples = read_with_webdataset(urls)
    assert sorted((sample["__key__"], sample["cls"]) for sample in samples) == sorted(
        (f"{name}/{number:04d}", label) for label, name in enumerate(("cat", "dog")) for number in range(4)
    )
    assert all(sample["jpg"].shape == (8, 12, 3) for sample in samples)
    assert len(samples) == manifest.num_samples("train")


def test_the_order_is_a_permutation_of_the_seed(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    source = make_folder({"cat": 20, "dog": 20})

    def labels(name: str, **settings: Any) -> list[int]:
        manifest = run(source, tmp_path / name, test_share=0, **settings)
        return [int(label) for shard in manifest.splits["train"] for label in manifest.index(shard)[:, 2]]

    first = labels("a")
    assert sorted(first) == [0] * 20 + [1] * 20
    assert first != sorted(first)
    assert labels("b") == first
    assert labels("c", seed=1) != first
    assert labels("d", shard_samples=7) == first


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, make_folder: Folder, run: Run, content: Any) -> None:
    source = make_folder({"cat": 5, "dog": 5})
    first = run(source, tmp_path / "a")
    for path in source.rglob("*.jpg"):
        os.utime(path, (1, 1))  # a copy of the set has other times
    second = run(source, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert first.digest == second.digest


def test_a_drawn_test_split_has_its_share_of_every_class(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    manifest = run(make_folder({"a": 30, "b": 10, "c": 2, "d": 1}), tmp_path / "dst", test_share=0.2)
    labels = np.concatenate([manifest.index(shard)[:, 2] for shard in manifest.splits["test"]])
    assert np.bincount(labels, minlength=4).tolist() == [6, 2, 1, 0]  # never the last image of a class
    train, test = ({key.split(":")[1] for key, value in read_all(manifest).items() if value[0] == s} for s in ("train", "test"))
    assert not train & test
    assert len(train | test) == 43


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # as above
def test_keys_are_unique_and_hold_no_dots(tmp_path: Path, encoded: Encoded, run: Run) -> None:
    names = ["a.jpg", "a.png", "a.b.jpg", "a_b.jpg", "c d é.JPEG", "__meta__/x.jpg", "deep/er/a.jpg", "x" * 150 + ".jpg"]
    (source := tmp_path / "src").mkdir()
    for seed, name in enumerate(names):
        path = source / "__class.1__" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(seed, "PNG" if name.endswith("png") else "JPEG"))
    manifest = run(source, tmp_path / "dst", test_share=0)
    keys = {key.removeprefix("train:") for key in read_all(manifest)}
    assert keys == {f"class_1__/{name}" for name in ("a", "a-2", "a_b", "a_b-2", "c_d_é", "__meta__/x", "deep/er/a", "x" * 150)}
    assert {sample["__key__"] for sample in read_with_webdataset(str(tmp_path / "dst" / "train-000000.tar"))} == keys


def test_images_without_class_folders_have_no_labels(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    said: list[str] = []
    manifest = run(make_folder({".": 10}), tmp_path / "dst", say=said.append)
    assert manifest.classes == ()
    assert {label for _, _, label in read_all(manifest).values()} == {-1}
    assert "no labels" in " ".join(said)


def test_shards_stay_below_the_limit_of_bytes(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    manifest = run(make_folder({"a": 40}), tmp_path / "dst", test_share=0, shard_bytes=20_000)
    shards = manifest.splits["train"]
    assert len(shards) > 3
    assert max(shard.bytes for shard in shards) <= 20_480  # a tar is padded to records of 10,240 bytes
    assert max(shard.samples for shard in shards) - min(shard.samples for shard in shards) <= 1


# ---- bad images ----


def bomb(width: int, height: int) -> bytes:
    """A whole PNG of one colour: a few thousand bytes that decode to width x height / 8 bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def with_bad(make_folder: Folder, encoded: Encoded) -> Path:
    """Ten good images and four bad ones."""
    source = make_folder({"cat": 5, "dog": 5})
    good = encoded(99)
    (source / "cat" / "cut.jpg").write_bytes(good[: len(good) // 2])
    (source / "cat" / "empty.jpg").write_bytes(b"")
    (source / "dog" / "text.png").write_bytes(b"<html>404</html>")
    (source / "dog" / "bomb.png").write_bytes(bomb(12_000, 12_000))
    assert (source / "dog" / "bomb.png").stat().st_size < 30_000
    return source


def test_bad_images_are_set_aside_listed_and_counted(tmp_path: Path, with_bad: Path, run: Run) -> None:
    said: list[str] = []
    manifest = run(with_bad, tmp_path / "dst", max_bad=0.5, say=said.append)
    lines = [json.loads(line) for line in (tmp_path / "dst" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == ["cat/cut.jpg", "cat/empty.jpg", "dog/bomb.png", "dog/text.png"]
    for line, reason in zip(lines, ("runcated", "0 bytes", "144.0 million pixels", "not an image"), strict=True):
        assert reason in line["reason"]
        assert f"  {line['path']}: {line['reason']}" in said
    assert manifest.quarantined == 4
    assert manifest.num_samples("train") + manifest.num_samples("test") == 10
    assert not {"cut", "empty", "text", "bomb"} & {key.split("/")[-1] for key in read_all(manifest)}


def test_too_many_bad_images_stop_it_and_allowing_more_goes_on(tmp_path: Path, with_bad: Path, run: Run, content: Any) -> None:
    with pytest.raises(
        DataError, match=r"\d of 14 images are bad, more than --max-bad 0.01 allows, such as .*quarantine.jsonl"
    ):
        run(with_bad, tmp_path / "dst", shard_samples=4)
    assert (tmp_path / "dst" / "quarantine.jsonl").exists()
    assert not (tmp_path / "dst" / "manifest.json").exists()
    run(with_bad, tmp_path / "dst", shard_samples=4, max_bad=0.5)
    run(with_bad, tmp_path / "other", shard_samples=4, max_bad=0.5)
    assert content(tmp_path / "dst") == content(tmp_path / "other")


def test_a_class_whose_images_are_all_bad_is_said(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    source = make_folder({"cat": 0, "dog": 5})
    (source / "cat" / "a.jpg").write_bytes(b"")
    said: list[str] = []
    assert run(source, tmp_path / "dst", max_bad=0.5, say=said.append).classes == ("cat", "dog")
    assert "Every image of the class cat was set aside" in " ".join(said)


def test_no_good_image_at_all(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    source = make_folder({"cat": 0})
    (source / "cat" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="no good image left"):
        run(source, tmp_path / "dst", max_bad=1)


def test_odd_images_are_kept_as_they_are_and_decode(tmp_path: Path, make_folder: Folder, encoded: Encoded, run: Run) -> None:
    source = make_folder({"a": 0})
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).convert("CMYK").save(source / "a" / "cmyk.jpg")
    Image.fromarray(noise).convert("L").save(source / "a" / "grey.jpg")
    Image.fromarray(noise).save(source / "a" / "turned.jpg", exif=exif)
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(source / "a" / "wide.png")
    Image.fromarray(noise).quantize(8).save(source / "a" / "palette.png", transparency=3)
    for format in ("gif", "webp"):
        frames = [Image.fromarray(noise), Image.fromarray(255 - noise)]
        frames[0].save(source / "a" / f"moving.{format}", save_all=True, append_images=frames[1:])
    (source / "a" / "really_a.png").write_bytes(encoded(1, "JPEG"))  # ImageNet has such files
    found = read_all(run(source, tmp_path / "dst", test_share=0))
    by_name = {key.removeprefix("train:a/"): content for key, (_, content, _) in found.items()}
    assert len(by_name) == 8
    for name, content in by_name.items():
        assert decode_rgb(content).shape == ((3, 12, 8) if name == "turned" else (3, 8, 12)), name
    with tarfile.open(tmp_path / "dst" / "train-000000.tar") as tar:
        assert "a/really_a.jpg" in tar.getnames()  # the extension tells the truth


# ---- layouts that are refused ----


def test_missing_and_empty_sources(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    with pytest.raises(DataError, match="nowhere does not exist; name a folder"):
        run(tmp_path / "nowhere", tmp_path / "dst")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no images. The folder should hold"):
        run(tmp_path / "empty", tmp_path / "dst")
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no images \(but 1 other files, such as notes.txt\)"):
        run(tmp_path / "empty", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_class_folders_without_images_are_named(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    with pytest.raises(DataError, match="the class folder emu without images; remove what is no class"):
        run(make_folder({"cat": 2, "emu": 0}), tmp_path / "dst")
    with pytest.raises(DataError, match="class folders emu, owl without images"):
        run(
            make_folder({"train/cat": 2, "train/emu": 0, "test/cat": 1, "test/emu": 0, "test/owl": 0}, "split"),
            tmp_path / "dst",
        )


def test_a_class_in_one_split_only_is_said_and_accepted(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    said: list[str] = []
    source = make_folder({"train/cat": 2, "train/emu": 2, "test/cat": 1, "test/emu": 0})
    assert run(source, tmp_path / "dst", say=said.append).classes == ("cat", "emu")
    assert "The split test has no images of emu." in " ".join(said)


@pytest.mark.parametrize(
    "counts, expected",
    [
        ({".": 1, "cat": 2}, "beside folders of images, such as cat/"),
        ({"train/cat": 1, "test/cat": 1, "extra": 1}, "and also images in extra"),
        ({"train/cat": 1, "test": 1}, r"test/0000.jpg in no class folder"),
        ({"train/cat": 1, "test": 0}, "no images for the split test"),
        ({"train/cat": 1, "val/cat": 1, "valid/cat": 1}, "val and valid, which mean the same"),
    ],
)
def test_layouts_that_could_mean_two_things(tmp_path: Path, make_folder: Folder, run: Run, counts: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        run(make_folder(counts), tmp_path / "dst")


@pytest.mark.parametrize(
    "counts, splits",
    [
        ({"train/cat": 2, "val/cat": 1}, {"train": 2, "test": 1}),
        ({"train/cat": 3, "val/cat": 2, "test/cat": 1}, {"train": 3, "val": 2, "test": 1}),
        ({"train/cat": 5, "train/dog": 5}, {"train": 8, "test": 2}),
        ({"train/0": 9, "other/0": 1}, {"train": 9, "test": 1}),  # "train" beside other classes is a class
    ],
)
def test_splits_by_folder(tmp_path: Path, make_folder: Folder, run: Run, counts: Any, splits: Any) -> None:
    manifest = run(make_folder(counts), tmp_path / "dst")
    assert {split: manifest.num_samples(split) for split in manifest.splits} == splits


def test_hidden_files_and_links(tmp_path: Path, make_folder: Folder, encoded: Encoded, run: Run) -> None:
    source = make_folder({"cat": 2, ".thumbnails": 1, "__MACOSX": 1})
    (source / "cat" / "._0000.jpg").write_bytes(b"not an image")
    (source / "dog").symlink_to(make_folder({".": 2}, "elsewhere"))
    manifest = run(source, tmp_path / "dst", test_share=0)
    assert manifest.classes == ("cat", "dog")
    assert manifest.num_samples("train") == 4
    (source / "cat" / "round").symlink_to(source)
    with pytest.raises(DataError, match="reached twice through links"):
        run(source, tmp_path / "other")
    (source / "cat" / "round").unlink()
    (source / "cat" / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    with pytest.raises(DataError, match=r"gone.jpg is a broken link"):
        run(source, tmp_path / "other")


def test_the_destination_may_not_lie_in_the_source(tmp_path: Path, make_folder: Folder, run: Run) -> None:
    source = make_folder({"cat": 2})
    with pytest.raises(DataError, match="lies inside"):
        run(source, source / "shards")


@pytest.mark.parametrize(
    "settings, option",
    [
        ({"test_share": 1.0}, "--test-share"),
        ({"shard_samples": 0}, "--shard-samples"),
        ({"max_pixels": 10**12}, "--max-pixels"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path: Path, run: Run, settings: Any, option: str) -> None:
    with pytest.raises(DataError, match=f"{option} is .*; use"):
        run(tmp_path, tmp_path / "dst", **settings)
