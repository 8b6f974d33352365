"""`clae embed`: features of images as a file, FILE.npy with FILE.ids.json beside it, or FILE.parquet.

# b images of a batch, N images in the file, F width of the features
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from clae_dist import escape
from clae_dist.data.images import Images
from clae_dist.deploy.embedding import LOOKS, EmbeddedBatch, check_batch_size
from clae_dist.deploy.embedding_parts import batches_of, embed_in_parts
from clae_dist.deploy.encoder import Encoder
from clae_dist.errors import ConfigError, DataError
from clae_dist.evaluation.journal import Journal
from clae_dist.files import check_writable, replacing
from clae_dist.lease import hold
from clae_dist.storage import writing
from clae_dist.wording import count_of
from clae_dist.world import World

FORMAT = "clae-dist embeddings 1"
_SHOWN = 3  # undecodable images named in the message


# A file of features grows by batches. `facts` is the origin of the features; labels are names of classes.
class _Npy:
    """float32 (N, F) as numpy.save writes it; ids and labels as JSON in the second stream."""

    def __init__(self, streams: Sequence[IO[bytes]], num_features: int, facts: dict[str, Any]) -> None:
        self._streams, self._num_features, self._facts = streams, num_features, facts
        self._ids: list[Any] = []
        self._labels: list[str | None] = []
        self._looks: dict[str, list[float]] = {name: [] for name in LOOKS}
        self._header()

    def _header(self) -> None:
        """Write the header; numpy reserves space for the digits of N, so that it can be written again at the end."""
        shape = (len(self._ids), self._num_features)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._streams[0], header)

    def add(self, batch: EmbeddedBatch, ids: list[Any], labels: list[str | None]) -> None:
        self._streams[0].write(np.ascontiguousarray(batch.features, dtype="<f4").tobytes())
        self._ids += ids
        self._labels += labels
        for name, values in batch.looks.items():
            self._looks[name] += [round(value, 5) for value in values.tolist()]

    def close(self) -> None:
        self._streams[0].seek(0)
        self._header()
        self._streams[1].write(
            (json.dumps({**self._facts, "ids": self._ids, "labels": self._labels, **self._looks}) + "\n").encode()
        )


class _Parquet:
    """A row an image: id, label, embedding (a list of F float32), looks; the facts as JSON in the metadata of the schema."""

    def __init__(self, streams: Sequence[IO[bytes]], num_features: int, facts: dict[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._num_features = num_features
        id_type = pa.string() if facts["ids_are"] == "paths" else pa.int64()
        columns = [("id", id_type), ("label", pa.string()), ("embedding", pa.list_(pa.float32(), num_features))]
        columns += [(name, pa.float32()) for name in LOOKS]
        self._schema = pa.schema(columns, metadata={"clae-dist": json.dumps(facts)})
        self._writer = pq.ParquetWriter(streams[0], self._schema)

    def add(self, batch: EmbeddedBatch, ids: list[Any], labels: list[str | None]) -> None:
        import pyarrow as pa

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(batch.features.reshape(-1)), self._num_features)
        columns = [pa.array(ids, self._schema.field("id").type), pa.array(labels, pa.string()), vectors]
        columns += [pa.array(batch.looks[name], pa.float32()) for name in LOOKS]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


_KINDS: dict[str, type[_Npy | _Parquet]] = {".npy": _Npy, ".parquet": _Parquet}


def check_target(target: Path) -> None:
    """Raises ConfigError for a file of another kind or one that needs a missing package, StorageError for a full disk, …"""
    if target.suffix not in _KINDS:
        raise ConfigError(f"--to is {str(target)!r}; name a file that ends in .npy or .parquet.")
    if target.is_dir():
        raise ConfigError(f"--to is {str(target)!r}, which is a folder; name a file in it.")
    if target.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"--to is {str(target)!r}, which needs pyarrow; pip install 'pyarrow>=17', or name a .npy file."
            ) from None
    check_writable(target.absolute().parent)


def write_embeddings(
    images: Images,
    encoder: Encoder,
    target: Path,
    batch_size: int,
    num_workers: int = -1,
    say: Callable[[str], None] | None = None,
    world: World | None = None,
) -> int:
    """Write the features of all images that can be decoded to `target`, and return how many those are. Collective.

    The ranks of `world` (default: this process alone) share the batches, which are kept beside `target` until all are there:
    after a kill, the same call continues. Files appear complete, and together, at the end, with the same bytes for any number
    of ranks and interruptions. `say` prints progress (default: on stderr) and undecodable images (default: on stdout).
    Raises ConfigError, also if another process is writing `target`, DataError and StorageError.
    """
    world = world or World.single("cpu")
    world.run_on_main(lambda: check_target(target))
    check_batch_size(batch_size)
    with _only_writer(target, world):
        return _write(images, encoder, target, batch_size, num_workers, say, world)


@contextmanager
def _only_writer(target: Path, world: World) -> Iterator[None]:
    """Hold the lease of a file, whose parts two processes would write into one another's. Collective."""
    way_out = f"it writes {target.name}. Wait until it has ended or end it, or name another file with --to."
    with ExitStack() as stack:

        def take() -> None:
            with writing(target):
                stack.enter_context(
                    hold(target.absolute().with_name(f".{target.name}.lock"), "clae embed", ConfigError, way_out)
                )

        world.run_on_main(take)
        yield


