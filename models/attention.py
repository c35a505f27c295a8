"""Causal attention over heads, within one sequence or within its packed documents.

Two kinds of mask:

- causal: `F.scaled_dot_product_attention(is_causal=True)`. On CUDA the kernel is chosen from
  cuDNN, flash, memory-efficient and plain math, in this order unless one is named; on a CPU PyTorch
  chooses.
- document: a position sees only earlier positions of its own document. On CUDA through
  FlexAttention, which skips blocks of the score matrix that lie between documents; on a CPU through a
  dense mask. Equal results, up to rounding.

Keys and values may have fewer heads than queries (grouped-query attention, Ainslie et al. 2023, arXiv
2305.13245): query head h reads key head ``h // (H / H_kv)``.

Legend: B sequences, S positions, H query heads, H_kv key and value heads, Dh head width. Head counts
are those of the tensors, so heads may be sharded by tensor parallelism.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BACKENDS: dict[str, list[SDPBackend]] = {
    "auto": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
}
"""`attn_backend` -> kernels that may run, most wanted first."""


def document_mask(document_ids: Tensor, rows: Tensor | None = None) -> Tensor | BlockMask:
    """Build the mask of packed documents, once for all blocks of a forward pass.

    Args:
        document_ids: (B, S) integers; positions of a sequence with equal ids are one document.
        rows: (T,) int64, the positions that queries stand for; None: all S.

    Returns:
        On CUDA a `BlockMask`, elsewhere (B, 1, T, S) booleans, True where a query (row) may look.
    """
    B, S = document_ids.shape
    T = S if rows is None else len(rows)
    if not document_ids.is_cuda:
        keys = torch.arange(S, device=document_ids.device)
        queries = keys if rows is None else rows
        same = document_ids[:, queries, None] == document_ids[:, None, :]
        return (same & (queries[:, None] >= keys))[:, None]
    place = None if rows is None else rows.to(document_ids.device)

    def may_look(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        row = q if place is None else place[q]
        return (row >= kv) & (document_ids[b, row] == document_ids[b, kv])

    return _compiled_create_block_mask()(may_look, B, None, T, S, device=document_ids.device)


class InnerAttention(nn.Module):
    """softmax(q k^T / sqrt(Dh)) v under a mask. A module, so that parallelism can wrap it."""

    def __init__(self, backend: str = "auto"):
        super().__init__()
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """Attend.

        Args:
            q: (B, H, S, Dh).
            k: (B, H_kv, S, Dh).
            v: (B, H_kv, S, Dh).
            mask: what `document_mask` returned, or None for causal.

        Returns:
            (B, H, S, Dh)
        """
        grouped = q.shape[1] != k.shape[1]
        if isinstance(mask, BlockMask):
            return _flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
        if mask is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        if not q.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if grouped and (self.backend == "efficient" or q.dtype == torch.float32):
            # The memory-efficient kernel, the only one for fp32 beside math, has no grouped form.
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            grouped = False
        # The kernels are set here and not around the model: recomputation in the backward pass must
        # choose the same one.
        with sdpa_kernel(BACKENDS[self.backend], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    # Uncompiled, FlexAttention would form the full score matrix; in a compiled block it is fused there.
    run = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    return run(q, k, v, **options)


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


@cache
def _compiled_create_block_mask() -> Any:
    return torch.compile(create_block_mask)
