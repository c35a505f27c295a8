"""Checkpoints: save, load, integrity, pruning."""
