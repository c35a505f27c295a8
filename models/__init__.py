"""The models that Octavo can train, as one plain table.

Reading the table costs milliseconds: it holds sizes, names and roles, and torch is imported only when
a row's `build` is called. `docs/adding_a_model.md` tells how to add a row.
"""

from __future__ import annotations

from models.llama3.spec import SPEC as LLAMA3
from models.spec import ModelSpec

MODELS: dict[str, ModelSpec] = {
    "llama3": LLAMA3,
}
"""`[model] name` -> what the model provides."""


def flavor_names() -> list[str]:
    """Every trainable architecture as ``model/flavor``, in table order."""
    return [f"{name}/{flavor}" for name, spec in MODELS.items() for flavor in spec.flavors]
