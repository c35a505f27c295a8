"""Triton kernels with a PyTorch reference beside each; imported by models, converters and trainer.optim."""
