"""Contrastive learning with adversarial examples (CLAE) on a global batch, at scale."""

__version__ = "0.1.0"
