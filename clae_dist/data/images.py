"""Images one at a time, for evaluation and embeddings: of shards, of files, or in memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from clae_dist.config import Data
from clae_dist.data.decode import DecodeError, decode_rgb, pixels_of
from clae_dist.data.image_names import is_hidden, is_image_name
from clae_dist.data.manifest import FILE_NAME
from clae_dist.data.shard_set import open_shards
from clae_dist.data.shards import BadSampleError, ShardReader
from clae_dist.data.urls import is_tar, redact_list, scheme
from clae_dist.errors import ConfigError, DataError
from clae_dist.home import expand_home
from clae_dist.reading import ReadError, open_regular

Say = Callable[[str], None]
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str] | Image.Image]


class Images(Dataset[tuple[Any, int, Any]], ABC):
    """A map-style dataset: `images[i]` is (image, label, id).

    The image is a PIL image in RGB, or the result of `transform` for it, such as `encoder.transform`. The label is a position
    in `classes`, or -1 without a label. `ids` holds the id of every image: its position in the split of a set of shards, its
    path in a folder, or its position in a list of images in memory.
    """

    ids: Sequence[Any]
    classes: Sequence[str] = ()

    def __init__(self, transform: Callable[[Image.Image], Any] | None = None) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Any, int, Any]:
        """Raises BadSampleError, a DataError, for an image that cannot be decoded."""
        pixels_3HW, label = self.read(range(len(self))[i])  # which raises IndexError at the end, as iteration requires
        image = Image.fromarray(pixels_3HW.permute(1, 2, 0).contiguous().numpy())
        return (image if self.transform is None else self.transform(image)), label, self.ids[i]

    @abstractmethod
    def read(self, i: int) -> tuple[torch.Tensor, int]:
        """Pixels as uint8 (3, H, W), and the label. Raises BadSampleError."""


class ShardImages(Images):
    """The images of one split of a set of shards, in the order of their ids."""

    def __init__(self, reader: ShardReader, transform: Callable[[Image.Image], Any] | None = None) -> None:
        super().__init__(transform)
        self._reader = reader
        self.manifest, self.split = reader.manifest, reader.split
        self.ids = range(sum(reader.sizes))
        self.classes = reader.manifest.classes

    def read(self, i: int) -> tuple[torch.Tensor, int]:
        return self._reader.read(*self._reader.place(i))


class FileImages(Images):
    """Images in files, which are relative to `folder`, or in memory."""

    def __init__(
        self,
        images: Sequence[str | os.PathLike[str] | Image.Image],
        folder: Path | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        super().__init__(transform)
        self._images, self._folder = list(images), folder or Path()
        self.ids = [i if isinstance(image, Image.Image) else os.fspath(image) for i, image in enumerate(self._images)]

    def stats(self) -> Iterator[tuple[str, os.stat_result]]:
        """Path and status of each image that is a file and is there."""
        for image in self._images:
            if not isinstance(image, Image.Image):
                with suppress(FileNotFoundError):
                    yield os.fspath(image), os.stat(self._folder / image)

    @property
    def in_memory(self) -> bool:
        """True if an image is in memory, and would have to be copied to other processes."""
        return any(isinstance(image, Image.Image) for image in self._images)

    def read(self, i: int) -> tuple[torch.Tensor, int]:
        image = self._images[i]
        try:
            if isinstance(image, Image.Image):
                return pixels_of(image), -1
            with open_regular(self._folder / image) as file:
                return decode_rgb(file.read()), -1
        except (DecodeError, ReadError, OSError) as error:
            name = f"image {i}" if isinstance(image, Image.Image) else str(self._folder / image)
            raise BadSampleError(name, str(error), "remove it, or replace it by an image.") from None


def open_dataset(
    source: Source | Images,
    split: str = "train",
    transform: Callable[[Image.Image], Any] | None = None,
    say: Say = lambda _: None,
) -> Images:
    """A map-style dataset of (image, label, id), for evaluation or a torch DataLoader; see `Images`.

    Args:
        source: shards as `data.shards` names them, a folder of images, a file, or a list of paths and PIL images.
        split: the split of a set of shards.
        transform: maps each PIL image, such as `encoder.transform`; None leaves PIL images.
        say: prints a line about shards without a manifest, which are indexed first.

    Raises ConfigError for a path that does not exist, DataError for a folder without images and for unusable shards.
    """
    if isinstance(source, Images):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return FileImages(source, transform=transform)
    text: str = expand_home("data.shards", os.fspath(source), "IMAGES")
    path = Path(text)
    if _names_shards(text):
        manifest = open_shards(Data(shards=text), say=say)
        return ShardImages(ShardReader(manifest, split), transform)
    if path.is_dir():
        return FileImages(_images_below(path), path, transform)
    if path.exists():
        return FileImages([text], transform=transform)
    raise ConfigError(f"IMAGES is {redact_list(text)!r}, which does not exist; name a folder of images, or shards.")


def _names_shards(text: str) -> bool:
    return "::" in text or "{" in text or bool(scheme(text)) or is_tar(text) or Path(text, FILE_NAME).is_file()


def _images_below(folder: Path) -> list[str]:
    """The images in a folder and its subfolders, in the order of their paths relative to it. Raises DataError without any."""

    def walk() -> Iterator[str]:
        for path, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not is_hidden(name)]
            yield from (os.path.relpath(os.path.join(path, name), folder) for name in names if is_image_name(name))

    images = sorted(walk())
    if images:
        return images
    tars = sorted(folder.glob("*.tar"))
    hint = f"name its shards, such as {folder}/{tars[0].name}" if tars else "name a folder with some (JPEG, PNG, …), or shards"
    raise DataError(f"{folder} holds no images and no {FILE_NAME}; {hint}.")
