"""Encoders, projector, routed and global normalisation layers."""

from clae_dist.models.model import PretrainModel, build_model, check_model

__all__ = ["PretrainModel", "build_model", "check_model"]
