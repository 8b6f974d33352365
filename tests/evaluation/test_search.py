"""`clae search`: neighbours of images by an encoder, and indexes that it cannot use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from clae_dist.cli import main
from clae_dist.data.images import open_dataset
from clae_dist.deploy.embedding_file import write_embeddings
from clae_dist.deploy.encoder import Encoder
from clae_dist.deploy.search import search
from clae_dist.deploy.window import read_window
from clae_dist.errors import BAD_CONFIG, BAD_DATA, OK

MakeRun = Callable[..., Path]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eight images, of which 0 and 1 are almost the same."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    pixels = np.kron(generator.choice([0, 255], (8, 2, 2, 3)), np.ones((1, 10, 10, 1))).astype(np.uint8)
    pixels[1] = np.where(generator.random((20, 20, 1)) < 0.02, 0, pixels[0])
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_the_nearest_come_first(images: Path, tmp_path: Path, suffix: str) -> None:
    """By an encoder whose features are the pixels about their mean."""
    encoder = Encoder(nn.Flatten(), 3 * 16 * 16, 16, (0.5,) * 3, (0.5,) * 3, {})
    index = tmp_path / f"index.{suffix}"
    write_embeddings(open_dataset(images), encoder, index, 4, 0)
    queries = [images / "0.png", images / "5.png"]
    first, second = search(read_window(index), encoder, queries, 3)
    assert [hit.id for hit in first][:2] == ["0.png", "1.png"]
    assert first[0].cosine == pytest.approx(1, abs=1e-5)
    assert first[1].cosine > first[2].cosine
    assert second[0].id == "5.png"


def test_the_command(make_run: MakeRun, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, index, page = make_run(), tmp_path / "index.npy", tmp_path / "found.html"
    assert main(["embed", str(run), str(images), "--to", str(index)]) == OK
    capsys.readouterr()
    queries = [str(images / "0.png"), str(images / "5.png")]
    words = ["search", str(index), *queries, "--encoder", str(run), "-k", "3"]
    assert main([*words, "--json", "--to", str(page), "--images", str(images)]) == OK
    found = json.loads(capsys.readouterr().out)
    assert {query: len(hits) for query, hits in found.items()} == dict.fromkeys(queries, 3)
    assert page.read_text().count("data:image/jpeg") == 2 * (1 + 3)
    assert main(words) == OK
    assert f"  {found[queries[1]][0]['cosine']:.4f}  {found[queries[1]][0]['id']}" in capsys.readouterr().out


def test_what_cannot_be_used(make_run: MakeRun, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = make_run(), make_run("seed=5", run_dir=tmp_path / "other")
    index, few = tmp_path / "index.npy", tmp_path / "few"
    few.mkdir()
    (few / "0.png").hardlink_to(images / "0.png")
    assert main(["embed", str(run), str(images), "--to", str(index)]) == OK
    (tmp_path / "broken.png").write_bytes(b"no image")
    query = str(images / "0.png")
    for words, code, said in (
        ([query, "--encoder", str(other)], BAD_CONFIG, "was embedded by another encoder"),
        ([str(tmp_path / "broken.png"), "--encoder", str(run)], BAD_DATA, "cannot be decoded"),
        ([str(tmp_path / "gone.png"), "--encoder", str(run)], BAD_DATA, "gone.png', which is no file"),
        ([query, "--encoder", str(run), "-k", "0"], BAD_CONFIG, "-k is 0"),
        ([query, "--encoder", str(run), "--images", str(images)], BAD_CONFIG, "add --to"),
        (
            [query, "--encoder", str(run), "--to", str(tmp_path / "x.html"), "--images", str(few)],
            BAD_CONFIG,
            "has no image '1.png'",
        ),
    ):
        assert main(["search", str(index), *words]) == code
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
