"""Data: manifest, order of samples, shards, decoding, views, augmentation, loader."""
