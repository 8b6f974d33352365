"""Parquet files with image bytes, as the Hugging Face hub lays them out; read in pieces of row groups, in bounded memory.

The plan needs the footers and the labels only. A worker decodes a row group from its start, a piece of rows at a time, and
keeps one piece; the plan therefore puts row groups in drawn order and shuffles the rows within each piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from clae_dist.errors import DataError
from data_prep.sources.entry import ORIGINAL_BYTES, Entry, Layout, Report, UnreadableError, plain_name, stamp
from data_prep.sources.parquet_labels import class_names, classes_in, label_column, label_of, partitions, without_partitions
from data_prep.split_names import files_by_split, splits_in

_MAGIC = b"PAR1"
_PIECE = 128  # rows that are decoded at once
_BUFFER_BYTES = 1 << 20  # of a column that are read at once; without it a row group's images all come into memory
_IMAGE_NAMES = ("image", "img")


def is_parquet(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == _MAGIC


def _pyarrow_parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError("reading Parquet needs pyarrow, which is not installed; pip install 'pyarrow>=17'.") from None
    module: ModuleType = pyarrow.parquet
    return module


class ParquetSource:
    """Parquet files of one set. Their names or folders give the splits; a single held-out split is called test."""

    pixels = ORIGINAL_BYTES

    def __init__(self, paths: tuple[Path, ...], root: Path | None = None, image: str = "", label: str = "") -> None:
        """`root`: the folder that was named, if one was; `image`, `label`: the columns' names, found where they are ""."""
        self.paths = (root,) if root else paths
        self.name = root.resolve().name if root else plain_name(paths)
        self._files = tuple(sorted(paths))
        self._root = root
        self._image, self._label = image, label

    def fingerprint(self) -> str:
        return stamp(self._files, self._image, self._label)

    def listing(self, _scratch: Path, _report: Report, /) -> Layout:
        """Raises DataError for damaged files, and for columns and splits that cannot be told."""
        names = {path: path.relative_to(self._root).as_posix() if self._root else path.name for path in self._files}
        if len(set(names.values())) < len(names):
            raise DataError(f"{self._files[0].name} is named twice; give the files names of their own, or name their folder.")
        split_of = _splits(list(names.values()))
        tables = [_Table(path, names[path], self._image, self._label) for path in self._files]
        labels = {label for table in tables for label in table.labels}
        by_folder = any(table.by_folder for table in tables)
        classes, number_of = classes_in(str(tables[0].path), {table.class_names for table in tables}, labels, by_folder)
        images: dict[str, dict[str, list[tuple[str, Entry]]]] = {}
        for table in tables:
            groups = images.setdefault(split_of[table.name], {})
            for entry, label in zip(table.entries(), table.labels, strict=True):
                number = number_of(label)
                groups.setdefault(classes[number] if number >= 0 else "", []).append((entry.path, entry))
        if not any(images.values()):
            raise DataError(f"{self.paths[0]} holds no rows; get the files again.")
        return Layout(classes, images, given=set(images) != {"train"}, notes=tuple(_notes(classes, images, tables)))


def _notes(
    classes: tuple[str, ...], images: dict[str, dict[str, list[tuple[str, Entry]]]], tables: list[_Table]
) -> Iterator[str]:
    """Images without a label, and splits that are not there."""
    if not classes:
        table = tables[0]
        where = f"the column {table.label} is empty" if table.label else f"the columns are {', '.join(table.columns)}"
        yield f"The files have no labels ({where}; --label-column names another): their images get -1."
    for split, groups in images.items() if classes else ():
        count, missing = sum(map(len, groups.values())), len(groups.get("", ()))
        if missing == count:
            yield f"The split {split} has no labels: its images get -1."
        elif missing:
            yield f"Images of {split} without a label (-1): {missing} of {count}."
    if set(images) == {"train"} and any(splits_in(without_partitions(table.name)) for table in tables):
        yield "The files are of one split, train: what is drawn for the test split comes from it."


def _splits(names: list[str]) -> dict[str, str]:
    """The split of every file: data/train-00000-of-00002.parquet, train.parquet, default/train/0000.parquet."""
    try:
        found = {name: split for name in names for split in files_by_split([without_partitions(name)]).values()}
    except ValueError as error:
        raise DataError(f"{error}; which one is it? Rename the file.") from None
    unnamed = [name for name in names if not found[name]]
    if len(unnamed) == len(names):
        return dict.fromkeys(names, "train")
    if unnamed:
        raise DataError(f"{unnamed[0]} does not say its split, and other files do; name it train-…, test-… or validation-….")
    held_out = set(found.values()) - {"train"}
    only = "test" if len(held_out) == 1 else ""  # as with folders: a single held-out split is the test split
    return {name: only or split if split != "train" else split for name, split in found.items()}


