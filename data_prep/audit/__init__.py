"""Audit of prepared sets: contents, copies, leakage. See `python -m data_prep audit --help`."""
