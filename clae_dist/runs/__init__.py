"""What a run leaves behind: its folder, identity and checkpoints. Written by training, read by evaluation."""
