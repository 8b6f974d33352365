"""The pseudo-labels of a run's training images in its folder: the cluster of each image in each of several clusterings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from clae_dist.errors import ConfigError
from clae_dist.files import write_together
from clae_dist.reading import ReadError, expect, is_count, is_list_of, is_text, open_regular, read_object
from clae_dist.runs.folder import RunFolder

_NAME = "labels"
_FIELDS = {"source": is_text, "digest": is_text, "clusters": is_list_of(is_count), "table": is_text}


def write_pseudo_labels(folder: RunFolder, labels_NK: torch.Tensor, record: Mapping[str, Any]) -> None:
    """Keep the clusters of N images in K clusterings, -1 for an image without, and their `record`: source and digest."""
    table = save({_NAME: labels_NK.to(torch.int16).contiguous()})
    content = {**record, "table": hashlib.sha256(table).hexdigest()}
    folder.pseudo_labels.mkdir(exist_ok=True)
    write_together(
        {folder.pseudo_label_table: table, folder.pseudo_labels_file: (json.dumps(content, indent=2) + "\n").encode()}
    )


def read_pseudo_labels(folder: RunFolder, num_images: int, counts: Sequence[int]) -> torch.Tensor:
    """The table (images, clusterings), int16. Raises ConfigError if it is missing, damaged, or of other images or clusters."""
    try:
        content = read_object(folder.pseudo_labels_file)
        expect(content, _FIELDS)
        with open_regular(folder.pseudo_label_table) as file:
            table = file.read()
        if hashlib.sha256(table).hexdigest() != content["table"]:
            raise ReadError(f"{folder.pseudo_label_table.name} has another sha256 than it was written with")
        labels = load(table)[_NAME]
        if labels.shape != (num_images, len(counts)) or labels.dtype != torch.int16:
            raise ReadError(f"a table of the shape {tuple(labels.shape)}, expected {(num_images, len(counts))}")
        if int(labels.min()) < -1 or bool((labels >= torch.tensor(counts)).any()):
            raise ReadError("labels of clusters that do not exist")
    except (ReadError, OSError, SafetensorError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{str(folder.pseudo_labels)!r} cannot be read ({reason}); restore it from a copy. As long as the run "
            "has no checkpoint, you may delete it: the next `clae train` makes it again from method.pseudo_labels."
        ) from None
    return labels
