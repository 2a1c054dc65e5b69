"""Correctness and speed on a GPU, at the 1.5B configuration; see README.md."""
