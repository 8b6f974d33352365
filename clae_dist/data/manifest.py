"""The manifest of a set of shards, written by data_prep and checked by training.

On disk: `manifest.json`, `SPLIT-000000.tar` … (plain WebDataset shards) and beside each an index, `SPLIT-000000.index.npy`:
int64 (samples, 3), a row per sample: offset of the image's bytes in the shard, their number, and the label (-1: none).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, Protocol, get_origin, get_type_hints

import numpy as np

from clae_dist import __version__
from clae_dist.data.hints import no_manifest
from clae_dist.errors import DataError
from clae_dist.files import file_sha256, write_atomically
from clae_dist.reading import ReadError, expect, is_text, open_regular, parse_object, read_bytes

FILE_NAME = "manifest.json"
FORMAT = "clae-dist shards 1"
MAX_BYTES = 64 << 20  # of a manifest; a hundred thousand shards have 30 MB
_HEADER_BYTES = 512  # of a file in a tar, before its own
_MAX_HEADER_BYTES = 4096  # of an index, in the format .npy
_PREPARE_AGAIN = "prepare the set again with `python -m data_prep prepare` into a new folder"


@dataclass(frozen=True)
class Shard:
    """One tar file of a split. `name` is its file name (`train-000000.tar`); `bytes` its size."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """File name of the index beside the shard."""
        return self.name.removesuffix(".tar") + ".index.npy"


class ShardFiles(Protocol):
    """The files of a set that are not beside a manifest on this machine."""

    @property
    def where(self) -> str:
        """The location for logs and errors, without secrets."""

    def max_open(self, shard_bytes: Sequence[int], processes: int) -> int:
        """Number of these shards that each of `processes` processes may keep mapped."""

    @property
    def any_remote(self) -> bool:
        """True if any file has to be fetched."""

    def open(self, shard: Shard, stop: threading.Event | None = None) -> IO[bytes]:
        """Open the shard, after fetching it if necessary. Raises DataError, and Stopped after `stop` was set."""

    def open_index(self, shard: Shard) -> IO[bytes]:
        """Its index, likewise."""

    def describe(self) -> str:
        """A description of the access to the files for the console."""


@dataclass(frozen=True)
class Manifest:
    """A set of shards: its splits, classes (a label is a position in `classes`), origin and preparation."""

    folder: Path
    name: str
    source: str
    licence: str
    created: str
    classes: tuple[str, ...]
    splits: dict[str, tuple[Shard, ...]]
    quarantined: int  # images set aside while preparing; quarantine.jsonl lists them
    preparation: dict[str, Any]
    digest: str
    version: str = ""  # of this package when it was prepared; "" where that is not known
    # Images by split, in the order of `classes`; empty where they were not counted.
    class_counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    files: ShardFiles | None = None  # None: in `folder`

    @property
    def where(self) -> str:
        """The location of the set for logs and errors."""
        return self.files.where if self.files else str(self.folder)

    def open(self, shard: Shard) -> IO[bytes]:
        """Open the shard for reading. Raises DataError if it cannot be read."""
        if self.files:
            return self.files.open(shard)
        try:
            return open_regular(self.folder / shard.name)
        except ReadError as error:
            raise DataError(f"{self.folder / shard.name} cannot be read ({error}); was it removed?") from None

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split. Raises DataError for a split that the set does not have."""
        if split not in self.splits:
            raise DataError(f"{self.where} has no split {split!r}; it has {', '.join(sorted(self.splits))}.")
        return self.splits[split]

    def num_samples(self, split: str) -> int:
        """Images in a split. Raises DataError for a split that the set does not have."""
        return sum(shard.samples for shard in self.shards(split))

    def index(self, shard: Shard) -> np.ndarray:
        """int64 (samples, 3): offset of the image's bytes in the shard, their number, label (-1: none). Raises DataError."""
        with self.files.open_index(shard) if self.files else _open_index(self.folder, shard) as file:
            index = _read_index(file, self.where, shard)
        _check_index(index, f"{self.where}/{shard.index_name}", shard, len(self.classes))
        return index


