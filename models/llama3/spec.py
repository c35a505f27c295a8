"""Llama 3's row of the MODELS table: what planners and the config loader may know of it. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.llama3.config import FLAVORS, Llama3Config, flop_inputs, problems
from models.spec import ModelSpec, Role

if TYPE_CHECKING:
    from models.llama3.model import Llama3


def build(config: Llama3Config) -> Llama3:
    """Make the module on the current default device."""
    from models.llama3.model import Llama3  # torch is imported here and not before

    return Llama3(config)


ROLES: dict[str, Role] = {
    "tok_embeddings": Role.EMBEDDING,
    "layers.*.attention_norm": Role.NORM,
    "layers.*.attention.wq": Role.COLUMNWISE,
    "layers.*.attention.wk": Role.COLUMNWISE,
    "layers.*.attention.wv": Role.COLUMNWISE,
    "layers.*.attention.wo": Role.ROWWISE,
    "layers.*.ffn_norm": Role.NORM,
    "layers.*.feed_forward.w1": Role.COLUMNWISE,
    "layers.*.feed_forward.w3": Role.COLUMNWISE,
    "layers.*.feed_forward.w2": Role.ROWWISE,
    "norm": Role.NORM,
    "output": Role.OUTPUT,
}

SPEC = ModelSpec(
    config_type=Llama3Config,
    flavors=FLAVORS,
    build=build,
    flop_inputs=flop_inputs,
    roles=ROLES,
    blocks="layers",
    problems=problems,
    attention="layers.*.attention.inner_attention",
)
