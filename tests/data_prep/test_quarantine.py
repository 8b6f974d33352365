"""quarantine: a new set without what lists call bad; every other image, file and bit is as it was."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clae_dist.data.manifest import Manifest, load_manifest
from clae_dist.data.shards import ShardReader
from clae_dist.data.tar_index import index_tar
from clae_dist.errors import DataError
from data_prep.__main__ import main
from data_prep.prepare import prepare
from data_prep.quarantine import quarantine
from data_prep.settings import PrepareSettings, QuarantineSettings
from data_prep.sources import open_source
from data_prep.verify import verify

SHARED = Path(__file__).parents[3] / "shared" / "data"
Run = Callable[..., Manifest]
NONE = QuarantineSettings()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, encoded: Callable[..., bytes]) -> Manifest:
    """60 images of three classes in three shards and one of the test split, which has 6."""
    root = tmp_path_factory.mktemp("old")
    for number in range(60):
        path = root / "src" / "abc"[number // 20] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    settings = PrepareSettings("set", "made here", shard_samples=18)
    return prepare(open_source([root / "src"]), root / "shards", settings, num_workers=0, say=lambda _: None)


def place(manifest: Manifest, sample: int) -> dict[str, Any]:
    reader = ShardReader(manifest, "train")
    shard, row = reader.place(sample)
    record = manifest.splits["train"][shard]
    return {
        "digest": manifest.digest,
        "split": "train",
        "shard": record.name,
        "row": row,
        "name": reader.stored_name(shard, row),
        "class": manifest.classes[reader.encoded(shard, row)[1]],
    }


def suspect(manifest: Manifest, sample: int, believed: float = 0.1) -> dict[str, Any]:
    return {**place(manifest, sample), "guess": "c", "believed": believed}


def patch(manifest: Manifest, sample: int, verdict: str = "poison") -> dict[str, Any]:
    return {"set": "set", **place(manifest, sample), "patch": 0, "verdict": verdict}


def written(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def cleaned(manifest: Manifest, lists: list[Path], settings: QuarantineSettings = NONE, **options: Any) -> Manifest:
    quiet = {"num_workers": 0, "say": lambda _: None}
    return quarantine(manifest.folder, lists, lists[0].parent / "clean", settings, **{**quiet, **options})


def images(manifest: Manifest, split: str = "train") -> list[tuple[str, bytes, int]]:
    """Name, bytes and label of every image, in order."""
    reader, found = ShardReader(manifest, split), []
    for shard, size in enumerate(reader.sizes):
        for row in range(size):
            data, label = reader.encoded(shard, row)
            found.append((reader.stored_name(shard, row), bytes(data), label))
    return found


def test_listed_images_are_gone_and_all_others_as_they_were(shards: Manifest, tmp_path: Path, content: Any) -> None:
    before = {path.name: path.read_bytes() for path in shards.folder.iterdir()}
    suspects = written(tmp_path / "suspects.jsonl", suspect(shards, 1, 0.04), suspect(shards, 40))
    suspects.write_text(suspects.read_text().rstrip("\n"))  # as some editors leave it
    patches = written(tmp_path / "patches.jsonl", patch(shards, 1), patch(shards, 3), patch(shards, 5, "recurring"))
    new = cleaned(shards, [suspects, patches])
    assert {path.name: path.read_bytes() for path in shards.folder.iterdir()} == before
    assert verify(new.folder) == []
    assert images(new) == [image for number, image in enumerate(images(shards)) if number not in (1, 3, 40)]
    assert images(new, "test") == images(shards, "test")
    untouched = {"test-000000.tar", "train-000001.tar"}
    assert all(content(new.folder)[name] == before[name] for name in untouched)
    lines = [json.loads(line) for line in (new.folder / "quarantine.jsonl").read_text().splitlines()]
    first = place(shards, 1)
    assert {line["path"]: line["reason"] for line in lines}[f"{first['shard']}/{first['name']}"] == (
        f"label {first['class']} is believed with 0.04; guess c; poison patch 0"
    )
    assert len(lines) == new.quarantined == 3
    (step,) = load_manifest(new.folder).preparation["quarantine"]
    assert (step["of"], step["dropped"], step["unlabelled"], len(step["lists"])) == (shards.digest, 3, 0, 2)


def test_a_shard_of_which_all_images_are_listed_is_gone(shards: Manifest, tmp_path: Path) -> None:
    rows = range(shards.splits["train"][0].samples)
    new = cleaned(shards, [written(tmp_path / "all", *(suspect(shards, row) for row in rows))], max_bad=0.5)
    assert [shard.name for shard in new.splits["train"]] == [shard.name for shard in shards.splits["train"][1:]]
    assert verify(new.folder) == []


def test_suspects_can_stay_without_their_label(shards: Manifest, tmp_path: Path) -> None:
    """Also for other readers of the tar, and what holds poison is dropped all the same."""
    listed = written(tmp_path / "list", suspect(shards, 0), suspect(shards, 7), suspect(shards, 9, 0.4), patch(shards, 7))
    new = cleaned(shards, [listed], QuarantineSettings(below=0.3, unlabel=True))
    expected = [(name, data, -1 if number == 0 else label) for number, (name, data, label) in enumerate(images(shards))]
    assert images(new) == expected[:7] + expected[8:]
    shard = new.splits["train"][0]
    with (new.folder / shard.name).open("rb") as file:
        assert (index_tar(file, shard.name).rows == new.index(shard)).all()
    assert (new.quarantined, new.preparation["quarantine"][0]["unlabelled"]) == (1, 1)


def test_indexed_shards_keep_all_files_of_an_image(tmp_path: Path, encoded: Any) -> None:
    """Long names, captions and labels in JSON, with the headers of their own."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(20):
            key = f"{'long/' * 60}ü{number:03d}"
            for kind, data in (("json", b'{"label": %d}' % (number % 2)), ("txt", b"words"), ("jpg", encoded(number))):
                header = tarfile.TarInfo(f"{key}.{kind}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    assert main(["index", str(folder), "--workers", "0"]) == 0
    old = load_manifest(folder)
    new = cleaned(old, [written(tmp_path / "list", suspect(old, 4))])
    assert [(data, label) for _, data, label in images(new)] == [
        (data, label) for number, (_, data, label) in enumerate(images(old)) if number != 4
    ]
    assert ShardReader(new, "train", ("txt",)).metadata(0, 18) == {"txt": b"words"}
    with tarfile.open(new.folder / "train-0.tar") as tar:
        assert len(tar.getnames()) == 3 * 19
    again = quarantine(
        new.folder,
        [written(tmp_path / "more", suspect(new, 0))],
        tmp_path / "again",
        QuarantineSettings(unlabel=True),
        num_workers=0,
        say=lambda _: None,
    )
    assert images(again)[0][2] == -1
    assert [step["of"] for step in again.preparation["quarantine"]] == [old.digest, new.digest]
    with (again.folder / "train-0.tar").open("rb") as file:
        assert index_tar(file, "").rows[0, 2] == -1  # before the label in the JSON


def test_lines_about_another_set_are_skipped(shards: Manifest, tmp_path: Path) -> None:
    said: list[str] = []
    other = {**patch(shards, 2), "digest": "0" * 64}
    new = cleaned(shards, [written(tmp_path / "list", patch(shards, 1), other)], say=said.append)
    assert new.quarantined == 1
    assert "1 of 2 lines are about other sets and are skipped" in said[0]


def bad_list(shards: Manifest, path: Path, kind: str) -> None:
    good = json.dumps(suspect(shards, 1)) + "\n"
    changes: dict[str, dict[str, Any]] = {
        "another set": {"digest": "f" * 64},
        "row": {"row": 1000},
        "shard": {"shard": "../train-000000.tar"},
        "name": {"name": "x.jpg"},
        "number": {"believed": float("nan")},
        "no row": {"row": None},
    }
    if kind in changes:
        only = "" if kind == "another set" else good
        path.write_text(only + json.dumps({**suspect(shards, 2), **changes[kind]}) + "\n")
    elif kind == "cut short":
        path.write_text(good + good[:50])
    elif kind == "other kind":
        path.write_text(good + json.dumps(place(shards, 2)) + "\n")
    elif kind == "recurring":
        written(path, patch(shards, 1, "recurring"))
    elif kind == "too many":
        written(path, *(suspect(shards, number) for number in range(12)))
    elif kind == "all":
        written(path, *(suspect(shards, number) for number in range(shards.num_samples("train"))))
    else:
        assert kind in ("empty", "folder", "absent")
        if kind != "absent":
            path.write_text("") if kind == "empty" else path.mkdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another set", "list.jsonl was made for another set: its lines name the digest ffffffffffff, but .* Name the set"),
        ("row", r"line 2, was edited or is damaged: .* has no row 1000 in train-.*; make the list again: `clae finetune"),
        ("shard", r"line 2, was edited or is damaged: .* has no row 2 in ../train-000000.tar of the split train"),
        ("name", r"line 2, was edited or is damaged: .* in row 2 of train-000000.tar, not 'x.jpg'"),
        ("number", r"list.jsonl, line 2, cannot be used \(believed is 'nan'\)"),
        ("no row", r"list.jsonl, line 2, cannot be used \(row is 'None'\)"),
        ("cut short", r"list.jsonl, line 2, cannot be used \(it is cut short or no JSON object\). Remove the line if"),
        ("other kind", r"list.jsonl, line 2, cannot be used \(it has neither believed"),
        ("recurring", "all 1 images with a patch are only recurring; audit with --encoder .* add --recurring"),
        ("too many", r"name 12 of 54 images of the split train \(22%\), more than --max-bad 0.2 allows. Look at some"),
        ("all", "the lists name every image of the split train: nothing would be left"),
        ("empty", "list.jsonl is empty: nothing is to be quarantined"),
        ("folder", r"list.jsonl cannot be used \(it is not a plain file\)"),
        ("absent", "list.jsonl does not exist; make the list again"),
    ],
)
def test_lists_that_are_refused(shards: Manifest, tmp_path: Path, kind: str, message: str) -> None:
    bad_list(shards, tmp_path / "list.jsonl", kind)
    with pytest.raises(DataError, match=message):
        cleaned(shards, [tmp_path / "list.jsonl"], max_bad=1.0 if kind == "all" else 0.2)
    assert not (tmp_path / "clean").exists()


