"""Attention over a part of the keys, in a form that parts can be put together from.

A query's output over some keys is o = softmax(s) v with s = q k^T / sqrt(Dh); with its log-sum-exp
L = log sum exp(s), outputs over two disjoint sets of keys merge to the output over both (the identity that
FlashAttention rests on, Dao et al. 2022, arXiv 2205.14135, section 3.1):

    L = log(exp L1 + exp L2)        o = o1 exp(L1 - L) + o2 exp(L2 - L)

Backward needs no merging: probabilities are exp(s - L) with the L over *all* keys, so that a flash kernel's
backward, given the final o and L, yields this part's share of dq, dk and dv, and shares are added.

Kernels, all of PyTorch's own: on a CPU its flash kernel; on CUDA flash, cuDNN's, or plain matmuls (any
dtype and head width; holds the scores of one part). All take fewer key heads than query heads.

Legend: B sequences, T queries, U keys, H query heads, H_kv key and value heads, Dh head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

FLASH_DTYPES = (torch.float16, torch.bfloat16)
"""What CUDA's flash and cuDNN kernels compute in."""


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Attend to these keys alone.

    Args:
        q: (B, H, T, Dh).
        k: (B, H_kv, U, Dh).
        v: (B, H_kv, U, Dh).
        causal: Query i sees keys 0..i; T equals U.
        backend: As `attn_backend` of a model: ``auto``, ``flash``, ``cudnn``, ``math``.

    Returns:
        Output (B, H, T, Dh) in q's dtype, log-sum-exp (B, H, T) in fp32.
    """
    kernel = _kernel(q, backend)
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    if kernel == "flash":
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    if kernel == "cudnn":
        out, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
        return out, lse.squeeze(-1)  # cuDNN gives (B, H, T, 1)
    scores = _scores(q, k, causal)
    lse = scores.logsumexp(-1)
    probability = (scores - lse.unsqueeze(-1)).exp()
    return (probability @ v.unsqueeze(2).float()).flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """These keys' share of the gradients.

    Args:
        grad: Gradient of the output over all keys, (B, H, T, Dh).
        q: As for `attend`.
        k: As for `attend`.
        v: As for `attend`.
        out: Output over all keys, (B, H, T, Dh).
        lse: Log-sum-exp over all keys, (B, H, T), contiguous.
        causal: As for `attend`.
        backend: As for `attend`.

    Returns:
        dq (B, H, T, Dh), dk and dv (B, H_kv, U, Dh).
    """
    kernel = _kernel(q, backend)
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal
        )
    if kernel in ("flash", "cudnn"):
        return _cuda_backward(kernel, (grad, q, k, v, out, lse), causal)
    groups, width = k.shape[1], q.shape[1] // k.shape[1]
    dout, o, queries = (t.float().unflatten(1, (groups, width)) for t in (grad, out, q))
    keys, values = k.unsqueeze(2).float(), v.unsqueeze(2).float()
    probability = (_scores(q, k, causal) - lse.unflatten(1, (groups, width)).unsqueeze(-1)).exp()
    dv = (probability.transpose(-1, -2) @ dout).sum(2)
    dprobability = dout @ values.transpose(-1, -2)
    dscores = probability * (dprobability - (dout * o).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dq, dk = (dscores @ keys).flatten(1, 2), (dscores.transpose(-1, -2) @ queries).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Add the output over further keys to (`out`, `lse`), both fp32, in place."""
    # exp(L2 - L) is sigmoid(L2 - L1), and o = o1 + (o2 - o1) exp(L2 - L).
    out.lerp_(more_out.to(out.dtype), torch.sigmoid(more_lse - lse).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, more_lse))


def _kernel(q: Tensor, backend: str) -> str:
    if not q.is_cuda:
        return "math" if backend == "math" else "cpu"
    if backend != "auto":
        return backend
    fits = q.dtype in FLASH_DTYPES and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return "flash" if fits else "math"


def _cuda_backward(kernel: str, tensors: tuple[Tensor, ...], causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out, lse = tensors
    # Lengths come from the shapes (no cumulated ones) and nothing is dropped out (a random state, not read).
    sizes = (q.shape[2], k.shape[2], 0.0, causal)
    if kernel == "flash":
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, *sizes, state, state
        )
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    return _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1), state, state, None, None, None, *sizes
    )


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """(B, H_kv, H / H_kv, T, U) in fp32, -inf where masked."""
    grouped: Any = q.float().unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.unsqueeze(2).float().transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores
