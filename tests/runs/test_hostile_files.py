"""Files of a run that a crash has damaged or a stranger has made up: one error of ours, in bounded time and memory."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from clae_dist.errors import ConfigError
from clae_dist.reading import MAX_BYTES, MissingError, ReadError, open_regular, parse_json, read_bytes, read_text
from clae_dist.recipe import resolve
from tests.fuzzing import fuzz
from tests.run_files import LAUGHS


@pytest.mark.parametrize("count", [8, pytest.param(80, marks=pytest.mark.slow)])
def test_every_reader_of_a_run_under_drawn_damage(tmp_path: Path, count: int) -> None:
    ends = fuzz("run_files", count, tmp_path)
    assert sum(number for end, number in ends.items() if end.endswith("refused")) >= count // 5
    assert sum(number for end, number in ends.items() if end.endswith("read")) >= count // 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3)])
def test_thousands_of_damages(tmp_path: Path, seed: int) -> None:
    fuzz("run_files", 3000, tmp_path, seed)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"{", "no valid JSON: "),
        (b"\xff{}", "byte 0 is not UTF-8"),
        (b"[" * 50 + b"]" * 50, "nested more than 32 deep"),
        (b"[" * 9000 + b"]" * 9000, "nested more than 32 deep"),
        (b"[" * 100_000, "more brackets than content"),
        (b"[NaN]", "it holds NaN, which is no finite number"),
        (b"[-Infinity]", "it holds -Infinity"),
        (b"[1e999]", "it holds 1e999"),
        (b"[" + b"9" * 5000 + b"]", "an integer of 5000 digits"),
        (b'{"a": 1, "b": {"a": 1, "a": 2}}', "the key 'a' is repeated"),
        (b'["\\ud800"]', "half a character"),
    ],
)
def test_json_that_is_none_of_ours(text: bytes, reason: str) -> None:
    with pytest.raises(ReadError, match=reason):
        parse_json(text)


def test_what_is_allowed_where_it_is_asked_for() -> None:
    assert parse_json(b'["\\udcff"]', surrogates=True) == ["\udcff"]
    assert str(parse_json(b"[NaN, Infinity]", nan=True)) == "[nan, inf]"
    assert parse_json(b'["\\ud83d\\ude00", -9223372036854775808, [{"a": []}]]') == ["😀", -(2**63), [{"a": []}]]


def test_only_plain_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    """A fifo hung, a device had no end."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"x" * 100)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(ReadError, match="not a plain file|directory"):
            open_regular(path)
    with pytest.raises(ReadError, match="more than 99 bytes"):
        read_bytes(tmp_path / "file", 99)
    tracemalloc.start()
    with pytest.raises(ReadError, match="more than"):
        read_bytes(tmp_path / "large")
    assert tracemalloc.get_traced_memory()[1] < 3 * MAX_BYTES
    tracemalloc.stop()
    assert read_text(tmp_path / "link") == "x" * 100
    with pytest.raises(ReadError):
        read_bytes(tmp_path / "link", follow=False)
    with pytest.raises(MissingError, match="No such file or directory"):
        read_bytes(tmp_path / "absent")


def _with_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "recipe.yaml")
    return folder / "recipe.yaml"


def _of(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "recipe.yaml").write_text(text)
        return folder / "recipe.yaml"

    return write


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_with_fifo, "not a plain file"),
        (lambda folder: Path("/dev/zero"), "not a plain file"),
        (_of("a" * (1 << 20)), "more than 262,144 bytes"),
        (_of(LAUGHS), "more than 8 lists or mappings are repeated"),
        (_of("data: " + "[" * 50_000), "nested more than 10 deep"),
        (_of("data:\n" + "".join(" " * n + "- \n" for n in range(300))), "nested more than 10 deep"),
        (_of("train: {epochs: " + "9" * 400 + "}"), "train.epochs is 999"),
        (_of("batch: {global_size: " + "9" * 400 + "}"), "a 64-bit integer"),
        (_of("extends: ../../../../../../../dev/zero"), "not a plain file"),
    ],
)
def test_a_recipe_that_means_harm(tmp_path: Path, make: Callable[[Path], Path], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(make(tmp_path))


def test_recipes_that_extend_each_other_without_end(tmp_path: Path) -> None:
    for number in range(1500):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    with pytest.raises(ConfigError, match="more than 20 recipes extend each other"):
        resolve(tmp_path / "0.yaml")
