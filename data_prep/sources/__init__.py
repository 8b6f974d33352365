"""Where images come from. `open_source` tells by the content what a user has named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clae_dist.data.image_names import is_hidden
from clae_dist.errors import DataError
from data_prep.sources.archive import ArchiveSource
from data_prep.sources.cifar import CifarSource, is_cifar
from data_prep.sources.entry import Source
from data_prep.sources.folder import FolderSource
from data_prep.sources.imagenet import ImageNetSource, imagenet_kind
from data_prep.sources.parquet import ParquetSource, is_parquet

__all__ = ["open_source"]


def open_source(paths: Sequence[Path], image_column: str = "", label_column: str = "") -> Source:
    """A folder, archives of one set, or Parquet files. Raises DataError for what is none of these or not one set."""
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist; name a folder of class folders, an archive of one, or Parquet files.")
    folder = next((path for path in paths if path.is_dir()), None)
    if folder and len(paths) > 1:
        raise DataError(f"{folder} is a folder, and {len(paths)} sources are named; several must be files of one set.")
    plain = FolderSource(folder) if folder else None
    files = tuple(paths) if plain is None or folder is None else () if plain.holds_images else _published_files(folder)
    if files and all(is_parquet(path) for path in files):
        return ParquetSource(files, folder, image_column, label_column)
    if image_column or label_column:
        raise DataError(f"--image-column or --label-column is given, but {paths[0]} is no Parquet file; leave it out.")
    return _archives(files) if files or plain is None else plain


def _archives(files: tuple[Path, ...]) -> Source:
    kinds = {imagenet_kind(path): path for path in files}
    if "" not in kinds and len(kinds) == len(files):
        return ImageNetSource({kind: kinds[kind] for kind in ("train", "val", "devkit") if kind in kinds})
    cifar = [path for path in files if is_cifar(path)]
    special = [path for kind, path in kinds.items() if kind] + cifar + [path for path in files if is_parquet(path)]
    if special and len(files) > 1:
        others = ", ".join(path.name for path in files if path != special[0])
        raise DataError(f"{special[0]} makes no set together with {others}; name what belongs together.")
    return CifarSource(cifar[0]) if cifar else ArchiveSource(files)


def _published_files(folder: Path) -> tuple[Path, ...]:
    """Parquet files in or below a folder without images, or ImageNet's archives in it."""
    parquet = [path for path in sorted(folder.rglob("*.parquet")) if not any(map(is_hidden, path.relative_to(folder).parts))]
    images = sorted(folder.glob("ILSVRC2012_img_*.tar"))
    devkit = (
        sorted(folder.glob("ILSVRC2012_devkit_t12.tar*"))
        if len(images) > (folder / "ILSVRC2012_img_train.tar").exists()
        else []
    )
    return tuple(parquet or images + devkit)
