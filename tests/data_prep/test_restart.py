"""Interrupted in the middle: nothing half-written survives, nothing finished is written again, the end is the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from data_prep import workspace
from data_prep.verify import verify

Run = Callable[..., Manifest]

# The command line, but the process is sent a signal at the Nth rename of a shard or an index. Every shard renames
# its index, then itself: at 3 the second shard's index is in place and the shard is not.
STRUCK = """
import os, sys
from data_prep import __main__, workspace

renames, replace = 0, os.replace

def replace_then_strike(source, target):
    global renames
    replace(source, target)
    is_ours = str(target).endswith((".tar", ".npy"))
    renames += is_ours
    if is_ours and renames == strike_at:
        os.killpg(0, signal) if to_group else os.kill(os.getpid(), signal)

if __name__ == "__main__":
    signal, strike_at, to_group = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "group"
    workspace.os.replace = replace_then_strike
    sys.exit(__main__.main(sys.argv[4:]))
"""


@pytest.fixture
def source(make_folder: Any) -> Path:
    folder: Path = make_folder({"train/cat": 30, "train/dog": 30, "test/cat": 6, "test/dog": 6})
    return folder


@pytest.fixture
def struck(tmp_path: Path) -> Path:
    (tmp_path / "struck.py").write_text(STRUCK)
    return tmp_path / "struck.py"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard in place: both change when it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("[!.]*.tar")}


def leftovers(folder: Path) -> list[str]:
    hidden = [path.name for path in folder.rglob(".*")]
    return hidden + [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


def arguments(source: Path, folder: Path, workers: int) -> list[object]:
    named = ["--name", "set", "--source", "made here"]
    return ["prepare", source, folder, *named, "--shard-samples", 12, "--workers", workers]


@pytest.mark.parametrize("strike_at, workers", [pytest.param(2, 1, marks=pytest.mark.slow), (3, 2)])
def test_killed_in_the_middle_the_same_command_ends_with_the_same_shards(
    tmp_path: Path, source: Path, struck: Path, command: Any, run: Run, content: Any, strike_at: int, workers: int
) -> None:
    """kill -9 of the parent with workers at work: they must go, too, and the end must be that of an undisturbed run."""
    folder = tmp_path / "dst"
    died = command(signal.SIGKILL.value, strike_at, "alone", *arguments(source, folder, workers), script=struck)
    assert died.returncode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    assert leftovers(folder)  # records, the lock, temporary files
    finished = sorted((folder / ".parts").glob("*.json"))
    before = stamps(folder)
    again = run(source, folder, shard_samples=12)
    undisturbed = run(source, tmp_path / "undisturbed", shard_samples=12)
    assert content(folder) == content(tmp_path / "undisturbed")
    assert again.digest == undisturbed.digest
    assert not leftovers(folder)
    assert verify(folder) == []
    kept = {path.name.removesuffix(".json") for path in finished}
    assert kept == {name for name in before if stamps(folder)[name] == before[name]}
    assert len(kept) == (1 if strike_at == 3 else 0)


@pytest.mark.parametrize(
    "signal_number, workers", [(signal.SIGINT, 2), pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow)]
)
def test_interrupted_it_leaves_cleanly_and_says_how_to_go_on(
    tmp_path: Path,
    source: Path,
    struck: Path,
    command: Any,
    run: Run,
    content: Any,
    signal_number: signal.Signals,
    workers: int,
) -> None:
    """Ctrl-C reaches the workers as well: none may write a traceback over the one line that matters."""
    folder = tmp_path / "dst"
    target = "group" if signal_number == signal.SIGINT else "alone"
    ended = command(signal_number.value, 4, target, *arguments(source, folder, workers), script=struck)
    assert ended.returncode == 130
    assert ended.stderr.splitlines()[-1] == "data_prep: interrupted; the same command resumes."
    assert "Traceback" not in ended.stderr
    assert not list(folder.glob(".tmp-*"))
    assert leftovers(folder) == [".parts"]  # the records of finished shards
    before = stamps(folder)
    assert before
    run(source, folder, shard_samples=12)
    run(source, tmp_path / "undisturbed", shard_samples=12)
    assert content(folder) == content(tmp_path / "undisturbed")


def test_an_archive_that_was_being_unpacked_is_removed(
    tmp_path: Path, source: Path, struck: Path, command: Any, archive: Any, run: Run, content: Any
) -> None:
    path = archive(source, tmp_path / "set.tar.gz")
    folder = tmp_path / "dst"
    command(signal.SIGKILL.value, 3, "alone", *arguments(path, folder, 0), script=struck)
    assert (tmp_path / ".dst.unpacked").exists()
    run(path, folder, shard_samples=12)
    assert not leftovers(folder)
    run(source, tmp_path / "undisturbed", shard_samples=12)
    assert content(folder) == content(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"shard_samples": 13}, "shard_samples was 12, now 13"),
        ({"licence": "mine"}, "licence was 'not stated', now 'mine'"),
    ],
)
def test_other_settings_into_the_same_folder_are_refused(
    tmp_path: Path, source: Path, run: Run, content: Any, change: dict[str, Any], expected: str
) -> None:
    run(source, tmp_path / "dst", shard_samples=12)
    before = content(tmp_path / "dst")
    with pytest.raises(DataError, match=f"dst holds another set: {expected}. Name a new folder, or delete that one"):
        run(source, tmp_path / "dst", **{"shard_samples": 12, **change})
    assert content(tmp_path / "dst") == before


def test_other_images_into_the_same_folder_are_refused(tmp_path: Path, source: Path, encoded: Any, run: Run) -> None:
    run(source, tmp_path / "dst")
    (source / "train" / "cat" / "0000.jpg").write_bytes(encoded(1000))
    with pytest.raises(DataError, match="holds another set: the images are not the same files"):
        run(source, tmp_path / "dst")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, source: Path, run: Run) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"dst is not empty \(it holds thesis.tex\); name a new folder"):
        run(source, tmp_path / "dst")
    assert os.listdir(tmp_path / "dst") == ["thesis.tex"]
    with pytest.raises(DataError, match=r"thesis.tex is a file; name a folder"):
        run(source, tmp_path / "dst" / "thesis.tex")


def test_two_at_once_are_refused(tmp_path: Path, source: Path, run: Run) -> None:
    holder = f"dst is in use by data_prep on host .*, process {os.getpid()}, since"
    with workspace.open_workspace(tmp_path / "dst"), pytest.raises(DataError, match=holder):
        run(source, tmp_path / "dst")
    run(source, tmp_path / "dst")


def test_a_finished_shard_that_was_removed_or_cut_is_written_again(
    tmp_path: Path, source: Path, run: Run, content: Any
) -> None:
    def stop(_: Any, __: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.workspace.Workspace.write_quarantine", stop)  # all shards are in place, the manifest is not
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "dst", shard_samples=12)
    before = stamps(tmp_path / "dst")
    (tmp_path / "dst" / "train-000002.tar").unlink()
    os.truncate(tmp_path / "dst" / "train-000001.tar", 1024)
    run(source, tmp_path / "dst", shard_samples=12)
    after = stamps(tmp_path / "dst")
    assert {name for name in before if before[name] != after[name]} == {"train-000001.tar", "train-000002.tar"}
    assert verify(tmp_path / "dst") == []


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, source: Path, run: Run, content: Any) -> None:
    from data_prep import write

    calls = 0
    real = write.os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4 + 2 * 3:  # plan, then for each shard: tar, index, folder, record
            raise OSError(28, "No space left on device")
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            run(source, tmp_path / "dst", shard_samples=12)
    assert stamps(tmp_path / "dst")
    assert not list((tmp_path / "dst").rglob(".tmp-*"))
    run(source, tmp_path / "dst", shard_samples=12)
    run(source, tmp_path / "undisturbed", shard_samples=12)
    assert content(tmp_path / "dst") == content(tmp_path / "undisturbed")
