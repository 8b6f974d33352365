"""Audit of prepared sets and of the overlap between them: `python -m data_prep audit --help`."""