def _write(
    images: Images,
    encoder: Encoder,
    target: Path,
    batch_size: int,
    num_workers: int,
    say: Callable[[str], None] | None,
    world: World,
) -> int:
    ids_are = "paths" if any(isinstance(one, str) for one in images.ids[:1]) else "positions"
    facts = {
        "format": FORMAT,
        "encoder": encoder.source,
        "weights": encoder.weights_digest(),
        "num_features": encoder.num_features,
        "ids_are": ids_are,
    }
    journal = embed_in_parts(images, encoder, target, facts, batch_size, num_workers, world, say)
    num_rows, bad = world.run_on_main(lambda: _join(journal, images, target, encoder.num_features, facts))
    if bad and world.is_main:
        (say or escape.say)(_skipped(bad, len(images)))
    return int(num_rows)


def _join(
    journal: Journal, images: Images, target: Path, num_features: int, facts: dict[str, Any]
) -> tuple[int, dict[int, str]]:
    """Write the file from its parts and delete these. Returns the number of rows, and undecodable images by position."""
    paths = [target, target.with_suffix(".ids.json")] if target.suffix == ".npy" else [target]
    bad: dict[int, str] = {}
    num_rows = 0
    with replacing(*paths) as streams:
        with writing(target):
            file = _KINDS[target.suffix](streams, num_features, facts)
        for batch in batches_of(journal):
            with writing(target):
                file.add(batch, [images.ids[i] for i in batch.positions.tolist()], _label_names(images, batch))
            num_rows += len(batch.positions)
            bad |= batch.bad
        if bad and not num_rows:
            journal.remove()
            raise DataError(
                f"none of {count_of(len(images), 'image')} can be decoded ({next(iter(bad.values()))}); {target} is not "
                "written; give images (JPEG, PNG, WebP, …)."
            )
        with writing(target):
            file.close()
    journal.remove()
    return num_rows, bad


def _skipped(bad: dict[int, str], num_images: int) -> str:
    named = "; ".join(list(bad.values())[:_SHOWN]) + "; …" * (len(bad) > _SHOWN)
    are = "are" if len(bad) > 1 else "is"
    return f"{len(bad):,} of {num_images:,} images cannot be decoded and {are} skipped: {named}"


def _label_names(images: Images, batch: EmbeddedBatch) -> list[str | None]:
    return [images.classes[label] if label >= 0 else None for label in batch.labels.tolist()]
