"""Llama 3 as a PyTorch module: one file, read from top to bottom.

    hidden = tok_embeddings(tokens)
    for block in layers:
        hidden = hidden + attention(attention_norm(hidden))       wq wk wv, RoPE, softmax, wo
        hidden = hidden + feed_forward(ffn_norm(hidden))          w2(silu(w1 x) * w3 x)
    logits = output(norm(hidden))

(Grattafiori et al. 2024, arXiv 2407.21783, section 3.2; RMSNorm: Zhang and Sennrich 2019, arXiv
1910.07467; gated FFN: Shazeer 2020, arXiv 2002.05202.) Linear layers have no biases.

It knows nothing of parallelism. Three things make it easy to shard: head counts are read from the
tensors, blocks sit in a `ModuleDict` keyed by the layer's global number, and `tok_embeddings`, `norm`
or `output` may be set to None where a pipeline stage does not have them.

Initial weights: embedding N(0, 1); wq wk wv w1 std 0.02; wo w2 w3 std 0.02 / sqrt(2 (layer + 1)), so
that the residual stream grows slowly with depth; output std dim^-0.5; norms 1. All but the embedding
are truncated at three standard deviations. A tied weight has std 0.02 (as GPT-2's, Radford et al.
2019): as N(0, 1) its first logits would be sqrt(dim) wide.

Legend: B sequences, S positions, D = dim, H query heads, H_kv key and value heads, Dh head width,
V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.swiglu import silu_mul
from models.attention import InnerAttention, document_mask
from models.init import Initializer
from models.llama3.config import Llama3Config
from models.rope import RopeScaling, RotaryEmbedding


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: Llama3Config, rope: RotaryEmbedding):
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.rope = rope
        self.inner_attention = InnerAttention(config.attn_backend)

    def forward(self, x: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        q = self.rope(self.wq(x).unflatten(-1, (-1, self.head_dim)))  # (B, S, H, Dh)
        k = self.rope(self.wk(x).unflatten(-1, (-1, self.head_dim)))
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))
        out = self.inner_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.wo(out.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: Llama3Config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.fused = config.swiglu_kernel == "fused"

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        if self.fused:
            return self.w2(silu_mul(self.w1(x), self.w3(x)))
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class FusedRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in one kernel, which may also do the addition before it."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(x + residual, its norm)."""
        assert self.eps is not None
        return add_rms_norm(x, residual, self.weight, self.eps)


