"""Make sure that `models`, `converters`, `parallelisms` and `kernels` are Octavo's own.

These are everyday names: another installed distribution may ship a top-level package of the same name and
shadow ours. Importing its code would fail somewhere far away, so every entry point asks here first.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

OWN_PACKAGES = ("trainer", "models", "converters", "parallelisms", "kernels")
ROOT = Path(__file__).resolve().parent.parent
"""Folder that holds the packages: the checkout, or site-packages."""


def foreign_packages() -> dict[str, str]:
    """Own package name -> location of the package that Python would import in its place."""
    found = {}
    for name in OWN_PACKAGES:
        spec = importlib.util.find_spec(name)
        locations = list(spec.submodule_search_locations or []) if spec else []
        if not locations and spec is not None and spec.origin:
            locations = [spec.origin]
        if not locations or Path(locations[0]).resolve().parent != ROOT:
            found[name] = locations[0] if locations else "nowhere"
    return found


def require_own_packages() -> None:
    """Exit with code 2 and what to do where a package is shadowed."""
    foreign = foreign_packages()
    if foreign:
        listed = ", ".join(f"{name} ({where})" for name, where in foreign.items())
        print(
            f"error: Python finds another package in place of Octavo's own: {listed}\n"
            f"Octavo's packages are in {ROOT}; put that folder first: PYTHONPATH={ROOT}\n"
            "or remove the other package (pip uninstall) from this environment.",
            file=sys.stderr,
        )
        raise SystemExit(2)
