"""Kernels of accelerators, and what else runs where they don't."""

LANES = 128  # of a TPU: its vectors and the tiles of its memory are so wide
