"""Checkpoints: a folder a step, a file a rank, whole or not there at all; nothing is ever unpickled.

pieces (what a rank holds of which tensor), write (in the background), index (checkpoint.json), read (whole tensors by name).
"""

from clae_dist.runs.checkpoint.index import CheckpointError
from clae_dist.runs.checkpoint.pieces import Piece, Place, sections
from clae_dist.runs.checkpoint.read import Checkpoint, Shapes, load_checkpoint, load_model, shapes_of
from clae_dist.runs.checkpoint.write import Writer, remove_leftovers

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Piece",
    "Place",
    "Shapes",
    "Writer",
    "load_checkpoint",
    "load_model",
    "remove_leftovers",
    "sections",
    "shapes_of",
]
