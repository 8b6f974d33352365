"""Damaged checkpoints: named with the file and passed over, whatever the damage is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clae_dist.errors import ConfigError, DamagedError
from clae_dist.runs.checkpoint import Checkpoint, load_checkpoint
from clae_dist.runs.checkpoint.index import _digest
from tests.checkpoints import INDEX, R1, assert_same, flip, tensors, write_checkpoint
from tests.mutations import mutate

# ---- damage ----


def rewrite_index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """checkpoint.json changed by somebody who knows how to sign it."""
    file = path / "checkpoint.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    change(content)
    file.write_text(json.dumps({**content, "sha256": _digest(content)}))


def replace_bytes(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path / file).write_bytes(change((path / file).read_bytes())) and None


def link(path: Path) -> None:
    file = path / "rank-00001.safetensors"
    outside = path.parents[1] / "outside"
    file.rename(outside)
    file.symlink_to(outside)


def pipe(path: Path) -> None:
    (path / "rank-00001.safetensors").unlink()
    os.mkfifo(path / "rank-00001.safetensors")


def set_tensor(key: str, value: Any) -> Callable[[Path], None]:
    return lambda path: rewrite_index(path, lambda content: content["tensors"]["model/linear.weight"].update({key: value}))


def set_pieces(change: Callable[[list[Any]], list[Any]]) -> Callable[[Path], None]:
    def damage(content: dict[str, Any]) -> None:
        entry = content["tensors"]["model/linear.weight"]
        entry["pieces"] = change(entry["pieces"])

    return lambda path: rewrite_index(path, damage)


def rename_file(to: str) -> Callable[[Path], None]:
    def damage(content: dict[str, Any]) -> None:
        content["files"][to] = content["files"].pop("rank-00001.safetensors")
        for entry in content["tensors"].values():
            entry["pieces"] = [[to if f == "rank-00001.safetensors" else f, *rest] for f, *rest in entry["pieces"]]

    return lambda path: rewrite_index(path, damage)


ENDLESS = {"shape": [2**50], "pieces": [["rank-00000.safetensors", 0, 2**50, 0]]}
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit of a tensor": (flip(R1, -1), r"rank-00001.safetensors has sha256 \w{12}…, expected \w{12}… \(damaged: optimizer/"),
    "a bit of a header": (flip(R1, 30), "rank-00001.safetensors has sha256"),
    "cut": (replace_bytes(R1, lambda data: data[:200]), "rank-00001.safetensors has 200 bytes, expected "),
    "empty": (replace_bytes(R1, lambda data: b""), "rank-00001.safetensors has 0 bytes"),
    "longer": (replace_bytes(R1, lambda data: data + b"x"), "rank-00001.safetensors has"),
    "missing": (lambda path: (path / R1).unlink(), "rank-00001.safetensors cannot be read"),
    "a link": (link, "rank-00001.safetensors cannot be read"),
    "a pipe": (pipe, "rank-00001.safetensors is not a plain file"),
    "no index": (lambda path: (path / INDEX).unlink(), "checkpoint.json cannot be read"),
    "a bit of the index": (flip(INDEX, 40), "checkpoint.json: "),
    "garbage": (replace_bytes(INDEX, lambda data: b"\x80\x04 not JSON"), "checkpoint.json: it is no checkpoint of ours"),
    "deep": (replace_bytes(INDEX, lambda data: b"[" * 100_000), "checkpoint.json: it is no checkpoint of ours"),
    "a list": (replace_bytes(INDEX, lambda data: b"[]"), "checkpoint.json: it is no checkpoint of ours"),
    "another step": (lambda path: rewrite_index(path, lambda c: c.update(step=7)), "it says step 7"),
    "another format": (lambda path: rewrite_index(path, lambda c: c.update(format=9)), "its format is 9"),
    "a path upwards": (rename_file("../outside"), "has a name that no rank writes"),
    "an absolute path": (rename_file("/etc/passwd"), "has a name that no rank writes"),
    "an absurd shape": (set_tensor("shape", [2**40, 2**40]), "the pieces of model/linear.weight end at 77"),
    "a negative shape": (set_tensor("shape", [-7, -11]), "which is no count"),
    "an odd dtype": (set_tensor("dtype", "object"), "odd shape or dtype"),
    "a piece too few": (set_pieces(lambda runs: runs[:1]), "the pieces of model/linear.weight end at 39 of 77"),
    "a piece twice": (set_pieces(lambda runs: [*runs, runs[0]]), "overlap"),
    "a hole": (set_pieces(lambda runs: [[runs[0][0], 0, 38, 0], runs[1]]), "skip elements at 38"),
    "a piece of nowhere": (set_pieces(lambda runs: [["rank-00009.safetensors", 0, 77, 0]]), "is not one of the files"),
    "an endless piece": (
        lambda path: rewrite_index(path, lambda c: c["tensors"]["model/linear.weight"].update(ENDLESS)),
        "longer than its file",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_its_file_and_passed_over(tmp_path: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    write_checkpoint(tmp_path, 3, tensors(3), 2, True)
    newest = write_checkpoint(tmp_path, 6, tensors(6), 2, True)
    damage(newest)
    said: list[str] = []
    checkpoint = load_checkpoint(tmp_path, said.append)
    assert checkpoint is not None
    assert checkpoint.step == 3
    assert_same(checkpoint, tensors(3))
    assert len(said) == 1
    assert "step-00000006 is damaged: " in said[0]
    with pytest.raises(DamagedError, match=words):
        Checkpoint(newest).verify()
    again = write_checkpoint(tmp_path, 6, tensors(6), 1)  # the run comes to this step again
    assert_same(Checkpoint(again), tensors(6))


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, pytest.fail) is None
    for step in (3, 6):
        flip(INDEX, 50)(write_checkpoint(tmp_path, step, tensors()))
    with pytest.raises(
        ConfigError,
        match="none of the 2 checkpoints can be read; restore one from a copy, or give another run_dir",
    ):
        load_checkpoint(tmp_path, lambda text: None)


def test_an_index_that_lies_about_a_file_reads_nothing_else(tmp_path: Path) -> None:
    """Digests right, yet a tensor is not in the file that is said to hold it: an error, and no other bytes."""
    path = write_checkpoint(tmp_path, 1, tensors(), 2)

    def swap(content: dict[str, Any]) -> None:
        for entry in content["tensors"].values():
            entry["pieces"] = [
                ["rank-00001.safetensors" if f == "rank-00000.safetensors" else "rank-00000.safetensors", *rest]
                for f, *rest in entry["pieces"]
            ]

    def widen(content: dict[str, Any]) -> None:
        content["tensors"]["model/half"]["dtype"] = "U8"

    rewrite_index(path, widen)
    with pytest.raises(DamagedError, match="model/half has 6 of torch.bfloat16, not 6 of torch.uint8"):
        Checkpoint(path)["model/half"]
    rewrite_index(path, swap)
    with pytest.raises(DamagedError, match="cannot be read"):
        Checkpoint(path)["model/mask"]


def test_drawn_damage_never_loads(tmp_path: Path) -> None:
    """Bytes to other bytes, in any file: the older one is loaded, or the damage has changed nothing."""
    rng = np.random.default_rng(5)
    write_checkpoint(tmp_path, 3, tensors(3), 2, True)
    newest = write_checkpoint(tmp_path, 6, tensors(6), 2, True)
    files = sorted(newest.iterdir())
    whole = {file: file.read_bytes() for file in files}
    for _ in range(150):
        file = files[int(rng.integers(len(files)))]
        file.write_bytes(mutate(rng, whole[file], [whole[other] for other in files]))
        checkpoint = load_checkpoint(tmp_path, lambda text: None)
        assert checkpoint is not None
        assert_same(checkpoint, tensors(checkpoint.step))
        file.write_bytes(whole[file])


def expected(like: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("model/"): tuple(value.shape) for name, value in like.items() if name.startswith("model/")}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["tensors"]["model/half"].update(dtype="U8"), "model/half has 6 of torch.bfloat16"),
        (lambda c: c["tensors"].pop("model/half"), "model/half is not in it"),
        (lambda c: c["tensors"]["model/half"].update(shape=[2, 3]), r"model/half has the shape \(2, 3\)"),
        (lambda c: c["tensors"].update({"model/more": c["tensors"]["model/half"]}), "model/more"),
        (lambda c: c["info"].update(train_s="long"), "train_s is no time"),
    ],
)
def test_tensors_that_lie_under_fitting_digests_leave_the_older_checkpoint(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    shapes = expected(tensors(3))
    write_checkpoint(tmp_path, 3, tensors(3))
    newest = write_checkpoint(tmp_path, 6, tensors(6))
    said: list[str] = []
    found = load_checkpoint(tmp_path, said.append, shapes=shapes)
    assert found is not None
    assert (found.step, said) == (6, [])
    rewrite_index(newest, change)
    found = load_checkpoint(tmp_path, said.append, shapes=shapes)
    assert found is not None
    assert found.step == 3
    assert re.search(words, said[0]), said
