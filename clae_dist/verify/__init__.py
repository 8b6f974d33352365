"""`clae verify`: the checks of a new machine or cluster, run one by one and recorded in one table and one JSON file.

A check is a `Check` in a small file of its own (plan.py lists them). run.py runs them under any launcher; record.py keeps the
verdicts.
"""
