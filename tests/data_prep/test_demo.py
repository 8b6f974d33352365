"""The quickstart's images: the right ones, named plainly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from clae_dist.data.manifest import Manifest
from clae_dist.errors import DataError
from data_prep import demo


@pytest.fixture
def fake_cifar(tmp_path: Path, make_folder: Any, archive: Any) -> Path:
    """cifar10-train.tar.gz with cifar10-test.tar.gz beside it; the path of the first."""
    (tmp_path / "data").mkdir()
    train = make_folder({"train/cat": 6, "train/dog": 6}, "train-part")
    test = make_folder({"test/cat": 2, "test/dog": 2}, "test-part")
    archive(test, tmp_path / "data" / "cifar10-test.tar.gz")
    made: Path = archive(train, tmp_path / "data" / "cifar10-train.tar.gz")
    return made


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Manifest, str]]:
    """prepare(data=None, name="dst"): (manifest, all that was said); nothing is found beside the checkout."""
    monkeypatch.setattr(demo, "FOUND_CIFAR", tmp_path / "nothing-here")

    def call(data: Path | None = None, name: str = "dst") -> tuple[Manifest, str]:
        said: list[str] = []
        manifest = demo.prepare_demo(tmp_path / name, data, tmp_path / "cache", num_workers=0, say=said.append)
        return manifest, "\n".join(said)

    return call


def test_two_archives_make_one_set_with_two_splits(fake_cifar: Path, prepare: Any) -> None:
    manifest, said = prepare(fake_cifar)
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {"train": 12, "test": 4}
    assert (manifest.name, manifest.classes) == ("cifar10", ("cat", "dog"))
    assert manifest.source == "cifar10-train.tar.gz and cifar10-test.tar.gz"
    assert "research and tests only" in manifest.licence
    assert str(fake_cifar) in said
    assert "as you asked" in said


def test_the_archives_beside_the_checkout_are_found(fake_cifar: Path, prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "FOUND_CIFAR", fake_cifar)
    manifest, said = prepare()
    assert manifest.num_samples("test") == 4
    assert "CIFAR-10, found in" in said


def test_a_folder_of_your_own(make_folder: Any, prepare: Any) -> None:
    manifest, _ = prepare(make_folder({"cat": 10, "dog": 10}, "pets"))
    assert (manifest.name, manifest.licence) == ("pets", "not stated")
    assert manifest.num_samples("test") == 2


def test_a_path_that_does_not_exist_is_no_reason_to_take_other_images(tmp_path: Path, prepare: Any) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        prepare(tmp_path / "nowhere")


def test_the_same_set_again_returns_at_once_and_another_is_refused(
    tmp_path: Path, fake_cifar: Path, make_folder: Any, prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = prepare(fake_cifar)

    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("a finished set was written again")

    monkeypatch.setattr("data_prep.prepare.run_tasks", not_again)
    again, said = prepare(fake_cifar)
    assert again == first
    assert "already holds this very set (train 12, test 4); nothing to do" in said
    with pytest.raises(DataError, match=r"dst holds another set: .*Name a new folder, or delete that one"):
        prepare(make_folder({"cat": 3}, "pets"))
    (tmp_path / "dst" / "test-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"test-000000.tar is 0 bytes"):
        prepare(fake_cifar)


def no_network(*_: object, **__: object) -> None:
    raise URLError("Temporary failure in name resolution")


def test_without_a_network_the_digits_are_taken_and_named(
    tmp_path: Path, prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", no_network)
    manifest, said = prepare()
    assert "CIFAR-10 could not be downloaded (<urlopen error Temporary failure in name resolution>)." in said
    assert "Images: scikit-learn's handwritten digits instead" in said
    assert manifest.name == "digits"
    assert manifest.classes == tuple("0123456789")
    assert manifest.num_samples("train") + manifest.num_samples("test") == 1797
    with Image.open(next((tmp_path / "cache" / "digits-png" / "7").iterdir())) as image:
        assert (image.size, image.mode) == ((32, 32), "L")
        assert np.asarray(image).max() > 200
    assert "already holds this very set" in prepare()[1]


def test_a_download_becomes_a_folder_of_both_splits(tmp_path: Path, prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class Downloaded:
        classes = ("plane", "ship")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert download
            asked.append(train)
            self._count = 6 if train else 2

        def __iter__(self) -> Any:
            noise = np.random.default_rng(self._count).integers(0, 256, (self._count, 32, 32, 3), np.uint8)
            return iter([(Image.fromarray(pixels), number % 2) for number, pixels in enumerate(noise)])

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Downloaded)
    manifest, said = prepare()
    assert "CIFAR-10, downloaded with torchvision into" in said
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {"train": 6, "test": 2}
    assert manifest.classes == ("plane", "ship")
    prepare(name="other")
    assert asked == [True, False]  # the second time the cache is used
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["cifar10-png"]
