<<<<<<< HEAD
"""Evaluation of a frozen encoder (kNN, linear probe), and the report of a run."""
=======
"""Evaluation of frozen encoders under several protocols, and reports of runs."""
>>>>>>> main
