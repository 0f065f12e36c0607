"""Checkpoints in the file formats of others, out and in."""
