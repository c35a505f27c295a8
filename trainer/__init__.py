"""The run: configuration, data, optimizer, metrics, and the loop that joins them."""

__version__ = "0.1.0"