class _Table:
    """One file's footer and labels."""

    def __init__(self, path: Path, name: str, image: str, label: str) -> None:
        parquet = _pyarrow_parquet()
        self.path, self.name = path, name
        try:
            with parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                features = _features(schema.metadata)
                self.column = _image_column(path, schema, image)
                self.columns = tuple(schema.names)
                hive = partitions(name)
                self.label = label_column(str(path), [*schema.names, *hive], features, label)
                self.by_folder = self.label in hive and self.label not in schema.names
                values = [hive.get(self.label)] * file.metadata.num_rows
                if self.label in schema.names:
                    values = file.read([self.label]).column(0).to_pylist()
                self.labels = [label_of(value, f"{name}, row {row},", self.label) for row, value in enumerate(values)]
                self.group_sizes = [_group(file.metadata.row_group(n), self.column) for n in range(file.num_row_groups)]
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is no whole Parquet file ({error}); get it again.") from None
        self.class_names = class_names(features.get(self.label, {}))

    def entries(self) -> Iterator[Entry]:
        """One entry a row, in order; `offset` is the row's in its group."""
        row = 0
        for group, (rows, size) in enumerate(self.group_sizes):
            details = (group, self.column)
            for offset in range(rows):
                run = (f"{self.name}:{group}", offset // _PIECE)
                yield Entry(f"{self.name}/row-{row:07d}.image", size, str(self.path), offset, ParquetFile, details, run)
                row += 1


def _group(group: Any, column: str) -> tuple[int, int]:
    """Rows of a row group, and the mean size of an image in it."""
    columns = [group.column(number) for number in range(group.num_columns)]
    size = sum(one.total_uncompressed_size for one in columns if one.path_in_schema == column)
    return group.num_rows, -(-size // max(1, group.num_rows))


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """The columns' metadata of the `datasets` library; empty without any."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _image_column(path: Path, schema: Any, asked: str) -> str:
    """The leaf that holds the encoded bytes, such as image.bytes. Raises DataError when it cannot be told."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    leaves = {field.name: field.name for field in schema if is_bytes(field.type)}
    for field in schema:
        if types.is_struct(field.type) and any(one.name == "bytes" and is_bytes(one.type) for one in field.type):
            leaves[field.name] = f"{field.name}.bytes"
    for name in (asked,) if asked else _IMAGE_NAMES:
        if name in leaves:
            return leaves[name]
    if len(leaves) == 1 and not asked:
        return next(iter(leaves.values()))
    wanted = f"no image bytes in the column {asked}" if asked else "no column image" if leaves else "no column of image bytes"
    raise DataError(f"{path} has {wanted} among {', '.join(schema.names)}; name it with --image-column.")


class ParquetFile:
    """Image bytes by row of a row group; cheap where rows are asked for piece after piece."""

    def __init__(self, file: str, /) -> None:
        self._name = file
        self._file = _pyarrow_parquet().ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        self._place = (-1, "")  # row group and column that are being decoded
        self._first = 0  # row of the group at which `_piece` starts
        self._piece: Any = None
        self._pieces: Iterator[Any] = iter(())

    def read(self, entry: Entry, /) -> bytes:
        """Raises UnreadableError for a row without bytes, DataError for a damaged file."""
        try:
            value = self._seek(entry.details, entry.offset)
        except (OSError, ValueError, StopIteration) as error:
            reason = " ".join(str(error).split()) or "it ends early"
            raise DataError(f"{self._name} is damaged in row group {entry.details[0]} ({reason}); get it again.") from None
        if not value.is_valid:
            raise UnreadableError("the row holds no image bytes")
        return bytes(value.as_buffer())

    def _seek(self, place: tuple[int, str], row: int) -> Any:
        if place != self._place or row < self._first:
            group, column = self._place = place
            self._pieces = self._file.iter_batches(_PIECE, row_groups=[group], columns=[column], use_threads=False)
            self._first, self._piece = 0, next(self._pieces)
        while row >= self._first + self._piece.num_rows:
            self._first += self._piece.num_rows
            self._piece = next(self._pieces)
        images = self._piece.column(0)
        leaf = images.field("bytes") if "." in place[1] and images.type.num_fields else images
        return leaf[row - self._first]

    def close(self) -> None:
        self._pieces, self._piece = iter(()), None
        self._file.close()
