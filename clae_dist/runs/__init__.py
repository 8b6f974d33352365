"""Run folders: layout, identity, trust, goodput and checkpoints. Written by training, read by evaluation."""
