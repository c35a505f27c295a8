"""Llama 3's row of the MODELS table: what planners and the config loader may know of it. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.llama3 import huggingface
from models.llama3.config import FLAVORS, Llama3Config, flop_inputs, problems
from models.spec import HuggingFaceFormat, ModelSpec, Role

if TYPE_CHECKING:
    from models.llama3.decoder import Llama3Decoder
    from models.llama3.model import Llama3


def build(config: Llama3Config) -> Llama3:
    """Make the module on the current default device."""
    from models.llama3.model import Llama3  # torch is imported here and not before

    return Llama3(config)


def build_decoder(model: Llama3, batch_size: int, max_length: int) -> Llama3Decoder:
    """Make room for the keys and values of `batch_size` sequences of up to `max_length` tokens."""
    from models.llama3.decoder import Llama3Decoder

    return Llama3Decoder(model, batch_size, max_length)


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
    huggingface=HuggingFaceFormat(
        model_type="llama",
        names=huggingface.hf_names,
        shapes=huggingface.shapes,
        row_block=huggingface.row_block,
        is_unused=huggingface.is_unused,
        to_hf=huggingface.to_hf,
        from_hf=huggingface.from_hf,
        config=huggingface.hf_config,
        config_from=huggingface.config_from_hf,
        overrides=huggingface.overrides,
    ),
    build_decoder=build_decoder,  # type: ignore[arg-type]
)
