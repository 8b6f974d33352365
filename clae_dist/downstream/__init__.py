"""Tasks: what a pretrained encoder is trained for next, each a method of the same loop (README.md here)."""
