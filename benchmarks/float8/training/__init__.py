"""Whole training runs, bf16 and float8, one after another."""
