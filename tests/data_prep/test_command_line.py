"""`python -m data_prep`: exit codes, one readable line for an error, progress; and the workers' failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clae_dist import __version__
from data_prep.__main__ import main

WORKERS_FAIL = """
import os
from clae_dist.errors import DataError
from data_prep.pool import run_tasks

def work(task, report):
    report(1)
    if task == "die":
        os._exit(9)
    if task == "fail":
        raise DataError("the source changes")
    return task

if __name__ == "__main__":
    for tasks in (["a", "b", "c", "d", "e"], ["die", "a"], ["a", "fail"]):
        counts = []
        try:
            print(sorted(run_tasks(work, tasks, 2, counts.append)), sum(counts))
        except DataError as error:
            print("DataError:", error)
"""


def test_a_run_from_folder_to_verified_shards(tmp_path: Path, make_folder: Any, command: Any) -> None:
    source, folder = make_folder({"cat": 10, "dog": 10}), tmp_path / "dst"
    done = command("prepare", source, folder, "--workers", 1, "--max-bad", "2%", "--shard-bytes", "1M", "--licence", "CC0")
    assert done.returncode == 0, done.stderr
    assert "src: 20 images, 2 classes, 2 shards." in done.stdout
    assert "a test split of 10% of every class is drawn with seed 0" in done.stdout
    assert f"{folder}: train 18, test 2" in done.stdout
    assert "20 of 20 images" in done.stderr
    assert main(["verify", str(folder)]) == 0
    (folder / "test-000000.tar").write_bytes(b"")
    assert main(["verify", str(folder)]) == 1
    assert main(["verify", str(tmp_path)]) == 2


def test_info_prints_what_the_manifest_says(
    tmp_path: Path, make_folder: Any, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run(
        make_folder({f"class-{number:02d}": 2 for number in range(11)}), tmp_path / "dst", test_share=0.5, licence="CC0"
    )
    assert main(["info", str(tmp_path / "dst")]) == 0
    said = capsys.readouterr().out
    assert "splits:      train 11 images in 1 shard(s), test 11 images in 1 shard(s)\n" in said
    assert "classes:     11 (class-00, " in said
    assert "class-09, …)\n" in said
    assert "balance:     train 1 a class, test 1 a class\n" in said
    assert main(["info", str(tmp_path / "dst"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.pop("splits") == {"train": 11, "test": 11}
    assert facts.pop("created") == manifest.created
    assert facts.pop("classes") == list(manifest.classes)
    assert facts.pop("class_counts") == {"train": [1] * 11, "test": [1] * 11}
    assert facts.pop("pixels") == "original encoded bytes"
    assert facts.pop("version") == __version__
    assert facts == {"name": "set", "source": "made here", "licence": "CC0", "quarantined": 0, "digest": manifest.digest}
    assert main(["info", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_info_shows_the_balance(tmp_path: Path, make_folder: Any, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(make_folder({"train/cat": 5, "train/dog": 2, "train/emu": 9, "test/cat": 1}), tmp_path / "dst")
    assert main(["info", str(tmp_path / "dst")]) == 0
    said = capsys.readouterr().out
    assert "balance:     train 2 (dog) to 9 (emu) a class, test 0 (dog) to 1 (cat) a class\n" in said


def test_info_says_that_images_have_no_labels(
    tmp_path: Path, make_folder: Any, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(make_folder({".": 4}), tmp_path / "dst")
    assert main(["info", str(tmp_path / "dst")]) == 0
    said = capsys.readouterr().out
    assert "classes:     none: the images have no labels\n" in said
    assert "balance:     train 3 without a label, test 1 without a label\n" in said


def test_demo_allows_more_bad_images_where_it_is_told_to(
    tmp_path: Path, make_folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder({"cat": 8, "dog": 8})
    (source / "cat" / "empty.jpg").touch()
    words = ["demo", str(tmp_path / "dst"), "--data", str(source), "--workers", "0"]
    assert main(words) == 2
    assert "more than --max-bad 0.01 allows" in capsys.readouterr().err
    assert main([*words, "--max-bad", "10%"]) == 0
    assert "1 images were set aside" in capsys.readouterr().out


def test_errors_are_one_line_and_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", str(tmp_path / "nowhere"), str(tmp_path / "dst"), "--workers", "0"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("data_prep: ")
    assert "nowhere does not exist; name a folder of class folders" in said
    with pytest.raises(ValueError, match="does not exist"):
        main([*words, "--debug"])


@pytest.mark.parametrize(
    "words",
    ["", "prepar", "prepare a", "prepare a b --max-bad 200%", "prepare a b --max-pixels inf", "prepare a b --resize 256"],
)
def test_wrong_usage_is_exit_code_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["prepare"], ["index"], ["verify"], ["info"], ["audit"], ["demo"]])
def test_help_tells_the_exit_codes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    assert "exit codes: 0 done; 1 verify found differences" in capsys.readouterr().out


def test_demo_takes_its_paths_from_the_environment(
    tmp_path: Path, make_folder: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLAE_DATA", str(make_folder({"cat": 4, "dog": 4}, "mine")))
    assert main(["demo", str(tmp_path / "dst"), "--workers", "0"]) == 0
    assert f"Images: {tmp_path / 'mine'}, as you asked." in capsys.readouterr().out
    other = make_folder({"owl": 4}, "other")
    assert main(["demo", str(tmp_path / "dst2"), "--data", str(other), "--workers", "0"]) == 0
    assert f"Images: {other}" in capsys.readouterr().out


def test_a_worker_that_dies_or_fails_is_an_error_and_not_a_hang(tmp_path: Path, command: Any) -> None:
    script = tmp_path / "workers.py"
    script.write_text(WORKERS_FAIL)
    done = command(script=script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "['a', 'b', 'c', 'd', 'e'] 5"
    assert "a worker process died (exit code 9" in lines[1]
    assert lines[2] == "DataError: the source changes"


def test_reading_a_large_archive_shows_progress_and_a_small_one_does_not(
    tmp_path: Path,
    make_folder: Any,
    archive: Any,
    run: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_folder({"cat": 4, "dog": 4})
    run(archive(source, tmp_path / "small.tar", "w"), tmp_path / "small")
    assert " MB, " not in capsys.readouterr().err
    now = iter(range(0, 10**6, 10))  # each look at the clock is ten seconds later
    monkeypatch.setattr("clae_dist.progress.time.monotonic", lambda: next(now))
    for mode, name in (("w", "large.tar"), ("w:gz", "large.tar.gz")):
        run(archive(source, tmp_path / name, mode), tmp_path / f"shards-{name}")
        lines = [line for line in capsys.readouterr().err.splitlines() if " MB, " in line]
        assert lines[0].startswith("0 of 0 MB, ")
        assert lines[-1].endswith((" left", " s"))
