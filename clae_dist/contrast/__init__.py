"""The algorithm: tensors in, tensors out. Start reading in `step.py`."""
