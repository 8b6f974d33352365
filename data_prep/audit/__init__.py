"""What is in prepared sets, and what two of them share: `python -m data_prep audit --help`."""
