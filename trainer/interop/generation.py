"""Text from a trained model: sampling, batches of prompts of any lengths.

A next token is drawn from softmax(logits / temperature) after two cuts, in this order:

    top-k   only the k most likely tokens stay
    top-p   only the smallest set of most likely tokens whose probabilities sum to p or more stays (nucleus,
            Holtzman et al. 2019, arXiv 1904.09751); the most likely one always does

Temperature 0 takes the most likely token. Each prompt draws from random numbers of its own, seeded by
(seed, number of the prompt): what it gets does not depend on what else is in the batch, but for rounding.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.spec import Decoder
from trainer.interop.trained import LoadedModel


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}; allowed: 0 (most likely token) and more")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}; allowed: 0 (all tokens) and more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}; allowed: above 0, up to 1")
        if self.temperature == 0 and (self.top_k > 0 or self.top_p < 1):
            raise ValueError("top_k and top_p have no effect with temperature = 0")


@dataclass(frozen=True)
class Completion:
    """What one prompt got."""

    prompt: list[int]
    tokens: list[int]
    """Generated ids, without the end-of-text token."""
    finished: bool
    """Ended by an end-of-text token, not by the limit."""


@dataclass(frozen=True)
class Generated:
    """What a batch got, and how long it took."""

    completions: list[Completion]
    prompt_tokens: int
    new_tokens: int
    """Of all prompts, end-of-text tokens included."""
    prefill_seconds: float
    decode_seconds: float
    """From the first generated token to the last."""


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    first_number: int = 0,
) -> Generated:
    """Continue each prompt.

    Args:
        loaded: The model.
        prompts: Token ids, at least one each.
        max_new_tokens: For each prompt.
        stop_ids: End-of-text tokens.
        sampling: How tokens are chosen.
        first_number: Number of the first prompt, where they come in several batches.

    Raises:
        ValueError: the model cannot generate, or a prompt is empty.
    """
    if loaded.spec.build_decoder is None:
        raise ValueError("this model has no decoder: it cannot generate text")
    if not prompts or not all(prompts):
        raise ValueError("a prompt has no tokens; give it some text")
    longest = max(map(len, prompts))
    decoder = loaded.spec.build_decoder(loaded.model, len(prompts), longest + max_new_tokens)
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    choose = _Chooser(sampling, range(first_number, first_number + len(prompts)))
    started = time.perf_counter()
    logits = decoder.prefill(tokens, [len(prompt) for prompt in prompts])
    new = [[token] for token in choose(logits)]
    read = time.perf_counter()
    _decode(decoder, choose, new, max_new_tokens, set(stop_ids))
    ended = time.perf_counter()
    completions = [_cut(prompt, row, set(stop_ids)) for prompt, row in zip(prompts, new, strict=True)]
    return Generated(
        completions,
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=sum(len(c.tokens) + c.finished for c in completions),
        prefill_seconds=read - started,
        decode_seconds=ended - read,
    )


def _decode(
    decoder: Decoder, choose: _Chooser, new: list[list[int]], max_new_tokens: int, stop: set[int]
) -> None:
    """Lengthen each row; a row that has ended goes on idly until all have."""
    ended = [row[-1] in stop for row in new]
    while len(new[0]) < max_new_tokens and not all(ended):
        chosen = choose(decoder.step(torch.tensor([row[-1] for row in new])))
        for index, token in enumerate(chosen):
            new[index].append(token)
            ended[index] = ended[index] or token in stop


def _cut(prompt: Sequence[int], row: list[int], stop: set[int]) -> Completion:
    end = next((index for index, token in enumerate(row) if token in stop), None)
    return Completion(list(prompt), row[:end], end is not None)


class _Chooser:
    """Logits (B, V) -> a token a row."""

    def __init__(self, sampling: Sampling, numbers: Sequence[int]):
        self._sampling = sampling
        self._generators = [_generator(sampling.seed, number) for number in numbers]

    def __call__(self, logits: Tensor) -> list[int]:
        if self._sampling.temperature == 0:
            return logits.argmax(-1).tolist()
        # Drawn on the host: the same random numbers whatever the device.
        kept = cut_logits(logits.float().cpu(), self._sampling)
        rows = zip(kept.softmax(-1), self._generators, strict=True)
        return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]


def cut_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) over the temperature, -inf where top-k or top-p leave a token out."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the more likely tokens
        left_out = (before >= sampling.top_p).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(left_out, float("-inf"))
    return logits


def _generator(seed: int, number: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