def load_manifest(folder: str | Path) -> Manifest:
    """Load the manifest of `folder`. Raises DataError if it is missing, of another format, or does not match its digest."""
    folder = Path(folder)
    path = folder / FILE_NAME
    if not path.is_file():
        raise DataError(no_manifest(folder))
    try:
        data = read_bytes(path, MAX_BYTES)
    except ReadError as error:
        raise DataError(f"{path} cannot be read ({error}); {_PREPARE_AGAIN}.") from None
    return read_manifest(data, str(path), folder)


def read_manifest(data: bytes, where: str, folder: Path) -> Manifest:
    """Parse the bytes of a manifest.json. Raises DataError if they are no manifest or do not match the digest."""
    try:
        content = parse_object(data)
        expect(content, {"format": is_text})
    except ReadError as error:
        raise DataError(f"{where} is not a manifest ({error}); {_PREPARE_AGAIN}.") from None
    found = content["format"]
    if found != FORMAT:
        raise DataError(f"{where} has format {found!r}, this version reads {FORMAT!r}; {_PREPARE_AGAIN}.")
    if content.get("digest") != content_digest(content):
        raise DataError(
            f"{where} does not match its digest {content.get('digest')}: it was edited or damaged; {_PREPARE_AGAIN}."
        )
    try:
        return _from_json(folder, content)
    except (KeyError, TypeError, AttributeError) as error:  # with a valid digest, but not written by this project
        raise DataError(f"{where} is not a manifest ({type(error).__name__}: {error}); {_PREPARE_AGAIN}.") from None


