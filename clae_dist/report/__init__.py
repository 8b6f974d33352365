"""The report of a run: one HTML page of its curves, results and pictures, and tables that compare runs."""
