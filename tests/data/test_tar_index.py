"""Indexing plain shards from their headers, against tarfile; damaged ones are named."""

from __future__ import annotations

import io
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clae_dist.data.tar_index import NO_IMAGE, NO_SAMPLE, ODD_LABELS, SECOND_IMAGES, TarIndex, index_tar, members
from clae_dist.errors import DataError

LONG = "folder/" * 20 + "x" * 120


def tar_of(files: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def indexed(tmp_path: Path, content: bytes) -> TarIndex:
    path = tmp_path / "shard.tar"
    path.write_bytes(content)
    with path.open("rb") as file:
        return index_tar(file, "shard.tar")


def index(tmp_path: Path, content: bytes) -> list[tuple[str, bytes, int]]:
    """(key, image, label) of every sample."""
    found = indexed(tmp_path, content)
    return [
        (key, content[offset : offset + size], label)
        for key, (offset, size, label) in zip(found.keys, found.rows.tolist(), strict=True)
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdatasets_conventions(tmp_path: Path, format: int) -> None:
    files = [
        ("__meta__", b"not a sample"),
        ("README", b"nor this"),
        ("a/b.x/0.jpg", b"image 0"),
        ("a/b.x/0.cls", b"3\n"),
        ("1.cls", b"7"),
        ("1.seg.png", b"a mask, not the image"),
        ("1.JPEG", b"image 1"),
        ("2.json", b'{"label": 5, "text": "metadata"}'),
        ("2.webp", b"image 2"),
        ("3.png", b""),
        ("4.txt", b"a sample without an image"),
        ("5.json", b'["no label"]'),
        ("5.jpg", b"image 5"),
        ("\u00e4.jpg", b"image 6"),
    ]
    found = index(tmp_path, tar_of(files, format))
    assert found == [
        ("a/b.x/0", b"image 0", 3),
        ("1", b"image 1", 7),
        ("2", b"image 2", 5),
        ("3", b"", -1),
        ("5", b"image 5", -1),
        ("\u00e4", b"image 6", -1),
    ]


def test_what_is_not_used_is_counted_with_an_example(tmp_path: Path) -> None:
    names = ["README", ".DS_Store", "0.jpg", "0.png", "0.cls", "1.txt", "b.c.jpg"]
    found = indexed(tmp_path, tar_of([(name, b"3") for name in names]))
    assert dict(found.dropped.counts) == {NO_SAMPLE: 2, SECOND_IMAGES: 1, NO_IMAGE: 2}
    assert found.dropped.lines()[0] == "files of no sample, skipped: 2, such as 'README'"
    assert (found.dropped.examples[SECOND_IMAGES], found.dropped.examples[NO_IMAGE]) == ("0.png", "1.txt")


@pytest.mark.parametrize(
    "names",
    [
        ["0.jpg", "1.jpg", "0.cls", "1.cls"],  # as `tar` packs *.jpg *.cls
        ["0.cls", "1.jpg", "0.jpg"],
        ["0.jpg", "1.jpg", "0.jpg"],
        ["0.jpg", "0.jpg", "1.jpg"],
        ["0.jpg", "0.JPG"],
    ],
)
def test_a_sample_in_two_places_is_named(tmp_path: Path, names: list[str]) -> None:
    """All labels were -1, and there were twice as many samples, without a word."""
    with pytest.raises(DataError, match=r"shard\.tar holds the sample '0' again with '0\..*side by side"):
        index(tmp_path, tar_of([(name, b"3") for name in names]))


def test_images_whose_kinds_have_dots(tmp_path: Path) -> None:
    """WebDataset's decoders know KEY.rgb.jpg by its end; these "hold no images"."""
    files = [("0.rgb.jpg", b"image 0"), ("0.rgb.cls", b"4"), ("1.rgb.jpg", b"image 1"), ("1.cls", b"5"), ("2.txt", b"")]
    assert index(tmp_path, tar_of(files)) == [("0", b"image 0", 4), ("1", b"image 1", 5)]
    with pytest.raises(
        DataError, match=r"holds 2 images in the sample 'IMG': '0001\.jpg', '0002\.jpg'\. A key ends at the first"
    ):
        index(tmp_path, tar_of([("IMG.0001.jpg", b""), ("IMG.0002.jpg", b"")]))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_links_folders_and_headers_for_all(tmp_path: Path, format: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format, pax_headers={"comment": "for all"}) as tar:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, LONG + "l.jpg"), (tarfile.LNKTYPE, "m.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, LONG, 0
            tar.addfile(info)
        info = tarfile.TarInfo(LONG + ".jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"image"))
        info = tarfile.TarInfo("short.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"other"))
    assert index(tmp_path, stream.getvalue()) == [(LONG, b"image", -1), ("short", b"other", -1)]


def test_what_tarfile_finds_is_what_is_found() -> None:
    rng = random.Random(0)
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = [f"{number}{'-' * rng.randrange(90)}.jpg" for number in range(50)]
        content = tar_of([(name, rng.randbytes(rng.randrange(2000))) for name in names], format)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            wanted = [(m.name, m.offset_data, m.size) for m in tar]
        assert [(m.name, m.offset, m.size) for m in members(content, "t")] == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tar: b"", "is empty"),
        (lambda tar: tar[:700], "not a complete, uncompressed tar: at byte 0 a file of 1000 bytes does not fit"),
        (lambda tar: tar[:2560], "ends at byte 2560 without the end mark of a tar"),
        (lambda tar: tar + tar, "the end mark is followed by more data"),
        (lambda tar: b"\x1f\x8b" + tar[2:], "at byte 0 is no header of a file"),
        (lambda tar: tar[:1536] + b"\xff" * 512 + tar[2048:], "at byte 1536 is no header of a file"),
        (lambda tar: tar_of([("1.txt", b"")]), "holds no images"),
    ],
)
def test_one_bad_tar_is_named(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    whole = tar_of([("1.jpg", b"x" * 1000), ("2.jpg", b"y" * 100)])
    with pytest.raises(DataError, match="shard.tar") as caught:
        index(tmp_path, change(whole))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("files", "labels", "names", "odd"),
    [
        ({"0.cls": b"cat", "1.cls": b"ant\n", "2.cls": b"cat"}, [1, 0, 1], ("ant", "cat"), 0),
        ({"0.cls": b"cat", "1.cls": b"7", "2.txt": b"no label"}, [1, 0, -1], ("7", "cat"), 0),
        ({"0.cls": b"-2", "1.cls": b"7", "2.cls": b"123456789"}, [-1, 7, 123456789], (), 1),
        ({"0.cls": b"a caption " * 30, "1.cls": b"", "2.cls": b"\x00"}, [-1, -1, -1], (), 3),
        ({"0.cls": b"\xff\xfe", "1.cls": b"x" * (2 << 20), "2.cls": b"1"}, [0, -1, 1], None, 1),
        ({"0.json": b"{", "1.json": b'{"label": "cat"}', "2.json": b"[" * 100_000}, [-1, 0, -1], ("cat",), 2),
        ({"0.json": b"3", "1.json": b'{"label": "4"}', "2.json": b'{"label": 5.0}'}, [3, 4, 5], (), 0),
        (
            {
                "0.json": b'{"label": null, "cls": 6}',
                "1.json": b'{"label": "a text", "class_id": 7}',
                "2.json": b'{"label": [8]}',
            },
            [6, 7, 8],
            (),
            0,
        ),
        ({"0.json": b'{"label": true}', "1.json": b'{"label": [1, 2]}', "2.json": b'{"label": {"id": 1}}'}, [-1] * 3, (), 3),
        ({"0.json": b'{"label": 1e300}', "1.json": b'{"label": 0.5}', "2.json": b'{"label": NaN}'}, [-1] * 3, (), 3),
        ({"0.json": b'{"text": "no label"}', "1.json": b'["nor here"]', "2.json": b"null"}, [-1] * 3, (), 0),
        ({"0.cls": b"1 3 5", "1.cls": b"1,2", "2.cls": b"3.0"}, [-1, -1, 3], (), 2),
        ({"0.cls": b"2.5", "1.cls": b"inf", "2.cls": b"1_000"}, [-1, 1, 0], ("1_000", "inf"), 1),
        (
            {"0.CLS": b"3", "1.Json": b'{"label": 4}', "2.cls": b"golden retriever"},
            [0, 1, 2],
            ("3", "4", "golden retriever"),
            0,
        ),
        ({"0.json": b'{"label": -5}', "1.json": b'{"label": 5}', "2.json": b"\xff"}, [-1, 5, -1], (), 2),
    ],
)
def test_labels_of_every_kind(
    tmp_path: Path, files: dict[str, bytes], labels: list[int], names: tuple[str, ...] | None, odd: int
) -> None:
    """A JSON file that was no label, or a name in KEY.cls, ended a run that needs no labels."""
    members = sorted([*files.items(), *((f"{key}.jpg", b"image") for key in range(3))])
    path = tmp_path / "shard.tar"
    path.write_bytes(tar_of(members))
    with path.open("rb") as file:
        found = index_tar(file, "shard.tar")
    assert (found.dropped.counts.get(ODD_LABELS, 0), len(found.rows)) == (odd, 3)
    if names is None:
        names, labels = ("1", "\ufffd\ufffd"), [1, -1, 0]
    assert (found.rows[:, 2].tolist(), found.names) == (labels, names)


@pytest.mark.parametrize("mutations", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_mutations_end_in_samples_or_in_a_dataerror(tmp_path: Path, mutations: int) -> None:
    """No crash, no endless loop, no place outside of the file, whatever the bytes are."""
    rng = random.Random(1)
    files = [(f"{LONG if number == 2 else number}.jpg", rng.randbytes(300)) for number in range(5)] + [("9.cls", b"1")]
    wholes = [tar_of(files, format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    path, refused = tmp_path / "mutated", 0
    for _ in range(mutations):
        content = bytearray(rng.choice(wholes))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(content) // 512) * 512 + rng.choice([0, 124, 135, 148, 156, 257, rng.randrange(512)])
            content[at : at + rng.randrange(1, 4)] = rng.randbytes(rng.randrange(4))
            if rng.random() < 0.5:  # with a right checksum the rest is looked at
                block = at // 512 * 512
                header = bytes(content[block : block + 512])
                checksum = sum(header) - sum(header[148:156]) + 256
                content[block + 148 : block + 156] = b"%06o\0 " % checksum
        path.write_bytes(content)
        try:
            with path.open("rb") as file:
                rows = index_tar(file, "mutated").rows
            assert (rows[:, :2] >= 0).all()
            assert (rows[:, 0] + rows[:, 1] <= len(content)).all()
        except DataError:
            refused += 1
    assert refused > mutations // 3


def test_ten_thousand_samples_take_no_time(tmp_path: Path) -> None:
    content = tar_of([(f"{number:06d}.{kind}", b"7") for number in range(10_000) for kind in ("jpg", "cls")])
    start = time.process_time()
    assert len(index(tmp_path, content)) == 10_000
    assert time.process_time() - start < 3  # 0.2 s on a quiet machine
