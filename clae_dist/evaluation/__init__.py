"""Evaluation of frozen encoders under several protocols, and reports of runs."""
