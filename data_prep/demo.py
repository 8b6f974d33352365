"""The images of the quickstart: what the user names, else CIFAR-10 found or downloaded, else scikit-learn's digits."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

from clae_dist.data.manifest import Manifest
from clae_dist.files import make_folders
from clae_dist.storage import writing
from data_prep.prepare import Say, prepare
from data_prep.settings import PrepareSettings
from data_prep.sources import open_source
from data_prep.sources.entry import Source, origin_of
from data_prep.sources.folder import FolderSource

FOUND_CIFAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-train.tar.gz"
_CIFAR_LICENCE = (
    "not stated by its makers; research and tests only. Cite: A. Krizhevsky, Learning Multiple Layers of Features, 2009"
)
_DIGITS_LICENCE = "CC BY 4.0 (Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998)"
_CONNECT_TIMEOUT_S = 20.0


def prepare_demo(
    folder: Path, data: Path | None, cache: Path, *, max_bad: float = 0.01, num_workers: int, say: Say = print
) -> Manifest:
    """Prepares the quickstart's images in `folder` and says which they are. Raises DataError."""
    source, settings = choose(data, cache, say)
    return prepare(source, folder, settings, max_bad=max_bad, num_workers=num_workers, say=say)


def choose(data: Path | None, cache: Path, say: Say) -> tuple[Source, PrepareSettings]:
    """The images and what to say about them in the manifest. Raises DataError for a path that does not exist."""
    if data is not None:
        source = _named(data)
        names = " and ".join(str(path) for path in source.paths)
        say(f"Images: {names}, as you asked.")
        return source, _settings(source)
    if FOUND_CIFAR.is_file():
        source = _named(FOUND_CIFAR)
        say(f"Images: CIFAR-10, found in {' and '.join(str(path) for path in source.paths)}.")
        return source, _settings(source)
    try:
        folder = _downloaded_cifar(cache, say)
    except (URLError, TimeoutError, ConnectionError, HTTPException, RuntimeError) as error:
        say(f"CIFAR-10 could not be downloaded ({error}).")
        say("Images: scikit-learn's handwritten digits instead, 1,797 grey images of 8x8 pixels enlarged to 32x32.")
        say("They are a stand-in to see everything run, too few and too simple to judge a method; --data PATH takes your own.")
        return FolderSource(_digits(cache)), PrepareSettings(
            "digits", "scikit-learn, load_digits, enlarged to 32x32", _DIGITS_LICENCE, test_share=0.2
        )
    say(f"Images: CIFAR-10, downloaded with torchvision into {folder}.")
    return FolderSource(folder), PrepareSettings("cifar10", "CIFAR-10 through torchvision, as PNG", _CIFAR_LICENCE)


def _named(path: Path) -> Source:
    """A folder or an archive; NAME-train.tar* with NAME-test.tar* beside it are one set."""
    other = path.with_name(path.name.replace("-train.tar", "-test.tar"))
    both = path.is_file() and other != path and other.is_file()
    return open_source([path, other] if both else [path])


def _settings(source: Source) -> PrepareSettings:
    origin = origin_of(source)
    return (
        PrepareSettings(source.name, origin, _CIFAR_LICENCE)
        if source.name == "cifar10"
        else PrepareSettings(source.name, origin)
    )


def _downloaded_cifar(cache: Path, say: Say) -> Path:
    """A folder of PNGs by split and class, from torchvision's download. Raises what a missing network raises."""
    target = cache / "cifar10-png"
    if target.is_dir():
        return target
    say(f"Downloading CIFAR-10 (170 MB) into {cache} …")
    from torchvision.datasets import CIFAR10

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_CONNECT_TIMEOUT_S)  # torchvision sets none: a firewall that swallows packets would hang it
    try:
        splits = {split: CIFAR10(str(cache / "download"), train=split == "train", download=True) for split in ("train", "test")}
    finally:
        socket.setdefaulttimeout(before)

    def images() -> Iterable[tuple[str, Any]]:
        for split, images in splits.items():
            for number, (image, label) in enumerate(images):
                yield f"{split}/{images.classes[label]}/{number:05d}.png", image

    return _write_pngs(target, images())


def _digits(cache: Path) -> Path:
    """A folder of PNGs by class: 32x32 grey, enlarged from 8x8 with values 0 to 16."""
    target = cache / "digits-png"
    if target.is_dir():
        return target
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()

    def images() -> Iterable[tuple[str, Any]]:
        for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            small = Image.fromarray((pixels * (255 / 16)).round().astype("uint8"))
            yield f"{label}/{number:04d}.png", small.resize((32, 32), Image.Resampling.BICUBIC)

    return _write_pngs(target, images())


def _write_pngs(target: Path, images: Iterable[tuple[str, Any]]) -> Path:
    """Writes a folder as a whole: an interrupted attempt leaves nothing that could pass for it."""
    make_folders(target.parent)
    with writing(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=target.name + ".") as scratch:
        partial = Path(scratch, target.name)
        for path, image in images:
            file = partial / path
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, compress_level=1)
        if not target.is_dir():  # else another process was faster, with the same images
            partial.rename(target)
    return target
