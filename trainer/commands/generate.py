"""`octavo generate CHECKPOINT --prompt TEXT`: continue prompts with a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from trainer.commands.shared import Device, Dtype, at_least, open_model, run_command, warn_beyond

if TYPE_CHECKING:
    from trainer.interop.generation import Generated


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    return run_command(generate, "generate", argv)


def generate(
    checkpoint: Annotated[str, tyro.conf.Positional],
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    prompt_file: str | None = None,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    ignore_eos: bool = False,
    step: int | None = None,
    tokenizer: str | None = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Continue prompts with a trained model.

    Args:
        checkpoint: A run folder, a step-N folder or a Hugging Face folder.
        prompt: Text to continue; may be given several times.
        prompt_file: File with a prompt on each line.
        max_tokens: Tokens to generate for each prompt; fewer where the text ends.
        temperature: Logits are divided by it; 0 takes the most likely token.
        top_k: Draw from the k most likely tokens; 0 from all.
        top_p: Draw from the most likely tokens that make up this probability.
        seed: Of the draws; equal seeds give equal texts.
        batch_size: Prompts that are computed together.
        ignore_eos: Go on after an end-of-text token.
        step: Step of a run; the newest valid one without it.
        tokenizer: The model's tokenizer, where it is not where the run had it.
        dtype: Of the weights in memory; auto is float32 on a CPU and bfloat16 on GPUs.
        device: auto takes GPUs where there are some, as many as the model needs.
        as_json: Print one JSON object a prompt, and the throughput to stderr.
    """
    from trainer.interop.generation import Sampling
    from trainer.interop.generation import generate as continue_batch
    from trainer.interop.trained import load_on

    at_least("max_tokens", max_tokens)
    at_least("batch_size", batch_size)
    sampling = Sampling(temperature, top_k, top_p, seed)
    texts = [*prompt, *_lines(prompt_file)]
    if not texts:
        raise ValueError("there is nothing to continue; give --prompt TEXT or --prompt-file FILE")
    trained, words = open_model(checkpoint, step, tokenizer)
    start = [] if words.bos_id is None else [words.bos_id]
    prompts = [[*start, *ids] for ids in words.encode_batch(texts)]
    longest = max(map(len, prompts)) + max_tokens
    warn_beyond(trained, longest, "texts")
    cached = longest * min(batch_size, len(texts))
    loaded = load_on(trained, dtype, device, cached_tokens=cached, max_seq_len=longest)
    results = []
    for first in range(0, len(prompts), batch_size):
        result = continue_batch(
            loaded,
            prompts[first : first + batch_size],
            max_new_tokens=max_tokens,
            stop_ids=[] if ignore_eos else [words.eos_id, *trained.stop_ids],
            sampling=sampling,
            first_number=first,
        )
        results.append(result)
        for number, completion in enumerate(result.completions, first):
            text = words.decode(completion.tokens)
            if as_json:
                row = {"prompt": texts[number], "text": text, "tokens": completion.tokens}
                print(json.dumps({**row, "ended": completion.finished}, ensure_ascii=False))
            else:
                head = f"--- {number + 1} of {len(texts)} ---\n" if len(texts) > 1 else ""
                print(f"{head}{texts[number]}{text}\n")
    print(_throughput(results, loaded.where), file=sys.stderr if as_json else sys.stdout)


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise ValueError(f"prompt_file = {path!r}: {reason}") from None
    return [line for line in text.splitlines() if line.strip()]


def _throughput(results: Sequence[Generated], where: str) -> str:
    new, read = (sum(getattr(r, name) for r in results) for name in ("new_tokens", "prompt_tokens"))
    prefill = sum(r.prefill_seconds for r in results)
    seconds = prefill + sum(r.decode_seconds for r in results)
    return (
        f"{new:,} tokens in {seconds:.2f} s: {new / max(seconds, 1e-9):,.1f} tokens/s "
        f"({read:,} tokens of prompts read in {prefill:.2f} s; {where})"
    )
