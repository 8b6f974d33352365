"""What a frozen encoder is worth (kNN, linear probe) and what a run looked like (report)."""
