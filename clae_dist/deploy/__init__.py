"""The encoder of a run outside of training: exports for timm and torchvision, encoders with their preprocessing, embeddings."""
