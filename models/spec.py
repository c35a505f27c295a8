"""What a model must provide, so that every other part is written once for all models.

A model is a folder in ``models/`` plus one row of the MODELS table. Its row is a `ModelSpec`:
plain data and one builder. The row is read without torch (the config loader checks flavors and
overrides in milliseconds), so `build` imports the model's code only when it is called.

A model *declares* roles; planners elsewhere *apply* them. Tensor parallelism, activation
checkpointing, compile and FSDP read `roles` and `blocks` and know nothing of any model.

Shapes used by all models: B sequences, S positions, D model width, V vocabulary.

The module that `build` returns:

- ``forward(tokens: (B, S) int64, document_ids: (B, S) int64 | None = None, labels=None)`` -> logits
  (B, S, V); labels (B, S), where given, are passed on: ``output(hidden, labels)`` is then the loss (a model
  without that argument cannot be trained with training.loss_chunk_tokens);
- ``init_weights(draw_on=None)`` fills every parameter and buffer in place, after ``to_empty``, with numbers
  drawn on the device `draw_on`;
- parameters' FQNs carry no wrapper names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class Role(str, Enum):
    """What a module is to tensor parallelism: it decides how its weight is sharded."""

    EMBEDDING = "embedding"
    COLUMNWISE = "columnwise"
    ROWWISE = "rowwise"
    NORM = "norm"
    OUTPUT = "output"


@dataclass(frozen=True)
class FlopInputs:
    """The sizes that the FLOP formula needs, known without building the model."""

    parameters: int
    """All parameters; a tied output weight counts once."""
    embedding_parameters: int
    """Parameters of the token embedding."""
    tied_output: bool
    """True where the output matmul reuses the embedding's weight."""
    n_layers: int
    n_heads: int
    head_dim: int


@dataclass(frozen=True)
class HuggingFaceFormat:
    """How the model looks in a Hugging Face folder. Plain functions, torch-free until a tensor is given."""

    model_type: str
    """``model_type`` in config.json."""
    names: Callable[[Any], dict[str, str]]
    """Config -> FQN of every stored tensor -> its name there, in the order in which they are stored."""
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    """Config -> FQN -> shape, the same here and there."""
    row_block: Callable[[Any, str], int]
    """(config, FQN) -> rows that change places only among themselves; 1 where none do."""
    is_unused: Callable[[Any, str], bool]
    """(config, name there) -> whether such a tensor may be there and is of no use: a tied output, say."""
    to_hf: Callable[[Any, str, Tensor], tuple[str, Tensor] | None]
    """(config, FQN, tensor) -> name and tensor there; None for what is not stored there."""
    from_hf: Callable[[Any, str, Tensor], tuple[str, Tensor] | None]
    """(config, name there, tensor or whole row blocks of it) -> FQN and tensor; None for what is not used."""
    config: Callable[[Any], dict[str, Any]]
    """Config -> content of config.json."""
    config_from: Callable[[Mapping[str, Any]], Any]
    """Content of config.json -> config; ValueError where the model cannot be built."""
    overrides: Callable[[Any, Any], dict[str, Any]]
    """(config, flavor) -> the fields that make the flavor the same model."""


class Decoder(Protocol):
    """A model that predicts one token after the other and keeps the keys and values of those before.

    Rows of a batch stand for themselves: their lengths may differ.
    """

    def prefill(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Read the prompts: (B, T) int64, padded at the right; returns the logits (B, V) after each."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token a row: (B,) int64; returns the logits (B, V) after it."""
        ...


@dataclass(frozen=True)
class ModelSpec:
    """One row of the MODELS table."""

    config_type: type
    """Frozen dataclass of the architecture; `[model.overrides]` may set any field of it."""
    flavors: Mapping[str, Any]
    """Flavor name -> instance of `config_type`."""
    build: Callable[[Any], nn.Module]
    """Config -> module, on the current default device (the trainer calls it under ``meta``)."""
    flop_inputs: Callable[[Any], FlopInputs]
    """Config -> sizes for `trainer.metrics.flops`."""
    roles: Mapping[str, Role]
    """FQN pattern -> role; ``*`` stands for one FQN component (``layers.*.attention.wq``)."""
    blocks: str
    """FQN of the block list (an `nn.ModuleDict` or `nn.ModuleList`), ``layers`` say."""
    problems: Callable[[Any], list[tuple[str, str]]]
    """Config -> what is wrong with it, as (field, message); empty when it can be built."""
    attention: str = ""
    """FQN pattern of the modules that compute softmax(q k^T) v, ``forward(q, k, v, mask)`` with shapes
    (B, heads, S, head width); context parallelism spreads them. Empty: the model cannot be spread so."""
    huggingface: HuggingFaceFormat | None = None
    """How it is exchanged with Hugging Face; None where it is not."""
    build_decoder: Callable[[nn.Module, int, int], Decoder] | None = None
    """(module, batch size, longest sequence) -> what generates text with it; None where nothing does."""
