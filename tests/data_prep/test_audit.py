"""audit: planted copies are found and named, unlike images are not; odd images, labels, the report, the command line."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from clae_dist.data.manifest import write_manifest
from clae_dist.progress import Progress
from data_prep.__main__ import main
from data_prep.audit.find import Audit, audit
from data_prep.audit.report import write_report
from data_prep.audit.scan import stored_mode
from data_prep.audit.summary import as_json, describe
from data_prep.audit.thumbnails import Thumbnails

SHARED = Path(__file__).parents[3] / "shared" / "data"


def scene(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """Smooth shapes, as photos are; no two seeds look alike."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def look(*folders: Path, near_bits: int = 6, limit: int = 8, num_workers: int = 0) -> Audit:
    def quiet(total: int) -> Progress:
        return Progress(total, stream=io.StringIO())

    return audit(list(folders), near_bits=near_bits, limit_pictures=limit, num_workers=num_workers, progress=quiet)


@pytest.fixture
def unlike(tmp_path: Path, run: Any) -> Path:
    """A set of 40 + 8 unlike images in two classes."""
    for number in range(48):
        part = "test" if number % 6 == 5 else "train"
        save(scene(number), tmp_path / "a-src" / part / ("cat", "dog")[number % 2] / f"{number}.jpg", quality=90)
    run(tmp_path / "a-src", tmp_path / "a", name="a", shard_samples=16)
    return tmp_path / "a"


def test_unlike_images_are_not_flagged(unlike: Path) -> None:
    found = look(unlike)
    assert not any(matrix.any() for matrix in found.overlaps.values())
    assert found.pairs == ()
    assert list(found.leaks()) == []
    assert "No image of one split is in another." in describe(found)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda image: image.resize((48, 36), Image.Resampling.BILINEAR),
    "squeezed": lambda image: image.resize((64, 64), Image.Resampling.BICUBIC),
    "mirrored": ImageOps.mirror,
    "cut": lambda image: image.crop((1, 1, 95, 71)),
    "grey": lambda image: image.convert("L"),
}


@pytest.fixture
def leaky(tmp_path: Path, unlike: Path, run: Any) -> Path:
    """An evaluation set whose test split holds copies of images 0 to 6 of the other set, of which 5 lies in its test split."""
    root = tmp_path / "b-src"
    for number in range(100, 110):
        save(scene(number), root / "train" / "cat" / f"{number}.png")
    for number in range(200, 204):
        save(scene(number), root / "test" / "cat" / f"{number}.png")
    source = tmp_path / "a-src"
    (root / "test" / "cat" / "file.jpg").write_bytes((source / "train" / "cat" / "0.jpg").read_bytes())
    save(Image.open(source / "train" / "dog" / "1.jpg"), root / "test" / "cat" / "pixels.png")
    numbers = {"half the size": 2, "squeezed": 3, "mirrored": 4, "cut": 5, "grey": 6}
    for name, copy in COPIES.items():
        save(copy(scene(numbers[name])), root / "test" / "cat" / f"{name}.jpg", quality=60)
    run(root, tmp_path / "b", name="b")
    return tmp_path / "b"


def test_planted_leaks_are_found_and_named(unlike: Path, leaky: Path) -> None:
    found = look(unlike, leaky, num_workers=0)
    names = [(part.set_name, part.split) for part in found.parts]
    assert names == [("a", "train"), ("a", "test"), ("b", "train"), ("b", "test")]
    b_test, a_train, a_test = 3, 0, 1
    assert list(found.leaks()) == [
        (b_test, a_train, {"file": 1, "pixels": 2, "near": 6}),
        (b_test, a_test, {"file": 0, "pixels": 0, "near": 1}),
    ]
    assert found.overlaps["near"][a_train, b_test] == 6
    line = "LEAKAGE  6 images of b's test split are in a's train split: 1 the same file, 1 the same pixels, 4 nearly."
    assert line in describe(found)
    places = {Thumbnails(found).place(pair.second)["name"]: pair for pair in found.pairs}
    assert {Path(name).stem for name in places} == {"file", "pixels", *(name.replace(" ", "_") for name in COPIES)}
    assert places["cat/mirrored.jpg"].mirrored
    assert not places["cat/squeezed.jpg"].mirrored


