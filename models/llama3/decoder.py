"""Llama 3 one token at a time: the trained module's weights and functions, with a key/value cache.

The training forward stays free of it: `Llama3Decoder` walks over the blocks itself and calls their norms,
linears and feed-forwards. Only the attention is written again, since here queries meet cached keys.

Prompts of different lengths share a batch. They are padded at the right, so a row's token p lies in slot p
of the cache: causal attention keeps the padding from the prompt's tokens, and later tokens overwrite it
before they may look at it. So each row computes what it would compute alone.

Blocks may lie on several devices; the hidden states travel, the cache lies where its block is.

Legend: B sequences, T prompt tokens, L slots of the cache, H query heads, H_kv key and value heads, Dh head
width, D = dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.llama3.model import Attention, Llama3
from models.rope import rope_frequencies, rotate


class Llama3Decoder:
    """See the module.

    Args:
        model: A whole Llama 3 with weights; it is not changed.
        batch_size: B.
        max_length: L, prompt and generated tokens together.
    """

    def __init__(self, model: Llama3, batch_size: int, max_length: int):
        assert model.tok_embeddings is not None
        self.model, self.max_length = model, max_length
        self._lengths = [0] * batch_size
        config, dtype = model.config, model.tok_embeddings.weight.dtype
        angles = torch.outer(
            torch.arange(max_length, dtype=torch.float32),
            rope_frequencies(config.head_dim, model.rope.theta, model.rope.scaling),
        )
        tables = (angles.cos(), angles.sin())
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._tables: dict[torch.device, list[Tensor]] = {}
        for block in model.layers.values():
            device = block.attention.wq.weight.device
            shape = (batch_size, config.n_kv_heads, max_length, config.head_dim)
            self._keys.append(torch.zeros(shape, dtype=dtype, device=device))
            self._values.append(torch.zeros(shape, dtype=dtype, device=device))
            if device not in self._tables:
                self._tables[device] = [table.to(device) for table in tables]

    @torch.no_grad()
    def prefill(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Read the prompts: (B, T) int64, padded at the right; returns the logits (B, V) after each."""
        self._lengths = list(lengths)
        hidden = self._blocks(tokens, torch.arange(tokens.shape[1])[None], None)
        last = torch.tensor(lengths, device=hidden.device) - 1
        return self._logits(hidden[torch.arange(len(lengths), device=hidden.device), last])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token a row: (B,) int64; returns the logits (B, V) after it."""
        positions = torch.tensor(self._lengths)[:, None]
        self._lengths = [length + 1 for length in self._lengths]
        visible = torch.arange(max(self._lengths)) <= positions  # (B, L')
        return self._logits(self._blocks(tokens[:, None], positions, visible[:, None, None])[:, 0])

    def _blocks(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T) tokens at `positions` (B or 1, T) -> hidden states (B, T, D)."""
        assert self.model.tok_embeddings is not None
        hidden = self.model.tok_embeddings(tokens.to(self.model.tok_embeddings.weight.device))
        # Moved once a device, not once a block: a copy from the host waits for the device.
        at = {device: positions.to(device) for device in self._tables}
        masks = {device: None if mask is None else mask.to(device) for device in self._tables}
        for index, block in enumerate(self.model.layers.values()):
            device = self._keys[index].device
            hidden = hidden.to(device)
            x = block.attention_norm(hidden)
            hidden = hidden + self._attention(index, block.attention, x, at[device], masks[device])
            hidden = hidden + block.feed_forward(block.ffn_norm(hidden))
        return hidden

    def _attention(
        self, index: int, a: Attention, x: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """`Attention.forward` with the cache: (B, T, D) -> (B, T, D)."""
        cos, sin = (table[positions][:, :, None] for table in self._tables[x.device])  # (B or 1, T, 1, Dh/2)
        q = rotate(a.wq(x).unflatten(-1, (-1, a.head_dim)), cos, sin).transpose(1, 2)
        k = rotate(a.wk(x).unflatten(-1, (-1, a.head_dim)), cos, sin).transpose(1, 2)
        v = a.wv(x).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
        keys, values = self._keys[index], self._values[index]
        if mask is None:  # prompts: slots 0 to T, causal among themselves
            keys[:, :, : k.shape[2]], values[:, :, : v.shape[2]] = k, v
        else:
            rows, slots = torch.arange(len(x), device=x.device), positions[:, 0]
            keys[rows, :, slots], values[rows, :, slots] = k[:, :, 0], v[:, :, 0]
            k, v = keys[:, :, : mask.shape[-1]], values[:, :, : mask.shape[-1]]
        return a.wo(a.inner_attention(q, k, v, mask).transpose(1, 2).flatten(-2))

    def _logits(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, V)."""
        assert self.model.norm is not None
        assert self.model.output is not None
        hidden = hidden.to(self.model.norm.weight.device)
        return self.model.output(self.model.norm(hidden))
