"""lm-eval (EleutherAI's evaluation harness) on a model of Octavo's, without an export in between.

`OctavoLM` is the harness's interface: log-likelihoods of continuations, rolling log-likelihoods of texts,
generation until a stop string. Needs the extra ``eval`` (lm-eval).

As in training, a text begins with the tokenizer's bos. Sequences longer than the model reads are cut from
the left, as the harness's own models do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    raise ValueError(
        f"tasks need the package lm-eval, which cannot be imported ({error})\n"
        "  install it with: pip install 'octavo[eval]'"
    ) from None

from trainer.data.tokenizer import Tokenizer
from trainer.interop.generation import Sampling, generate
from trainer.interop.trained import LoadedModel

DEFAULT_NEW_TOKENS = 256


class OctavoLM(TemplateLM):
    """See the module.

    Args:
        loaded: The model, on one device.
        words: Its tokenizer.
        batch_size: Sequences that are computed together.
        max_length: Tokens that the model reads at once.
    """

    def __init__(self, loaded: LoadedModel, words: Tokenizer, batch_size: int, max_length: int):
        super().__init__()
        self._loaded, self._words = loaded, words
        self._batch_size, self._max_length = batch_size, max_length

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without context."""
        return self.eot_token_id if self._words.bos_id is None else self._words.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with bos unless `add_special_tokens` is False."""
        bos = [] if add_special_tokens is False or self._words.bos_id is None else [self._words.bos_id]
        return [*bos, *self._words.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities of the continuation, whether it is the greedy one), in order."""
        found: dict[int, tuple[float, bool]] = {}
        # Neighbours in length share a batch, the longest first: what does not fit shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for indices in _chunks(order, self._batch_size):
            pairs = [(requests[i][1], requests[i][2]) for i in indices]
            found.update(zip(indices, self._score(pairs), strict=True))
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        inputs = [[*context, *continuation][-self._max_length - 1 : -1] for context, continuation in pairs]
        longest = max(map(len, inputs))
        # Padding at the right: causal attention keeps it from what is before it.
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in inputs])
        ids = torch.zeros_like(tokens).to(self._loaded.device) if self._loaded.document_mask else None
        logits = self._loaded.model(tokens.to(self._loaded.device), ids)
        for row, source, (_, continuation) in zip(logits, inputs, pairs, strict=True):
            wanted = torch.tensor(continuation[-len(source) :], device=row.device)
            scored = F.log_softmax(row[len(source) - len(wanted) : len(source)].float(), dim=-1)
            total = scored.gather(-1, wanted[:, None]).sum()
            yield float(total), bool((scored.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token predicted once, in windows of the longest length."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self._max_length, 1
            )
            pairs = [(text, *make_disjoint_window(window)) for window in windows]
            found.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts; each text ends before the first of its stop strings."""
        return [self._continued(*request.args) for request in requests]

    def _continued(self, context: str, settings: dict[str, Any]) -> str:
        new = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
        new = min(new, self._max_length - 1)
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        prompt = self.tok_encode(context)[-(self._max_length - new) :]
        sampling = Sampling(temperature=temperature)
        result = generate(
            self._loaded, [prompt], max_new_tokens=new, stop_ids=[self.eot_token_id], sampling=sampling
        )
        text = self._words.decode(result.completions[0].tokens)
        stops = settings.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.split(stop)[0] if stop else text
        return text


def run_tasks(
    loaded: LoadedModel,
    words: Tokenizer,
    tasks: Sequence[str],
    *,
    task_path: str | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    max_length: int,
) -> tuple[dict[str, Any], str]:
    """Run tasks of the harness.

    Returns:
        Task -> its scores, and the harness's own table.

    Raises:
        ValueError: a task does not exist.
    """
    manager = TaskManager(include_path=task_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"lm-eval has no task {unknown[0]!r}; lm-eval ls tasks lists them")
    results = simple_evaluate(
        model=OctavoLM(loaded, words, batch_size, max_length),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
    )
    return dict(results["results"]), make_table(results)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