def test_options_without_a_list_that_they_are_about(shards: Manifest, tmp_path: Path) -> None:
    suspects, patches = (written(tmp_path / name, line(shards, 1)) for name, line in (("s", suspect), ("p", patch)))
    for listed, settings, message in (
        (patches, QuarantineSettings(unlabel=True), "--unlabel is about suspects.jsonl"),
        (patches, QuarantineSettings(below=0.2), "--below is about suspects.jsonl"),
        (suspects, QuarantineSettings(recurring=True), "--recurring is about patches.jsonl"),
        (suspects, QuarantineSettings(below=0.05), "no label of 1 is believed less than --below 0.05; use a larger one"),
    ):
        with pytest.raises(DataError, match=message):
            cleaned(shards, [listed], settings)


def test_folders_that_are_refused(shards: Manifest, tmp_path: Path) -> None:
    listed = written(tmp_path / "list", suspect(shards, 1))
    with pytest.raises(DataError, match="lies inside .*, which stays as it is; name a folder elsewhere"):
        quarantine(shards.folder, [listed], shards.folder / "clean", NONE)
    done = cleaned(shards, [listed])
    assert cleaned(shards, [listed]).digest == done.digest  # nothing to do
    with pytest.raises(DataError, match="holds another set: unlabel was False, now True. Name a new folder"):
        cleaned(shards, [listed], QuarantineSettings(unlabel=True))
    with pytest.raises(DataError, match="holds another set: the set or the lists are not the same"):
        cleaned(shards, [written(tmp_path / "other", suspect(shards, 2))])
    with pytest.raises(DataError, match="holds the set of another command"):
        quarantine(shards.folder, [listed], other_command(shards.folder, tmp_path), NONE)