def test_workers_find_the_same(unlike: Path, leaky: Path) -> None:
    here, there = look(unlike, leaky), look(unlike, leaky, num_workers=1)
    assert np.array_equal(here.table, there.table)
    assert here.pairs == there.pairs


def test_no_near_copies_when_asked_for_none(unlike: Path, leaky: Path) -> None:
    found = look(unlike, leaky, near_bits=0)
    assert found.leaked("pixels") == 2
    assert 2 <= found.leaked("near") < 7


def test_one_picture_under_two_labels(tmp_path: Path, run: Any) -> None:
    for number in range(6):
        save(scene(number), tmp_path / "src" / ("cat", "dog")[number % 2] / f"{number}.png")
    save(scene(0), tmp_path / "src" / "dog" / "other file.png", compress_level=1)
    save(scene(3).resize((60, 50)), tmp_path / "src" / "cat" / "nearly.png")
    save(scene(5), tmp_path / "src" / "dog" / "same label.jpg", quality=95)
    run(tmp_path / "src", tmp_path / "dst", test_share=0)
    found = look(tmp_path / "dst")
    assert {kind: int(images.sum()) for kind, images in found.conflicts.items()} == {"file": 0, "pixels": 2, "near": 4}
    assert sorted(pair.kind for pair in found.conflict_pairs) == ["near", "pixels"]
    assert "LABELS   4 images have a copy in another class: 2 the same pixels, 2 nearly." in describe(found)


def test_equal_labels_of_two_sets_are_not_compared(tmp_path: Path, run: Any) -> None:
    """Label 0 of one set and label 1 of another say nothing about each other."""
    for name, folders in (("a", ("cat", "dog")), ("b", ("ant", "cat"))):
        for number, folder in enumerate(folders):
            save(scene(number if name == "a" else 1 - number), tmp_path / f"{name}-src" / folder / "1.png")
        run(tmp_path / f"{name}-src", tmp_path / name, name=name, test_share=0)
    found = look(tmp_path / "a", tmp_path / "b")
    assert found.leaked("file") == 2
    assert not any(images.any() for images in found.conflicts.values())


def test_a_conflict_of_one_set_is_none_of_another_with_the_same_picture(tmp_path: Path, run: Any) -> None:
    for name, folders in (("a", ("cat", "dog")), ("b", ("cat",))):
        for folder in folders:
            save(scene(0), tmp_path / f"{name}-src" / folder / "same.png")
            save(scene(1 + ("cat", "dog").index(folder)), tmp_path / f"{name}-src" / folder / "own.png")
        run(tmp_path / f"{name}-src", tmp_path / name, name=name, test_share=0)
    found = look(tmp_path / "a", tmp_path / "b")
    in_a = found.table["part"] == 0
    for kind, images in found.conflicts.items():
        assert (int(images[in_a].sum()), int(images[~in_a].sum())) == (2, 0), kind


def test_odd_images_and_uneven_classes(tmp_path: Path, run: Any) -> None:
    root = tmp_path / "src"
    for number in range(8):
        save(scene(number), root / "train" / "many" / f"{number}.jpg")
    save(scene(20, 20, 24), root / "train" / "few" / "tiny.png")
    save(scene(21, 400, 40), root / "train" / "few" / "long.png")
    save(scene(22, 600, 500), root / "test" / "only here" / "a.png")
    save(Image.new("RGB", (90, 70), "white"), root / "train" / "many" / "white.png")
    save(Image.new("RGB", (90, 70), "black"), root / "train" / "many" / "black.png")
    run(root, tmp_path / "dst")
    found = look(tmp_path / "dst")
    train = found.profiles[0]
    assert train["odd"]["short side below 32 pixels"] == 1
    assert train["odd"]["longer than 4 times their short side"] == 1
    assert train["odd"]["under 1/10 of the pixels of the median image"] == 1
    assert train["odd"]["of (almost) one colour"] == 2
    assert train["classes"]["largest"] == ["many", 10]
    assert train["classes"]["smallest"] == ["few", 2]
    assert train["classes"]["imbalance"] == 5
    assert train["classes"]["empty"] == ["only here"]
    assert not found.overlaps["near"].any()  # black and white are no copies of each other
    page = write_report(found, tmp_path / "report").read_text()
    assert page.count("data:image/jpeg;base64,") == sum(train["odd"].values()) == 5
    assert "few/tiny.png" in page


