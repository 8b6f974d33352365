"""The forms in which sets are published, made small: zips, ImageNet's and CIFAR's archives, Parquet files."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from scipy.io import savemat

WNIDS = ("n01440764", "n01443537", "n01484850")
CIFAR_CLASSES = {10: ("airplane", "automobile", "bird"), 100: ("apple", "bear", "worm")}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_zip(folder: Path, path: Path, method: int = zipfile.ZIP_DEFLATED, top: str = "") -> Path:
    """A zip of what is in the folder, names without a leading folder or with `top`."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for item in sorted(folder.rglob("*")):
            archive.write(item, top + item.relative_to(folder).as_posix())
    return path


def make_imagenet(folder: Path, images: dict[str, list[bytes]], val: list[tuple[str, bytes]]) -> dict[str, Path]:
    """train: images by WNID; val: (WNID, image) in order. The devkit numbers the WNIDs backwards, as no sorting would."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"train": "img_train.tar", "val": "img_val.tar", "devkit": "devkit_t12.tar.gz"}
    paths = {kind: folder / f"ILSVRC2012_{name}" for kind, name in names.items()}
    with tarfile.open(paths["train"], "w") as outer:
        for wnid, group in images.items():
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for number, data in enumerate(group):
                    add(inner, f"{wnid}_{number}.JPEG", data)
            add(outer, f"{wnid}.tar", stream.getvalue())
    with tarfile.open(paths["val"], "w") as tar:
        for number, (_, data) in enumerate(val, 1):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", data)
    ids = {wnid: len(WNIDS) - number for number, wnid in enumerate(WNIDS)}
    rows = [(ids[wnid], wnid, "words", 0) for wnid in WNIDS] + [(len(WNIDS) + 1, "n00001740", "entity", 2)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    with tarfile.open(paths["devkit"], "w:gz") as tar:
        top = tarfile.TarInfo("ILSVRC2012_devkit_t12")
        top.type = tarfile.DIRTYPE
        tar.addfile(top)
        truth = "".join(f"{ids[wnid]}\n" for wnid, _ in val)
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"read me")
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
    return paths


def make_cifar(path: Path, kind: int, rows: dict[str, np.ndarray], labels: dict[str, list[int]]) -> Path:
    """`rows` by file: uint8 (images, 32, 32, 3); `labels` by file. `kind` is 10 or 100."""
    folder, names = {10: ("cifar-10-batches-bin", "batches.meta.txt"), 100: ("cifar-100-binary", "fine_label_names.txt")}[kind]
    with tarfile.open(path, "w:gz") as tar:
        add(tar, f"{folder}/{names}", ("\n".join(CIFAR_CLASSES[kind]) + "\n\n").encode())
        for name, images in rows.items():
            coarse = [bytes([7])] * len(images) if kind == 100 else [b""] * len(images)
            body = b"".join(
                first + bytes([label]) + image.transpose(2, 0, 1).tobytes()
                for first, label, image in zip(coarse, labels[name], images, strict=True)
            )
            add(tar, f"{folder}/{name}", body)
        add(tar, f"{folder}/readme.html", b"<html>")
    return path


def make_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list[Any] | None,
    names: list[str] | None = None,
    group: int = 1000,
    **more: Any,
) -> Path:
    """The hub's layout: image {bytes, path}, label, and the classes' names in the schema's metadata."""
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"image": pyarrow.array([{"bytes": data, "path": "a.jpg"} for data in images], struct)}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pyarrow.array(labels)
        features["label"] = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    table = pyarrow.table({**columns, **more})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=group)
    return path