def build_norm(config: Llama3Config) -> nn.RMSNorm:
    """The norm of (..., D) that the config asks for; the parameter is the same in all."""
    kind = FusedRMSNorm if config.norm_kernel == "fused" else nn.RMSNorm
    return kind(config.dim, eps=config.norm_eps)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, layer: int, config: Llama3Config, rope: RotaryEmbedding):
        super().__init__()
        self.layer = layer
        self.attention = Attention(config, rope)
        self.feed_forward = FeedForward(config)
        self.attention_norm = build_norm(config)
        self.ffn_norm = build_norm(config)

    def forward(self, x: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        attended = self.attention(self.attention_norm(x), mask)
        if isinstance(self.ffn_norm, FusedRMSNorm):
            h, normed = self.ffn_norm.add(x, attended)
            return h + self.feed_forward(normed)
        h = x + attended
        return h + self.feed_forward(self.ffn_norm(h))

    def init_weights(self, initializer: Initializer) -> None:
        """Fill the block's parameters in place."""
        residual_std = 0.02 / (2 * (self.layer + 1)) ** 0.5
        a, f = self.attention, self.feed_forward
        linears = {
            "attention.wq": (a.wq, 0.02),
            "attention.wk": (a.wk, 0.02),
            "attention.wv": (a.wv, 0.02),
            "attention.wo": (a.wo, residual_std),
            "feed_forward.w1": (f.w1, 0.02),
            "feed_forward.w2": (f.w2, residual_std),
            "feed_forward.w3": (f.w3, residual_std),
        }
        for name, (linear, std) in linears.items():
            initializer.truncated_normal_(linear.weight, f"layers.{self.layer}.{name}.weight", std)
        nn.init.ones_(self.attention_norm.weight)
        nn.init.ones_(self.ffn_norm.weight)


class Llama3(nn.Module):
    """A Llama 3 decoder, or a pipeline stage of one.

    A stage is made by setting `tok_embeddings`, `norm` or `output` to None and deleting blocks; without
    `tok_embeddings` the input is hidden states, without `output` the result is.
    """

    tok_embeddings: nn.Embedding | None
    norm: nn.RMSNorm | None
    output: nn.Linear | None

    def __init__(self, config: Llama3Config):
        super().__init__()
        self.config = config
        scaling = RopeScaling(
            factor=config.rope_scaling_factor,
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
            original_seq_len=config.rope_original_seq_len,
        )
        self.rope = RotaryEmbedding(
            config.head_dim,
            config.max_seq_len,
            config.rope_theta,
            scaling if config.rope_scaling else None,
            fused=config.rope_kernel == "fused",
        )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict(
            {str(layer): TransformerBlock(layer, config, self.rope) for layer in range(config.n_layers)}
        )
        self.norm = build_norm(config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie_output()

    def forward(
        self, tokens: Tensor, document_ids: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Predict each next token.

        Args:
            tokens: (B, S) int64; (B, S, D) hidden states where this stage has no `tok_embeddings`.
            document_ids: (B, S) integers, read where attn_mask_type is ``document``.
            labels: (B, S) int64 for an `output` that has been made to give the loss, in place of logits.

        Returns:
            Logits (B, S, V); hidden states (B, S, D) where this stage has no `output`.
        """
        hidden = self.hidden_states(tokens, document_ids)
        if self.output is None:
            return hidden
        return self.output(hidden) if labels is None else self.output(hidden, labels)

    def hidden_states(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """What `output` is applied to: (B, S, D), normed. Arguments as for `forward`.

        Under FSDP2, register it with `register_fsdp_forward_method` before calling it directly.
        """
        mask = self._mask(document_ids)
        hidden = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        for block in self.layers.values():
            hidden = block(hidden, mask)
        return hidden if self.norm is None else self.norm(hidden)

    def tie_output(self) -> None:
        """Make the output's weight the embedding's, if the config says so.

        Needed again after anything that replaces parameters one module at a time, `to_empty` from
        ``meta`` or tensor parallelism for example; `init_weights` does it too.
        """
        if self.config.tied_output and self.output is not None and self.tok_embeddings is not None:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self, draw_on: torch.device | None = None) -> None:
        """Fill every parameter and buffer in place; see the head of this file for the distributions.

        The same torch seed gives the same weights under any sharding (`models.init`), and wherever they
        lie: `draw_on` is the device whose generator draws, each parameter's own when unset.
        """
        self.tie_output()
        self.rope.rebuild()
        initializer = Initializer(draw_on)
        if self.tok_embeddings is not None:
            weight = self.tok_embeddings.weight
            if self.config.tied_output:
                initializer.truncated_normal_(weight, "tok_embeddings.weight", 0.02)
            else:
                initializer.normal_(weight, "tok_embeddings.weight", 1.0)
        for block in self.layers.values():
            block.init_weights(initializer)
        if self.norm is not None:
            nn.init.ones_(self.norm.weight)
        if self.output is not None and not self.config.tied_output:
            initializer.truncated_normal_(self.output.weight, "output.weight", self.config.dim**-0.5)

    def _mask(self, document_ids: Tensor | None) -> Tensor | BlockMask | None:
        if self.config.attn_mask_type == "causal":
            return None
        if document_ids is None:
            raise ValueError("attn_mask_type 'document' needs document_ids, got None")
        return document_mask(document_ids, self.rope.positions)
