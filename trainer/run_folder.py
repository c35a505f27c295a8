"""The run folder: what a run leaves behind so that it can be understood and run again.

``config.toml`` reruns the same job (the drawn seed included); ``run.json`` has versions, git commit, devices
and the command line. A file of an earlier run in the same folder is kept under the next free number.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.config.errors import ConfigError
from trainer.config.load import Loaded
from trainer.config.render import as_json, as_toml
from trainer.packages import ROOT

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "tomli")


def open_run_folder(loaded: Loaded, rank: int) -> Path:
    """Create the run folder; the rank that writes its records also tries whether it can be written to.

    Raises:
        ConfigError: it cannot be created or written to.
    """
    folder = Path(loaded.config.job.dump_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
    except OSError as error:
        message = f"cannot write to {folder}: {error.strerror}"
        raise ConfigError([loaded.problem("job.dump_folder", message)]) from None
    return folder


def write_records(
    folder: Path, loaded: Loaded, *, seed: int, devices: Sequence[str], reports: Sequence[Mapping[str, Any]]
) -> None:
    """Write config.toml, run.json and, where something was converted, conversion.json."""
    config = as_toml(loaded, origins=False)
    if loaded.config.debug.seed is None:
        config = config.replace("# seed = (none)", f"seed = {seed}", 1)
    _write_new(folder / "config.toml", config)
    _write_new(folder / "run.json", json.dumps(_facts(loaded, seed, devices), indent=2) + "\n")
    if reports:
        _write_new(folder / "conversion.json", json.dumps(list(reports), indent=2) + "\n")
    if name := loaded.config.job.save_config_file:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_new(path, as_json(loaded) + "\n")


def git_commit() -> str | None:
    """Commit of the checkout that Octavo runs from, with ``-dirty`` where files differ from it."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def package_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _facts(loaded: Loaded, seed: int, devices: Sequence[str]) -> dict[str, Any]:
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "description": loaded.config.job.description,
        "command_line": sys.argv[1:],
        "config_file": loaded.config.job.config_file,
        "seed": seed,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {"octavo": __version__, **{name: package_version(name) for name in _PACKAGES}},
        "devices": list(devices),
        "world_size": len(devices),
    }


def _write_new(path: Path, text: str) -> None:
    """Write `path`; what is there already and differs moves to the next free number."""
    if path.exists() and path.read_text() != text:
        number = 1
        while (kept := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        path.rename(kept)
    path.write_text(text)
