"""ImageNet's own archives (ILSVRC2012), read where they lie: train is a tar of 1,000 tars, val is flat, the devkit labels it.

The images get the paths, keys and labels that the folders train/WNID/ and val/WNID/ would give.
"""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

from clae_dist.data.image_names import is_image_name
from clae_dist.errors import DataError
from data_prep.sources.entry import ORIGINAL_BYTES, Entry, Layout, Report, stamp
from data_prep.sources.tar import first_member, plain_tar, walk

_Groups = dict[str, list[tuple[str, Entry]]]  # by class

_KINDS = {  # by the first member's name
    "train": re.compile(r"n\d{8}\.tar"),
    "val": re.compile(r"(\./)?ILSVRC2012_val_\d{8}\.JPEG"),
    "devkit": re.compile(r"(\./)?ILSVRC2012_devkit_t12(/.*)?"),
}
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_SYNSETS = "data/meta.mat"
_MAX_DEVKIT_BYTES = 100_000_000
_NAME_DEVKIT = "name ILSVRC2012_devkit_t12.tar.gz"


def imagenet_kind(path: Path) -> str:
    """ "train", "val" or "devkit"; "" for what is none of ImageNet's archives."""
    name = first_member(path)
    return next((kind for kind, pattern in _KINDS.items() if pattern.fullmatch(name)), "")


class ImageNetSource:
    """`archives` by kind. val without the devkit has no labels. train and val become the splits train and test."""

    pixels = ORIGINAL_BYTES
    name = "imagenet"

    def __init__(self, archives: dict[str, Path]) -> None:
        if "train" in archives and "val" in archives and "devkit" not in archives:
            raise DataError(
                f"{archives['val']} has no labels, and the train images have; {_NAME_DEVKIT}, too, or leave val out."
            )
        if "devkit" in archives and "val" not in archives:
            raise DataError(
                f"{archives['devkit']} holds the labels of val only; name ILSVRC2012_img_val.tar, too, or leave it out."
            )
        self.paths = tuple(archives.values())
        self._archives = archives

    def fingerprint(self) -> str:
        return stamp(self.paths)

    def listing(self, scratch: Path, report: Report, /) -> Layout:
        """Raises DataError for archives that are cut short, damaged, or do not belong together."""
        images: dict[str, _Groups] = {}
        labels = _read_labels(self._archives["devkit"], scratch / "devkit.tar") if "devkit" in self._archives else None
        if "train" in self._archives:
            images["train"] = _train_images(self._archives["train"], report)
        if "val" in self._archives:
            images["test" if labels else "train"] = _val_images(self._archives["val"], labels, report)
        wnids = {name for groups in images.values() for name in groups if name}
        classes = tuple(sorted(wnids | set(labels.wnids) if labels else wnids))
        notes = [] if classes else [f"The images get no labels (-1); {_NAME_DEVKIT}, too, to give them some."]
        return Layout(classes, images, "test" in images, tuple(notes))


def _train_images(archive: Path, report: Report) -> _Groups:
    """Images by WNID, at their offsets in the one file."""
    images: _Groups = {}
    with archive.open("rb") as outer, archive.open("rb") as inner:
        for tar in walk(archive, outer, lambda _: None):
            wnid = tar.name.removesuffix(".tar")
            if not tar.isreg() or not _KINDS["train"].fullmatch(tar.name) or wnid in images:
                raise DataError(f"{archive} holds {tar.name!r}, which is no tar of a class of its own; get the archive again.")
            images[wnid] = [
                (f"{wnid}/{member.name}", Entry(f"train/{wnid}/{member.name}", member.size, str(archive), member.offset_data))
                for member in walk(archive, inner, report, tar.offset_data, tar.offset_data + tar.size)
                if _is_image(archive, member)
            ]
            if not images[wnid]:
                raise DataError(f"{archive} has no images in {tar.name}; get the archive again.")
    return images


def _is_image(archive: Path, member: tarfile.TarInfo) -> bool:
    plain = member.isreg() and "/" not in member.name.removeprefix("./")
    if plain and is_image_name(member.name):
        return True
    raise DataError(f"{archive} holds {member.name!r}, which is no image of ImageNet's; get the archive again.")


class _Labels:
    """The devkit's: the WNID of every val image, by its number from 1."""

    def __init__(self, truth: list[int], wnid_of: dict[int, str]) -> None:
        self.truth = truth
        self.wnid_of = wnid_of
        self.wnids = tuple(wnid_of.values())

    def wnid(self, name: str, archive: Path) -> str:
        """Of the image ILSVRC2012_val_00000001.JPEG and so on."""
        number = int(name[-13:-5])
        if not 1 <= number <= len(self.truth):
            raise DataError(
                f"{archive} holds {name}, and the devkit has {len(self.truth)} labels; they do not belong together."
            )
        return self.wnid_of[self.truth[number - 1]]


def _val_images(archive: Path, labels: _Labels | None, report: Report) -> _Groups:
    images: _Groups = {}
    with archive.open("rb") as stream:
        for member in walk(archive, stream, report):
            if not _KINDS["val"].fullmatch(member.name) or not member.isreg():
                raise DataError(f"{archive} holds {member.name!r}, which is no image of val; get the archive again.")
            name = member.name.removeprefix("./")
            wnid = labels.wnid(name, archive) if labels else ""
            key = f"{wnid}/{name}" if wnid else name
            images.setdefault(wnid, []).append((key, Entry(f"val/{key}", member.size, str(archive), member.offset_data)))
    found = sum(len(group) for group in images.values())
    if labels and found != len(labels.truth):
        raise DataError(f"{archive} holds {found} images, and the devkit has {len(labels.truth)} labels; get both again.")
    return images


def _read_labels(devkit: Path, unpacked: Path) -> _Labels:
    """Raises DataError for an archive that is no devkit or is damaged."""
    files = _devkit_files(devkit, unpacked)
    try:
        truth = [int(line) for line in files[_TRUTH].split()]
        wnid_of = _leaf_synsets(files[_SYNSETS])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{devkit} cannot be read ({error}); get the archive again.") from None
    unknown = sorted(set(truth) - set(wnid_of))
    if unknown:
        raise DataError(
            f"{devkit} has the label {unknown[0]} in {_TRUTH} and no class of that number in {_SYNSETS}; get it again."
        )
    return _Labels(truth, wnid_of)


def _devkit_files(devkit: Path, unpacked: Path) -> dict[str, bytes]:
    """The two files with the labels, by name; those that are there."""
    files = {}
    plain = plain_tar(devkit, unpacked, lambda _: None)
    with plain.open("rb") as members, plain.open("rb") as stream:
        for member in walk(devkit, members, lambda _: None):
            name = "/".join(member.name.rsplit("/", 2)[-2:])
            if name in (_TRUTH, _SYNSETS) and member.isreg() and member.size <= _MAX_DEVKIT_BYTES:
                stream.seek(member.offset_data)
                files[name] = stream.read(member.size)
    return files


def _leaf_synsets(meta: bytes) -> dict[int, str]:
    """WNID by ILSVRC2012_ID, of the synsets that images are of: those without children."""
    from scipy.io import loadmat

    try:
        synsets: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"].reshape(-1)
    except Exception as error:  # scipy has errors of its own, and raises others by what is damaged
        raise ValueError(f"{_SYNSETS}: {error}") from None
    leaves = synsets[synsets["num_children"] == 0]
    wnid_of = {int(number): str(wnid) for number, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
    if not wnid_of or len(set(wnid_of.values())) != len(leaves):
        raise ValueError(f"{_SYNSETS} has no class, or one twice")
    return wnid_of
