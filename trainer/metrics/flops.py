"""FLOPs per token, and model FLOP utilisation.

The convention is that of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)::

    F = 6 (P - E) + 12 L H Dh T        FLOP per token, forward and backward

Every weight of a matmul costs two FLOP per token in the forward and four in the backward: 6 (P - E),
where P is the number of parameters and E those of the token embedding, which is a look-up and no matmul.
Attention's two matmuls, scores and values, cost 2 * 2 L H Dh T forward and twice that backward. They are
counted in full, also under a causal mask; what activation checkpointing computes again is not counted.

The output matmul is counted always. Where its weight is the embedding's (tied), P holds that weight once
and taking E off would take the output matmul off, so E is added back.

Legend: L layers, H heads, Dh head dim, T sequence length.
"""

from __future__ import annotations

from models.spec import FlopInputs


def flops_per_token(inputs: FlopInputs, seq_len: int) -> int:
    """FLOPs that training on one token takes, forward and backward, over all devices.

    Args:
        inputs: Sizes of the model.
        seq_len: Tokens per sequence, T.
    """
    matmul_parameters = inputs.parameters - inputs.embedding_parameters
    if inputs.tied_output:
        matmul_parameters += inputs.embedding_parameters
    attention = 12 * inputs.n_layers * inputs.n_heads * inputs.head_dim * seq_len
    return 6 * matmul_parameters + attention


def tflops_per_device(tps: float, flops_per_token: int) -> float:
    """TFLOP/s of one device that trains `tps` tokens per second."""
    return tps * flops_per_token / 1e12


def mfu_percent(tflops: float, peak_tflops: float | None) -> float | None:
    """Model FLOP utilisation in percent of the dense bf16 peak; None where the peak is unknown."""
    return None if peak_tflops is None else 100 * tflops / peak_tflops
