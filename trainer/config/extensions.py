"""`experimental.custom_import`: a user's own models, converters and datasets.

The module is imported once and its tables (plain dicts named MODELS, CONVERTERS, DATASETS) are merged into
the built-in ones. A name that exists already is an error: nothing is replaced silently.
"""

from __future__ import annotations

import importlib
from typing import Any

from converters import CONVERTERS
from models import MODELS
from trainer.config.errors import ConfigError, Problem
from trainer.data.datasets import DATASETS

_KEY = "experimental.custom_import"


def merge_custom_tables(module_name: str | None) -> None:
    """Import `module_name` and merge its tables; None or an empty name does nothing.

    Raises:
        ConfigError: the module cannot be imported, has no table, or a name is taken.
    """
    if not module_name:
        return
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError([Problem(_KEY, f"cannot import {module_name!r}: {error}")]) from None
    tables: dict[str, dict[str, Any]] = {"MODELS": MODELS, "CONVERTERS": CONVERTERS, "DATASETS": DATASETS}
    given = {name: getattr(module, name) for name in tables if hasattr(module, name)}
    if not given:
        message = f"module {module_name!r} has none of the tables {', '.join(tables)}"
        raise ConfigError([Problem(_KEY, message)])
    problems = []
    for table_name, rows in given.items():
        table = tables[table_name]
        clashes = [name for name, row in rows.items() if name in table and table[name] is not row]
        if clashes:
            message = f"{table_name} of {module_name!r} has names that exist already: {', '.join(clashes)}"
            problems.append(Problem(_KEY, message))
        else:
            table.update(rows)
    if problems:
        raise ConfigError(problems)
