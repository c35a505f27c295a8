"""The Triton side of `kernels`: nothing here is imported before a kernel runs, so that CPUs do without Triton."""
