"""`octavo config` and `--help`: show what a configuration comes to, without torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trainer.config import checks
from trainer.config.errors import EXIT_BAD_INPUT, ConfigError
from trainer.config.job import JobConfig
from trainer.config.load import load
from trainer.config.render import as_json, as_toml, docs_page, help_text
from trainer.config.schema import read_schema

USAGE = "usage: octavo config [--json | --markdown] [--section.key VALUE ...]     (environment: CONFIG_FILE)"


def help_requested(argv: Sequence[str]) -> bool:
    """True where the words ask for help rather than a run."""
    return "--help" in argv or "-h" in argv


def print_help(usage: str) -> None:
    """Every key, grouped by section."""
    print(help_text(read_schema(JobConfig), usage), end="")


def main(argv: Sequence[str]) -> int:
    """Print the merged configuration, each value with its origin; exit code 2 where it is wrong."""
    if help_requested(argv):
        print_help(USAGE)
        return 0
    rest = [word for word in argv if word not in ("--json", "--markdown")]
    if "--markdown" in argv:
        print(docs_page(read_schema(JobConfig)), end="")
        return 0
    try:
        loaded = load(rest)
        found = checks.problems(loaded)
        if found:
            raise ConfigError(found)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    print(as_json(loaded) if "--json" in argv else as_toml(loaded), end="\n" if "--json" in argv else "")
    for line in loaded.notes:
        print(f"note: {line}", file=sys.stderr)
    for line in [*checks.warnings(loaded), *map(str, checks.unavailable(loaded))]:
        print(f"warning: {line}", file=sys.stderr)
    return 0
