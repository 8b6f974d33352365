"""Checkpoints on disk: what is written is read, whole or not at all, whatever happens to the files."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clae_dist.cli import main
from clae_dist.config import Config
from clae_dist.recipe import to_yaml
from clae_dist.runs.checkpoint import Checkpoint, Piece, Writer, load_checkpoint
from clae_dist.runs.checkpoint.pieces import share_of
from clae_dist.runs.checkpoint.write import HostMemory, outdated
from clae_dist.runs.folder import RunFolder
from tests import processes
from tests.checkpoints import CPU, INDEX, R1, assert_same, flip, pieces_of, tensors, write_checkpoint


@pytest.mark.parametrize(("size", "sharded"), [(1, False), (3, False), (3, True), (20, True)])
def test_what_some_ranks_write_one_reads_whole(tmp_path: Path, size: int, sharded: bool) -> None:
    path = write_checkpoint(tmp_path, 12, tensors(), size, sharded, bad_samples={"a": "why"})
    checkpoint = load_checkpoint(tmp_path, pytest.fail)
    assert checkpoint is not None
    assert_same(checkpoint, tensors())
    assert (checkpoint.step, checkpoint.info["images_seen"], checkpoint.info["bad_samples"]) == (12, 384, {"a": "why"})
    assert path.name == "step-00000012"
    assert sorted(file.name for file in path.iterdir()) == [
        "checkpoint.json",
        *(f"rank-{rank:05d}.safetensors" for rank in range(size)),
    ]
    state = checkpoint.state()
    assert list(state["optimizer"]) == ["linear.weight"]
    assert set(state["model"]) == {name.removeprefix("model/") for name in tensors() if name.startswith("model/")}


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, tensors(), 2)
    found = {**load_file(path / "rank-00000.safetensors"), **load_file(path / "rank-00001.safetensors")}
    assert set(found) == set(tensors())
    assert all(torch.equal(found[name], value) for name, value in tensors().items())


def test_what_several_ranks_hold_is_written_once_and_shared_by_bytes() -> None:
    sizes = [1000, 10, 400, 300, 300, 20, 0]
    pieces = [Piece(str(i), (n,), 0, torch.zeros(n), (0, 1)) for i, n in enumerate(sizes)]
    shares = [share_of(pieces, rank) for rank in (0, 1)]
    assert sorted(piece.name for share in shares for piece in share) == [str(i) for i in range(len(sizes))]
    written = [sum(piece.tensor.nbytes for piece in share) for share in shares]
    assert abs(written[0] - written[1]) <= 4 * 30
    halves = [[Piece("w", (8,), 4 * (rank % 2), torch.zeros(4), (rank % 2, rank % 2 + 2))] for rank in range(4)]
    assert [len(share_of(held, rank)) for rank, held in enumerate(halves)] == [1, 1, 0, 0]  # two copies of two halves


def test_a_save_is_of_the_moment_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training writes into the weights while they are being written out."""
    go_on, write = threading.Event(), Writer._write
    monkeypatch.setattr(Writer, "_write", lambda *arguments: go_on.wait(60) and write(*arguments))
    weight = torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last)
    writer = Writer(tmp_path, 0, 1, "a", CPU)
    writer.reserve([pieces_of("model/w", weight, 0, 1, False)])
    writer.begin(1, [pieces_of("model/w", weight, 0, 1, False)])
    weight.zero_()
    assert writer.busy
    go_on.set()
    writer.join()
    writer.commit(1, "ddp", {"images_seen": 1}, 3, 0)
    writer.join()
    assert writer.problem == ""
    assert Checkpoint(RunFolder(tmp_path).find_checkpoints()[0])["model/w"].eq(1).all()


def test_tensors_that_stay_unchanged_are_written_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostMemory, "copy", lambda *_: pytest.fail("a copy was made"))
    tensors = {
        "dense": torch.rand(3, 4, requires_grad=True),
        "channels last": torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "with gaps": torch.rand(9)[::3],
        "scalar": torch.tensor(2.0),
    }
    writer = Writer(tmp_path, 0, 1, "a", CPU)
    writer.begin(1, [pieces_of(f"model/{name}", value, 0, 1, False) for name, value in tensors.items()], unchanged=True)
    writer.join()
    writer.commit(1, "ddp", {"images_seen": 1}, 3, 0)
    writer.join()
    assert writer.problem == ""
    saved = Checkpoint(RunFolder(tmp_path).find_checkpoints()[0])
    assert all(torch.equal(saved[f"model/{name}"], value) for name, value in tensors.items())


