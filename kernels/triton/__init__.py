"""The Triton side of `kernels`. Nothing here is imported before a kernel runs: CPUs do without Triton."""
