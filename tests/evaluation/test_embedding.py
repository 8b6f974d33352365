"""Features of folders, lists and shards of images: from Python and by `clae embed`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clae_dist.cli import main
from clae_dist.data.evaluation_set import EvaluationSet
from clae_dist.data.images import open_dataset
from clae_dist.data.manifest import load_manifest
from clae_dist.deploy.embedding import embed, looks_of
from clae_dist.deploy.embedding_file import write_embeddings
from clae_dist.deploy.embedding_parts import embed_in_parts
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.export import export_encoder
from clae_dist.deploy.window import read_window
from clae_dist.errors import ConfigError, DataError
from clae_dist.evaluation.features import extract
from clae_dist.runs.checkpoint import load_model
from clae_dist.world import World
from tests.processes import CLAE, TORCHRUN, Process, clae, finish, started
from tests.processes import run as run_to_its_end
from tests.ranks import RankPool

MakeRun = Callable[..., Path]


def write_images(folder: Path, count: int = 5) -> list[Path]:
    """PNGs of random sizes in two subfolders, a hidden file and one that is no image."""
    generator = np.random.default_rng(0)
    paths = []
    for number in range(count):
        path = folder / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = generator.integers(10, 40, 2)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    (folder / ".0.png").write_bytes(b"hidden")
    (folder / "notes.txt").write_text("no image")
    return paths


def test_shards_have_the_features_of_evaluation(make_run: MakeRun, labelled_shards: Path) -> None:
    run = make_run()
    images = EvaluationSet(load_manifest(labelled_shards), "test", 16)
    expected = extract(load_model(run)[1], images, "cpu", 8)
    features = embed(labelled_shards, load_encoder(run), split="test", batch_size=8)
    assert features.dtype == np.float32
    assert np.array_equal(features, expected.features_NF.numpy())
    dataset = open_dataset(labelled_shards, "test")
    assert list(dataset.ids) == expected.ids_N.tolist()
    assert [label for _, label, _ in dataset] == expected.labels_N.tolist()


def test_a_folder_a_list_and_images_in_memory_are_the_same(make_run: MakeRun, tmp_path: Path) -> None:
    encoder = load_encoder(make_run())
    paths = sorted(write_images(tmp_path / "images"))
    with torch.no_grad():
        expected = torch.cat([encoder(encoder.transform(Image.open(path))[None]) for path in paths]).numpy()
    folder = open_dataset(tmp_path / "images", transform=encoder.transform)
    assert list(folder.ids) == ["0/0.png", "0/2.png", "0/4.png", "1/1.png", "1/3.png"]
    batches = torch.utils.data.DataLoader(folder, batch_size=2)
    with torch.no_grad():
        loaded = torch.cat([encoder(images) for images, _, _ in batches]).numpy()
    in_memory = [Image.open(path) for path in paths]
    seen: list[int] = []
    for features in (
        loaded,
        embed(folder, encoder, progress=seen.append),
        embed(str(tmp_path / "images"), encoder, batch_size=2),
        embed(paths, encoder, batch_size=3, num_workers=2),
        embed(in_memory, encoder),
        embed(in_memory, encoder.train()),  # batch statistics are not used
    ):
        np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)  # convolutions of batches of other sizes
    assert seen == [5]


def test_an_image_that_cannot_be_decoded(make_run: MakeRun, tmp_path: Path) -> None:
    encoder = load_encoder(make_run())
    write_images(tmp_path)
    expected = embed(tmp_path, encoder)
    (tmp_path / "0" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    with pytest.raises(DataError, match=r"0/2\.png: .*; remove the image, or use on_undecodable='nan'"):
        embed(tmp_path, encoder)
    features = embed(tmp_path, encoder, on_undecodable="nan")
    assert np.isnan(features[1]).all()
    np.testing.assert_allclose(np.delete(features, 1, 0), np.delete(expected, 1, 0), rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"0/2\.png cannot be decoded"):
        open_dataset(tmp_path)[1]


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_the_command(
    make_run: MakeRun, labelled_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    run, target = make_run(), tmp_path / "out" / f"features.{suffix}"
    assert main(["embed", str(run), str(labelled_shards), "--split", "test", "--to", str(target), "--batch-size", "7"]) == 0
    said = capsys.readouterr()
    assert "30 of 30 images" in said.err
    assert f"wrote {target}: 30 rows of 256 features" in said.out
    expected = embed(labelled_shards, load_encoder(run), split="test", batch_size=7)
    features, ids, labels, facts = read(target)
    assert np.array_equal(features, expected)
    window = read_window(target)
    pixels = torch.stack([image for image, _, _ in open_dataset(labelled_shards, "test", load_encoder(run).transform)])
    assert set(window.looks) == {"brightness", "contrast", "sharpness"}
    for name, values in looks_of(pixels).items():
        torch.testing.assert_close(window.looks[name], values, rtol=0, atol=2e-5)
    assert np.array_equal(window.features.numpy(), expected)
    assert window.ids == ids == list(range(30))
    assert window.facts["weights"] == load_encoder(export_encoder(run)).weights_digest()
    assert labels == ["blue", "green", "red"] * 10
    assert (facts["format"], facts["encoder"]["step"], facts["ids_are"]) == ("clae-dist embeddings 1", 7, "positions")
    assert {path.suffix for path in target.parent.iterdir()} == ({".npy", ".json"} if suffix == "npy" else {".parquet"})


def read(target: Path) -> tuple[np.ndarray, list[object], list[object], dict[str, object]]:
    """Features, ids, labels and facts of a file of embeddings."""
    if target.suffix == ".npy":
        facts = json.loads(target.with_suffix(".ids.json").read_text())
        return np.load(target), facts["ids"], facts["labels"], facts
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(target)
    facts = json.loads(table.schema.metadata[b"clae-dist"])
    features = np.stack(table["embedding"].to_numpy())
    return features, table["id"].to_pylist(), table["label"].to_pylist(), facts


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_the_command_skips_and_counts_undecodable_images(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    export = export_encoder(make_run())
    write_images(tmp_path / "images")
    (tmp_path / "images" / "0" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    target = tmp_path / f"features.{suffix}"
    assert main(["embed", str(export), str(tmp_path / "images"), "--to", str(target), "--batch-size", "2"]) == 0
    assert "1 of 5 images cannot be decoded and is skipped" in capsys.readouterr().out
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "one.jpg").write_bytes(b"no picture")
    before = sorted(tmp_path.iterdir())
    assert main(["embed", str(export), str(broken), "--to", str(tmp_path / "none.npy")]) == 3
    assert "none of 1 image can be decoded" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before  # neither an empty file nor its parts
    features, ids, labels, facts = read(target)
    assert (features.shape, ids, labels) == ((4, 256), ["0/0.png", "0/4.png", "1/1.png", "1/3.png"], [None] * 4)
    assert facts["ids_are"] == "paths"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["RUN", "IMAGES", "--to", "x.csv"], 2, "--to is 'x.csv'; name a file that ends in .npy or .parquet."),
        (["RUN", "nowhere", "--to", "x.npy"], 2, "IMAGES is 'nowhere', which does not exist; name a folder of images, or"),
        (["nowhere", "IMAGES", "--to", "x.npy"], 2, "RUN_OR_EXPORT is 'nowhere', which holds neither"),
        (["RUN", "empty", "--to", "x.npy"], 3, "empty holds no images and no manifest.json"),
        (["RUN", "SHARDS", "--split", "val", "--to", "x.npy"], 3, "has no split 'val'; it has test, train"),
        (["RUN", "IMAGES", "--to", "x.npy", "--batch-size", "0"], 2, "batch_size is 0; use at least 1"),
        (["RUN", "IMAGES", "--to", "file/x.npy"], 5, "cannot be written"),
    ],
)
def test_what_the_command_cannot_use(
    make_run: MakeRun,
    labelled_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    places = {"RUN": make_run(), "IMAGES": tmp_path / "images", "SHARDS": labelled_shards}
    write_images(tmp_path / "images", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["embed", *(str(places.get(one, one)) for one in arguments)]) == code
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def links(folder: Path, count: int) -> Path:
    """A folder of five images under `count` further names."""
    paths = write_images(folder)
    for number in range(count):
        os.link(paths[number % len(paths)], folder / f"link-{number:05d}.png")
    return folder


def parts(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{target.name}.parts-*/*.part"))


def stop_early(*command: object, target: Path, number: int, num_parts: int = 1, least: int = 4096) -> tuple[int, str]:
    """Start the command, and send its process a signal when it has written so many files of parts and bytes in them."""
    with started(*command) as process:
        wait_for_parts(process, target, num_parts, least)
        process.send_signal(number)
        return finish(process, 60)


def wait_for_parts(process: Process, target: Path, num_parts: int = 1, least: int = 4096) -> None:
    deadline = time.monotonic() + 120
    while len(found := parts(target)) < num_parts or sum(path.stat().st_size for path in found) < least:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _embed_on(world: World, run: str, images: str, target: str) -> int:
    torch.set_num_threads(1)
    return write_embeddings(open_dataset(images), load_encoder(run), Path(target), 2, 0, lambda _: None, world)


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_three_ranks_write_the_bytes_of_one(make_run: MakeRun, ranks: RankPool, tmp_path: Path, suffix: str) -> None:
    """Seven batches, the last one short, with an undecodable image among them."""
    run, images = make_run(), links(tmp_path / "images", 8)
    (images / "link-00003.png").unlink()
    (images / "link-00003.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    written = {}
    for size in (1, 3):
        target = tmp_path / str(size) / f"features.{suffix}"
        assert ranks.run(size, _embed_on, str(run), str(images), str(target)) == [12] * size
        written[size] = {path.name: path.read_bytes() for path in target.parent.iterdir()}
    assert written[1] == written[3]
    assert len(written[1]) == (2 if suffix == "npy" else 1)


def test_parts_of_other_images_are_not_continued(make_run: MakeRun, tmp_path: Path) -> None:
    """Of a changed image the path is the same; an encoder of other weights and another batch size are others, too."""
    encoder, images = load_encoder(make_run()), links(tmp_path / "images", 2)
    target = tmp_path / "features.npy"

    def folder(batch_size: int = 2) -> str:
        journal = embed_in_parts(open_dataset(images), encoder, target, {}, batch_size, 0, World.single("cpu"), lambda _: None)
        return str(journal.folder)

    first = folder()
    assert folder() == first
    assert folder(3) != first
    os.utime(images / "0" / "0.png", ns=(1, 1))
    assert folder() != first


@pytest.mark.slow
def test_killed_ranks_of_torchrun_continue_with_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    run, images = make_run(), links(tmp_path / "images", 800)
    alone, shared = tmp_path / "alone" / "features.npy", tmp_path / "shared" / "features.npy"
    shared.parent.mkdir()
    words = ["embed", run, images, "--batch-size", 2, "--workers", 0, "--to"]
    clae(*words, alone).check_returncode()
    three = [word.replace("nproc-per-node=2", "nproc-per-node=3") for word in TORCHRUN]
    code, _ = stop_early(*three, *words, shared, target=shared, number=signal.SIGKILL, num_parts=3, least=20_000)
    assert code == -signal.SIGKILL
    assert parts(shared)
    assert not shared.exists()
    done = run_to_its_end(*three, *words, shared)
    assert done.returncode == 0, done.stderr
    assert "were embedded before an interruption" in done.stdout
    assert {path.name: path.read_bytes() for path in shared.parent.iterdir()} == {
        path.name: path.read_bytes() for path in alone.parent.iterdir()
    }


@pytest.mark.slow
def test_ctrl_c_leaves_the_old_file_and_the_same_command_continues(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images = make_run(), links(tmp_path / "images", 600)
    target = tmp_path / "to" / "features.npy"
    target.parent.mkdir()
    target.write_bytes(b"old")
    words = ["embed", str(run), str(images), "--to", str(target), "--batch-size", "2", "--workers", "0"]
    code, output = stop_early(*CLAE, *words, target=target, number=signal.SIGINT)
    assert (code, "Ctrl-C" in output) == (130, True), output
    assert target.read_bytes() == b"old"
    assert main(words) == 0
    assert "images were embedded before an interruption, and are kept" in capsys.readouterr().out
    assert sorted(path.name for path in target.parent.iterdir()) == ["features.ids.json", "features.npy"]
    assert main([*words[:4], str(target.with_name("again.npy")), *words[5:]]) == 0
    assert target.with_name("again.npy").read_bytes() == target.read_bytes()


@pytest.mark.slow
def test_a_second_command_for_one_file_is_refused_until_the_first_is_gone(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both would append to the same parts. The first is stopped meanwhile, so that it cannot end; then it is killed."""
    run, images = make_run(), links(tmp_path / "images", 600)
    target = tmp_path / "to" / "features.npy"
    words = ["embed", str(run), str(images), "--to", str(target), "--batch-size", "2", "--workers", "0"]
    with started(*CLAE, *words) as first:
        wait_for_parts(first, target)
        first.send_signal(signal.SIGSTOP)
        before = {path: path.read_bytes() for path in parts(target)}
        assert main(words) == 2
        message = capsys.readouterr().err
        assert f"{target.parent} is in use by clae embed on host {os.uname().nodename}, process {first.pid}, since " in message
        assert "it writes features.npy. Wait until it has ended or end it, or name another file with --to." in message
        assert {path: path.read_bytes() for path in parts(target)} == before
        first.kill()
        finish(first, 60)
    assert main(words) == 0
    assert "images were embedded before an interruption, and are kept" in capsys.readouterr().out
    assert sorted(path.name for path in target.parent.iterdir()) == ["features.ids.json", "features.npy"]


def test_a_data_set_that_is_none(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_undecodable is 'skip'; use raise or nan"):
        embed([], load_encoder(make_run()), on_undecodable="skip")  # type: ignore[arg-type]
    (tmp_path / "x-000000.tar").touch()
    with pytest.raises(DataError, match=r"name its shards, such as .*x-000000\.tar"):
        open_dataset(tmp_path)
    assert embed([], load_encoder(tmp_path / "run")).shape == (0, 256)
