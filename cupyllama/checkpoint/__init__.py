"""Checkpoints on disk: readers, one weight-name table a family, and the tensors of a stage."""