def write_manifest(
    folder: str | Path,
    *,
    name: str,
    source: str,
    licence: str,
    classes: tuple[str, ...],
    splits: dict[str, tuple[Shard, ...]],
    quarantined: int,
    preparation: dict[str, Any],
) -> Manifest:
    """Write manifest.json atomically, with version, time, digest and the number of images per class. Returns the Manifest.

    Raises DataError for an index that cannot be read or that has a label outside of the classes.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "source": source,
        "licence": licence,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "classes": list(classes),
        "splits": {split: [dataclasses.asdict(shard) for shard in shards] for split, shards in splits.items()},
        "quarantined": quarantined,
        "version": __version__,
        "class_counts": {split: _count_classes(Path(folder), shards, len(classes)) for split, shards in splits.items()},
        "preparation": preparation,
    }
    content["digest"] = content_digest(content)
    write_atomically(Path(folder) / FILE_NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return _from_json(Path(folder), content)


def check_shard(folder: str | Path, shard: Shard, how: Literal["sha256", "size"] = "sha256") -> None:
    """Compare a shard and its index with the manifest. Raises DataError with the file, the expected and the actual value."""
    path, index = Path(folder) / shard.name, Path(folder) / shard.index_name
    for file in (path, index):
        if not file.is_file():
            raise DataError(f"{file} is missing; {_PREPARE_AGAIN}.")
    size = path.stat().st_size
    if size != shard.bytes:
        raise DataError(f"{path} is {size} bytes, the manifest expects {shard.bytes}: cut short or changed; {_PREPARE_AGAIN}.")
    if how == "size":
        return
    for file, expected in ((path, shard.sha256), (index, shard.index_sha256)):
        found = file_sha256(file)
        if found != expected:
            raise DataError(f"{file} has sha256 {found}, the manifest expects {expected}: it was changed; {_PREPARE_AGAIN}.")


def _open_index(folder: Path, shard: Shard) -> IO[bytes]:
    path = folder / shard.index_name
    try:
        return open_regular(path)
    except ReadError as error:
        raise DataError(f"{path} cannot be read ({error}); {_PREPARE_AGAIN}.") from None


def _read_index(file: IO[bytes], where: str, shard: Shard) -> np.ndarray:
    path = f"{where}/{shard.index_name}"
    size = file.seek(0, 2)
    if size > 24 * shard.samples + _MAX_HEADER_BYTES:  # before a header that lies fills the memory
        raise DataError(f"{path} has {size} bytes, too many for {shard.samples} samples; {_PREPARE_AGAIN}.")
    file.seek(0)
    try:
        with io.BytesIO(file.read()) as content:  # from which no more can be read than is there
            index: np.ndarray = np.lib.format.read_array(content, allow_pickle=False)  # np.load would also take a zip file
    except Exception as error:  # by what is damaged: OSError, ValueError, EOFError, TokenError, MemoryError, …
        raise DataError(f"{path} cannot be read ({error or type(error).__name__}); {_PREPARE_AGAIN}.") from None
    if index.dtype != np.int64 or index.shape != (shard.samples, 3):
        expected = f"int64 ({shard.samples}, 3)"
        raise DataError(f"{path} holds {index.dtype} {index.shape}, the manifest expects {expected}; {_PREPARE_AGAIN}.")
    return index


def _check_index(index: np.ndarray, path: str, shard: Shard, num_classes: int) -> None:
    """Raise DataError for a row that points outside of its shard and for a label outside of the classes."""
    offsets, sizes, labels = index.T
    outside = (offsets < _HEADER_BYTES) | (sizes < 1) | (sizes > shard.bytes) | (offsets > shard.bytes - sizes)
    if outside.any():
        row = int(outside.argmax())
        raise DataError(
            f"{path} points outside of its shard of {shard.bytes} bytes in {outside.sum()} rows, first in row {row}: "
            f"{index[row].tolist()}; {_PREPARE_AGAIN}."
        )
    wrong = (labels < -1) | (labels >= num_classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{path} has the label {labels[row]} in row {row}, but there are {num_classes} classes; {_PREPARE_AGAIN}."
        )


def _count_classes(folder: Path, shards: tuple[Shard, ...], num_classes: int) -> list[int]:
    """Images per class, without unlabelled ones."""
    counts = np.zeros(num_classes, np.int64)
    for shard in shards:
        with _open_index(folder, shard) as file:
            labels = _read_index(file, str(folder), shard)[:, 2]
        found = np.bincount(labels[labels >= 0], minlength=num_classes)
        if len(found) > num_classes:
            raise DataError(f"{folder / shard.index_name} has the label {len(found) - 1}, but there are {num_classes} classes.")
        counts += found
    return [int(count) for count in counts]


def content_digest(content: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of everything but the digest itself and the time."""
    rest = {key: value for key, value in content.items() if key not in ("created", "digest")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _from_json(folder: Path, content: dict[str, Any]) -> Manifest:
    """Raises KeyError, TypeError or AttributeError for missing fields and for fields of another type."""
    splits = {split: tuple(_checked(Shard(**shard)) for shard in shards) for split, shards in content["splits"].items()}
    names = [shard.name for shards in splits.values() for shard in shards]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise TypeError(f"the shard {double} is listed {names.count(double)} times")
    return _checked(
        Manifest(
            folder=folder,
            name=content["name"],
            source=content["source"],
            licence=content["licence"],
            created=content["created"],
            classes=tuple(_only(str, content["classes"])),
            splits=splits,
            quarantined=content["quarantined"],
            preparation=content["preparation"],
            digest=content["digest"],
            version=content.get("version", ""),
            class_counts={split: tuple(_only(int, counts)) for split, counts in content.get("class_counts", {}).items()},
        )
    )


def _checked(record: Any) -> Any:
    """Check and return `record`, a dataclass from JSON. Raises TypeError for wrong types and for names that are paths."""
    least = 1 if isinstance(record, Shard) else 0
    for key, kind in get_type_hints(type(record)).items():
        value = getattr(record, key)
        if key == "files":  # not in the JSON
            continue
        if not isinstance(value, get_origin(kind) or kind):
            raise TypeError(f"{key} is {value!r}")
        if kind is int and not least <= value < 2**62:
            raise TypeError(f"{key} is {value}")
    if isinstance(record, Shard) and not (
        Path(record.name).name == record.name not in ("", "..") and record.name.isprintable()
    ):
        raise TypeError(f"the shard's name is {record.name!r}, which is no plain file name")
    return record


def _only(kind: type, values: list[Any]) -> list[Any]:
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is no {kind.__name__}")
    return values
