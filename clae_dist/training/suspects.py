"""A list of the labels that a run doubted at its end (method.name=noisy), with which a set can be corrected."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch

from clae_dist.config import Config
from clae_dist.data.long_tail import TailFiles
from clae_dist.data.manifest import Manifest
from clae_dist.data.mixture import MixedFiles
from clae_dist.data.shards import ShardReader
from clae_dist.files import write_atomically
from clae_dist.runs.folder import RunFolder
from clae_dist.storage import writing

_BELIEVED = 0.5


def write_suspects(config: Config, state: Mapping[str, torch.Tensor], train: Manifest) -> str:
    """Write RUN/suspects.jsonl, the least believed first: digest of the set, place of the image, label, guess, and the
    probability that the label is right. `python -m data_prep quarantine` reads it.

    Returns a line for the console. On one rank.
    """
    folder, split = RunFolder(config.folder), config.data.train_split
    belief, guess = state["belief"].cpu(), state["guess"].cpu()
    labels = np.concatenate([train.index(shard)[:, 2] for shard in train.shards(split)])
    doubted = [int(n) for n in belief.argsort(stable=True) if belief[n] < _BELIEVED and labels[n] >= 0 and guess[n] >= 0]
    reader, lines = ShardReader(train, split), []
    for sample in doubted:
        shard, row = reader.place(sample)
        record = {
            **_place(train, split, shard, row),
            "name": reader.stored_name(shard, row),
            "class": train.classes[int(labels[sample])],
            "guess": train.classes[int(guess[sample])],
            "believed": round(float(belief[sample]), 4),
        }
        lines.append(json.dumps(record) + "\n")
    with writing(folder.suspects_file):
        write_atomically(folder.suspects_file, "".join(lines).encode())
    line = f"{len(doubted):,} of {len(labels):,} labels are doubted: {folder.suspects_file}"
    if 2 * len(doubted) > len(labels):
        line += " (more than half: the classifier or the encoder has learnt too little to judge labels; train longer)"
    return line


def _place(train: Manifest, split: str, shard: int, row: int) -> dict[str, str | int]:
    """Where an image lies: of a long-tailed part or a mixture, in the set that it comes from."""
    record, files = train.splits[split][shard], train.files
    digest, name = train.digest, record.name
    if isinstance(files, TailFiles):
        digest, row = files.whole.digest, int(files.rows[name][row])
    elif isinstance(files, MixedFiles):
        number, own = files.parts[name]
        digest, name = files.sets[number].digest, own.name
    return {"digest": digest, "split": split, "shard": name, "row": row}
