"""`clae parity`: W processes against one, on the same global batch, with the user's own model and settings."""