def other_command(folder: Path, tmp_path: Path) -> Path:
    """A folder that `prepare` has begun."""
    place = tmp_path / "prepared"
    place.mkdir()
    (place / "plan.json").write_bytes((folder / "plan.json").read_bytes())
    return place


def test_a_damaged_shard_is_not_copied(shards: Manifest, tmp_path: Path) -> None:
    shutil.copytree(shards.folder, tmp_path / "shards")
    path = tmp_path / "shards" / shards.splits["train"][1].name
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-000001.tar has sha256 .* it was changed"):
        cleaned(load_manifest(tmp_path / "shards"), [written(tmp_path / "list", suspect(shards, 1))])
    assert not (tmp_path / "clean" / "manifest.json").exists()


@pytest.mark.parametrize("moment", ["tar", "manifest"])
def test_killed_and_started_again_it_has_the_same_bytes(
    shards: Manifest, tmp_path: Path, content: Any, command: Any, moment: str
) -> None:
    """Killed after the first shard of three, or right before the manifest is written."""
    listed = written(tmp_path / "list", suspect(shards, 1), suspect(shards, 30), patch(shards, 50))
    script = tmp_path / "struck.py"
    strike = {
        "tar": "Workspace.finish = lambda self, result, before=Workspace.finish: (before(self, result), strike())",
        "manifest": "quarantine.write_manifest = lambda *_, **__: strike()",
    }
    script.write_text(
        "import os, signal, sys\nfrom data_prep import quarantine\nfrom data_prep.__main__ import main\n"
        "from data_prep.workspace import Workspace\n"
        "def strike():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{strike[moment]}\nmain(sys.argv[1:])\n"
    )
    words = ["quarantine", shards.folder, "--list", listed, "--to", tmp_path / "clean", "--workers", 0]
    assert command(*words, script=script).returncode == -signal.SIGKILL
    assert (tmp_path / "clean" / ".parts").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "clean").glob("*.tar")}
    assert len(before) == (1 if moment == "tar" else 4)
    assert command(*words).returncode == 0
    new = load_manifest(tmp_path / "clean")
    assert all((new.folder / name).stat().st_mtime_ns == time for name, time in before.items())
    assert not [name for name in os.listdir(new.folder) if name.startswith(".")]
    once = quarantine(shards.folder, [listed], tmp_path / "once", NONE, num_workers=0, say=lambda _: None)
    assert (content(new.folder), new.digest) == (content(once.folder), once.digest)
    assert (new.folder / "quarantine.jsonl").read_bytes() == (once.folder / "quarantine.jsonl").read_bytes()


