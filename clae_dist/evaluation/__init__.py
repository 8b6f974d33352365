"""Evaluation of a frozen encoder (kNN, linear probe), and the report of a run."""