@pytest.mark.parametrize(
    "mode, format, expected",
    [
        ("RGB", "JPEG", "RGB"),
        ("L", "JPEG", "grey"),
        ("CMYK", "JPEG", "CMYK"),
        ("RGBA", "PNG", "with transparency"),
        ("LA", "PNG", "with transparency"),
        ("P", "GIF", "palette"),
        ("1", "PNG", "black and white"),
        ("I;16", "PNG", "16 bits"),
        ("I;16", "TIFF", "16 bits"),
    ],
)
def test_modes_as_stored(mode: str, format: str, expected: str) -> None:
    stream = io.BytesIO()
    image = Image.fromarray(np.full((4, 4), 300, np.uint16)) if mode == "I;16" else scene(1).convert(mode)
    image.save(stream, format)
    assert stored_mode(stream.getvalue()) == expected


def test_images_that_cannot_be_decoded_are_counted_and_listed(unlike: Path, tmp_path: Path) -> None:
    shard = unlike / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    start = int(np.load(unlike / "train-000000.index.npy")[3, 0])
    data[start : start + 100] = bytes(100)
    shard.write_bytes(data)
    found = look(unlike)
    assert found.profiles[0]["unreadable"] == 1
    assert list(found.unreadable) == [3]
    page = write_report(found, tmp_path / "report").read_text()
    assert "(train-000000.tar, row 3): " in page
    (line,) = (tmp_path / "report" / "images.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 3
    assert json.loads(line)["unreadable"]


def test_the_report_is_whole_and_loads_nothing(tmp_path: Path, unlike: Path, leaky: Path) -> None:
    found = look(unlike, leaky)
    page = write_report(found, tmp_path / "report").read_text()
    assert not re.search(r"https?:|//|@import|<script|<link|url\(", re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", page))
    assert page.count("data:image/jpeg;base64,") == 2 * len(found.pairs) == 14
    facts = json.loads((tmp_path / "report" / "audit.json").read_text())
    assert list(facts) == (
        "format near_bits near_is_complete sets leakage copies_within label_conflicts pairs label_conflict_pairs".split()
    )
    assert facts["format"] == "clae-dist audit 1"
    assert facts["leakage"][0] == {
        "of": {"set": "b", "split": "test"},
        "in": {"set": "a", "split": "train"},
        "file": 1,
        "pixels": 2,
        "near": 6,
    }
    assert facts == json.loads(json.dumps(as_json(found, Thumbnails(found))))
    lines = [json.loads(line) for line in (tmp_path / "report" / "images.jsonl").read_text().splitlines()]
    leaked = [line for line in lines if line["set"] == "b"]
    assert len(leaked) == 7
    assert len(lines) == 14
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["audit.html", "audit.json", "images.jsonl"]


def test_no_more_pictures_than_asked_for(tmp_path: Path, unlike: Path, leaky: Path) -> None:
    assert len(look(unlike, leaky, limit=1).pairs) == 4  # file, pixels, near of a's train; near of a's test
    assert look(unlike, leaky, limit=0).pairs == ()
    assert look(unlike, leaky, limit=0).leaked("near") == 7


def test_names_are_text_in_the_page(tmp_path: Path, run: Any) -> None:
    for name in ("<b>cat", "dog&co"):
        save(scene(1), tmp_path / "src" / name / "1.png")
    run(tmp_path / "src", tmp_path / "dst", name="<i>set", test_share=0)
    page = write_report(look(tmp_path / "dst"), tmp_path / "report").read_text()
    assert "<i>" not in page
    assert "&lt;b&gt;cat" in page


def test_the_command_line(tmp_path: Path, unlike: Path, leaky: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["audit", str(unlike), str(leaky), "--workers", "0"]
    assert main(words) == 0
    assert "LEAKAGE" in capsys.readouterr().out
    assert main([*words, "--fail-on", "pixels", "--report", str(tmp_path / "report")]) == 3
    assert f"Pictures: {tmp_path / 'report' / 'audit.html'}" in capsys.readouterr().out
    assert main(["audit", str(unlike), "--workers", "0", "--fail-on", "near"]) == 0


def test_what_is_no_prepared_set_is_an_error(tmp_path: Path, unlike: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path)]) == 2
    assert "has no manifest.json, but" in capsys.readouterr().err
    assert main(["audit", str(unlike), "--near-bits", "40"]) == 2
    assert "--near-bits is 40; use 0 to 12" in capsys.readouterr().err
    assert main(["audit", str(unlike), str(unlike)]) == 2
    assert "is named twice" in capsys.readouterr().err
    empty = {"name": "empty", "source": "", "licence": "", "classes": (), "splits": {}, "quarantined": 0, "preparation": {}}
    (tmp_path / "empty").mkdir()
    write_manifest(tmp_path / "empty", **empty)
    assert main(["audit", str(tmp_path / "empty")]) == 2
    assert "has no split and no image" in capsys.readouterr().err
    assert main(["audit", str(unlike), "--report", str(unlike / "report")]) == 2
    assert "lies inside the set" in capsys.readouterr().err
    assert main(["audit", str(unlike), "--report", str(unlike / "manifest.json")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    (unlike / "train-000001.tar").write_bytes(b"short")
    assert main(["audit", str(unlike), "--workers", "0"]) == 2
    assert "train-000001.tar is 5 bytes, the manifest expects" in capsys.readouterr().err


@pytest.mark.skipif(not (SHARED / "caltech101.tar").is_file(), reason="needs shared/data/caltech101.tar")
def test_copies_of_real_photos_are_found(tmp_path: Path, run: Any) -> None:
    """The figures of hashing.py, on a part of the images they were measured on."""
    import tarfile

    with tarfile.open(SHARED / "caltech101.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")][::8]
        photos = [Image.open(io.BytesIO(tar.extractfile(name).read())).convert("RGB") for name in names]  # type: ignore[union-attr]
    for number, photo in enumerate(photos):
        cut = photo.crop((2, 2, photo.width - 2, photo.height - 2))
        side = 256 / min(cut.size)
        save(photo, tmp_path / "a-src" / "x" / f"{number:03d}.png", compress_level=1)
        save(
            ImageOps.mirror(cut.resize((round(cut.width * side), round(cut.height * side)))),
            tmp_path / "b-src" / "x" / f"{number:03d}.jpg",
            quality=50,
        )
    for name in "ab":
        run(tmp_path / f"{name}-src", tmp_path / name, name=name, test_share=0)
    found = look(tmp_path / "a", tmp_path / "b")
    assert found.overlaps["near"][1, 0] >= 0.97 * len(photos)
    assert found.overlaps["near"][0, 0] <= 2  # of the photos among themselves


def test_interrupted_it_leaves_nothing(
    tmp_path: Path, unlike: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(path.name for path in unlike.iterdir())
    monkeypatch.setattr("data_prep.audit.report.write_list", interrupt)  # the first file of the report
    assert main(["audit", str(unlike), "--workers", "0", "--report", str(tmp_path / "report")]) == 130
    assert capsys.readouterr().err.endswith("data_prep: interrupted; the sets are untouched.\n")
    assert list((tmp_path / "report").iterdir()) == []
    assert sorted(path.name for path in unlike.iterdir()) == before


def test_pictures_that_all_look_alike_end_the_search_and_say_so(
    unlike: Path, leaky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.audit.overlap.MAX_PAIRS", 2)
    found = look(unlike, leaky)
    assert found.leaked("pixels") == 2
    assert found.leaked("near") == 3  # the grey copy has the very same hash
    assert any("near copies are at least as many as said" in line for line in describe(found))