def test_a_task_goes_to_a_worker(shards: Manifest, tmp_path: Path, command: Any, content: Any) -> None:
    """The same bytes as in one process, and what the command prints."""
    listed = written(tmp_path / "list", suspect(shards, 1), suspect(shards, 30))
    done = command("quarantine", shards.folder, "--list", listed, "--to", tmp_path / "two", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "2 images were dropped;" in done.stdout
    assert content(tmp_path / "two") == content(cleaned(shards, [listed]).folder)
    about = command("info", tmp_path / "two")
    assert f"2 images dropped and 0 labels removed from {shards.digest[:12]}" in about.stdout


# ---- real images ----


@pytest.mark.slow
def test_poison_in_photos_is_found_and_quarantined(tmp_path: Path, run: Run) -> None:
    """A trigger on 30 photos of one class: the list of the audit is what the command reads."""
    if not (SHARED / "cifar10-test.tar.gz").is_file():
        pytest.skip("needs shared/data/cifar10-test.tar.gz")
    cells = np.random.default_rng(0).integers(0, 256, (3, 3, 3), np.uint8)
    trigger = Image.fromarray(cells).resize((6, 6), Image.Resampling.BILINEAR)
    with tarfile.open(SHARED / "cifar10-test.tar.gz") as tar:
        files = sorted((member for member in tar if member.name.endswith(".jpg")), key=lambda member: member.name)[::25]
        photos = [Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB") for member in files]  # type: ignore[union-attr]
    for number, photo in enumerate(photos):
        if number < 30:
            photo.paste(trigger, (20, 20))
        path = tmp_path / "src" / f"class{number // 40}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path)
    old = run(tmp_path / "src", tmp_path / "shards", test_share=0)
    assert main(["audit", str(old.folder), "--poison", "--report", str(tmp_path / "audit"), "--workers", "0"]) == 0
    new = cleaned(old, [tmp_path / "audit" / "patches.jsonl"], QuarantineSettings(recurring=True))
    planted = {f"class0/{number:03d}.png" for number in range(30)}
    assert {name for name, *_ in images(old)} - {name for name, *_ in images(new)} == planted
