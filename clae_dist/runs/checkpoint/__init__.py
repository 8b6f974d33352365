"""Checkpoints: one folder per step, one safetensors file per rank, committed by a rename; nothing is unpickled.

pieces: parts of tensors and the ranks that hold them. write: in the background. index: checkpoint.json. read: full tensors.
shared: full tensors, each read by one rank.
"""

from clae_dist.runs.checkpoint.pieces import Piece, Place, sections
from clae_dist.runs.checkpoint.read import Checkpoint, Shapes, load_checkpoint, load_model, shapes_of
from clae_dist.runs.checkpoint.shared import SharedCheckpoint
from clae_dist.runs.checkpoint.write import Writer, remove_leftovers

__all__ = [
    "Checkpoint",
    "Piece",
    "Place",
    "Shapes",
    "SharedCheckpoint",
    "Writer",
    "load_checkpoint",
    "load_model",
    "remove_leftovers",
    "sections",
    "shapes_of",
]
