"""Keys of samples: unique in a split, whatever files and class folders are called."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clae_dist.data.manifest import Manifest


def test_keys_are_unique_across_classes_whose_names_become_one(
    tmp_path: Path, make_folder: Callable[..., Path], run: Callable[..., Manifest], encoded: Any
) -> None:
    """`a b/0000.jpg` and `a_b/0000.jpg`: readers would take two samples of one key for one, or drop one of them."""
    source = make_folder({"a b": 2, "a_b": 2, "a.b": 2})
    (source / "a_b" / "0000.png").write_bytes(encoded(100, "PNG"))
    manifest = run(source, tmp_path / "dst", test_share=0.0)
    (shard,) = manifest.splits["train"]
    with tarfile.open(manifest.folder / shard.name) as tar:
        names = tar.getnames()
    keys = [name for name in names if not name.endswith(".cls")]
    assert len(keys) == len({name.rpartition(".")[0] for name in keys}) == 7
    assert len(names) == len(set(names)) == 14