@pytest.mark.parametrize("threads", [1, 3])
def test_large_tensors_are_copied_in_parts(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr("clae_dist.runs.checkpoint.write._MOVE", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    whole = torch.randint(256, (12_345,), dtype=torch.uint8)
    pieces = [pieces_of("w", part, 0, 1, sharded=False) for part in (whole, whole[:1000], whole[:1], whole[::3], whole[:0])]
    copies = HostMemory(pin=False).copy(pieces)
    assert all(torch.equal(copy, piece.tensor) for copy, piece in zip(copies, pieces, strict=True))


def test_a_write_that_is_cancelled_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, write = threading.Event(), Writer._write
    monkeypatch.setattr(Writer, "_write", lambda *arguments: go_on.wait(60) and write(*arguments))
    writer = Writer(tmp_path, 0, 1, "a", CPU)
    writer.begin(1, [pieces_of("model/w", torch.ones(3), 0, 1, False)])
    writer._cancelled.set()
    go_on.set()
    writer.cancel()
    assert not writer.busy
    assert RunFolder(tmp_path).find_checkpoints() == []


def test_kill_minus_9_at_every_point_leaves_the_older_or_the_newer(tmp_path: Path) -> None:
    done = processes.run(sys.executable, "-m", "tests.runs.killed", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["points"] > 20
    assert found["steps"] == sorted(found["steps"])  # the older up to the rename, the newer from then on
    assert set(found["steps"]) == {1, 2}


# ---- retention ----


def kept(saved: list[float | None], keep: int, every: float) -> list[int]:
    """Which stay (numbered from the oldest) when each is saved at its time, with deletion after every save."""
    alive: list[tuple[Path, float | None]] = []
    for number, when in enumerate(saved):
        alive.insert(0, (Path(str(number)), when))
        gone = set(outdated(alive, keep, every))
        alive = [entry for entry in alive if entry[0] not in gone]
    return sorted(int(path.name) for path, _ in alive)


def test_which_stay() -> None:
    times: list[float | None] = [0, 5, 9, 14, 21, 22, 23, 41]
    assert kept(times, 3, 0) == [5, 6, 7]
    assert kept(times, 1, 0) == [7]
    assert kept(times, 2, 10) == [0, 3, 6, 7]  # 41 is one of its own, and one of the newest two
    assert kept([0, None, 20, 30], 1, 10) == [0, 2, 3]  # one that cannot be read is not kept for good


def test_old_ones_are_deleted(tmp_path: Path) -> None:
    for step in range(1, 6):
        write_checkpoint(tmp_path, step, {"model/w": torch.ones(2)}, keep=2)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert [path.name for path in RunFolder(tmp_path).find_checkpoints()] == ["step-00000005", "step-00000004"]


def test_damaged_ones_that_were_passed_over_do_not_push_new_ones_out(tmp_path: Path) -> None:
    """The run went on from an older one: what it saves now counts from there."""
    write_checkpoint(tmp_path, 9, {"model/w": torch.ones(2)})
    write_checkpoint(tmp_path, 5, {"model/w": torch.ones(2)}, keep=1)
    write_checkpoint(tmp_path, 6, {"model/w": torch.ones(2)}, keep=1)
    assert [path.name for path in RunFolder(tmp_path).find_checkpoints()] == ["step-00000009", "step-00000006"]


# ---- clae checkpoints ----


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(to_yaml(Config(), {}))
    write_checkpoint(tmp_path, 3, tensors(3), 2, True)
    write_checkpoint(tmp_path, 60_000, tensors(6), 1)
    return tmp_path


def test_the_list(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run_dir)]) == 0
    _, newest, oldest = capsys.readouterr().out.splitlines()
    assert newest.split()[:2] == ["60,000", "1,920,000"]
    assert newest.endswith("MB  1 rank, ddp")
    assert oldest.endswith("MB  2 ranks, ddp")
    flip(R1, -1)(run_dir / "checkpoints" / "step-00000003")
    assert main(["checkpoints", str(run_dir), "--verify", "--json"]) == 1
    newest, oldest = json.loads(capsys.readouterr().out)
    assert (newest["step"], newest["intact"], newest["images_seen"]) == (60_000, True, 1_920_000)
    assert (oldest["step"], oldest["intact"]) == (3, False)
    assert "rank-00001.safetensors has sha256" in oldest["problem"]
    flip(INDEX, 40)(run_dir / "checkpoints" / "step-00000003")
    assert main(["checkpoints", str(run_dir)]) == 1
    assert "damaged: checkpoint.json" in capsys.readouterr().out


def test_one_of_them_as_one_file(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out" / "whole.safetensors"
    assert main(["checkpoints", str(run_dir), "--export", "3", "--to", str(file)]) == 0
    found = load_file(file)
    assert set(found) == set(tensors())
    assert all(torch.equal(found[name], value) for name, value in tensors(3).items())
    assert main(["checkpoints", str(run_dir), "--to", str(file), "--export"]) == 0
    assert torch.equal(load_file(file)["model/steps"], tensors(6)["model/steps"])
    assert main(["checkpoints", str(run_dir), "--export", "4", "--to", str(file)]) == 2
    assert "no checkpoint of step 4; it has 3, 60000" in capsys.readouterr().err
    assert main(["checkpoints", str(run_dir), "--export", "4"]) == 2
    flip(R1, -1)(run_dir / "checkpoints" / "step-00000003")
    before = file.read_bytes()
    assert main(["checkpoints", str(run_dir), "--export", "3", "--to", str(file)]) == 2
    assert "the checkpoint of step 3 is damaged: rank-00001.safetensors" in capsys.readouterr().err
    assert [file.read_bytes(), list(file.parent.iterdir())] == [before, [file]]
