"""Fused kernels: what PyTorch does in several passes over memory, in one.

A file here holds one operation in three forms, in this order:

- the reference, a few lines of PyTorch that say what the operation is, on any device;
- the Triton kernel, in `kernels/triton/` under the same file name, which is imported when it first runs;
- the operator ``octavo::NAME`` (`torch.library`), with a meta form: what models, converters, parallelisms
  and `trainer.optim` call. On a CUDA device with Triton it launches the kernel, elsewhere it is the
  reference.

The operator composes with `torch.compile`, which does not look inside it. Imported by models, converters,
parallelisms and trainer.optim; imports torch alone.
"""
