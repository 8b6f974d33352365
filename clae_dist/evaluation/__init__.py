"""Evaluation of frozen encoders under several protocols."""
