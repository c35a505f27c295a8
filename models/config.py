"""The [model] section: which model, which size, which converters. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """Which architecture is trained and what is changed in it."""

    name: str = "llama3"
    """Row of the MODELS table."""
    flavor: str = "debugmodel"
    """Size of the model: a key of its flavors."""
    hf_assets_path: str = "./tests/assets/tokenizer"
    """Folder with tokenizer.json (and config), or a tokenizer.model file."""
    converters: list[str] = field(default_factory=list)
    """Converters, applied in this order, `float8` say."""
    print_after_conversion: bool = False
    """Log the module tree after the converters ran."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the flavor to change, `n_layers = 8` say; typed and checked like every key."""
