"""Hugging Face folders: what is in one, checked before a tensor is read. Torch-free.

    config.json                     the sizes
    model.safetensors               the weights, or
    model.safetensors.index.json    which tensor is in which model-00001-of-00007.safetensors

A folder may come from anywhere, so nothing in it is trusted and nothing in it is run: JSON and the headers
of safetensors files are all that is read here. Pickles (``.bin``, ``.pt``) are refused, Python files and
``auto_map`` ignored, file names with folders in them refused. Links are followed, since the Hub's own cache
is made of them; what they lead to is read as safetensors or not at all.

Names, shapes and dtypes must be exactly those of the model that config.json describes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models import MODELS
from models.spec import HuggingFaceFormat, ModelSpec
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.integrity import parse_json

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes, by their safetensors names, that weights may have."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LARGEST_JSON_BYTES = 100 * 2**20
_SHOWN = 3
# How long the RoPE tables are is the run's choice and changes no weight.
_FREE_SETTINGS = ("max_position_embeddings", "bos_token_id", "eos_token_id")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HfTensor:
    """Where a tensor is stored, and as what."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HfFolder:
    """A folder that was checked; `tensors` maps Octavo's names to what is stored."""

    path: Path
    model_name: str
    config: Any
    tensors: Mapping[str, HfTensor]

    @property
    def spec(self) -> ModelSpec:
        """The model's row."""
        return MODELS[self.model_name]

    @property
    def format(self) -> HuggingFaceFormat:
        """How its tensors are mapped."""
        assert self.spec.huggingface is not None
        return self.spec.huggingface

    @property
    def dtype(self) -> str:
        """Dtype of the first tensor, the embedding."""
        return next(iter(self.tensors.values())).dtype


def is_hf_folder(path: Path) -> bool:
    """Whether a folder looks like one of Hugging Face's."""
    return (path / CONFIG_FILE).exists()


def open_hf_folder(path: Path) -> HfFolder:
    """Read config.json and the headers of all weights, and check that they fit each other.

    Raises:
        CheckpointError: they do not, or something is missing, malformed or not safe to read.
    """
    try:
        if not path.is_dir():
            raise CheckpointError("no such folder")
        settings = _read_json(path / CONFIG_FILE)
        model_name, config = _model_of(settings)
        fmt = MODELS[model_name].huggingface
        assert fmt is not None
        stored = _stored_tensors(path)
        return HfFolder(path, model_name, config, _matched(fmt, config, stored))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def stop_ids(path: Path) -> tuple[int, ...]:
    """The ids that generation_config.json says end a text; none where it is not there.

    Raises:
        CheckpointError: it is malformed.
    """
    if not (path / GENERATION_FILE).exists():
        return ()
    found = _read_json(path / GENERATION_FILE).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    if not all(token is None or (type(token) is int and token >= 0) for token in ids):
        raise CheckpointError(f"{path}: {GENERATION_FILE}: eos_token_id is {str(found)[:80]}")
    return tuple(token for token in ids if token is not None)


def require_same_model(folder: HfFolder, model_name: str, config: Any) -> None:
    """Refuse weights of another architecture than `config`, which a run has chosen.

    Raises:
        CheckpointError: naming what differs, with both values.
    """
    if folder.model_name != model_name:
        raise CheckpointError(f"{folder.path}: is a {folder.model_name}, this run's model a {model_name}")
    theirs, ours = (_flat(folder.format.config(c)) for c in (folder.config, config))
    differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if differing:
        listed = [f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in differing]
        raise CheckpointError(
            f"{folder.path}: {CONFIG_FILE} describes another model than this run's\n"
            f"  {_some(listed, '; ')}\n"
            "  choose its flavor, or set model.overrides (octavo import prints the settings)"
        )


def _model_of(settings: Mapping[str, Any]) -> tuple[str, Any]:
    if "auto_map" in settings:
        log.warning("%s names code (auto_map): it is not used, nothing in the folder is run", CONFIG_FILE)
    rows = {spec.huggingface.model_type: name for name, spec in MODELS.items() if spec.huggingface}
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in rows:
        raise CheckpointError(
            f"{CONFIG_FILE}: model_type {model_type!r} is not supported; known: {list(rows)}"
        )
    name = rows[model_type]
    spec = MODELS[name]
    assert spec.huggingface is not None
    try:
        config = spec.huggingface.config_from(settings)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if wrong := spec.problems(config):
        raise CheckpointError(f"{CONFIG_FILE}: {wrong[0][0]} {wrong[0][1]}")
    return name, config


def _stored_tensors(path: Path) -> dict[str, HfTensor]:
    """Name there -> tensor, of all files that hold weights."""
    if (path / INDEX_FILE).exists():
        weight_map = _read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{INDEX_FILE}: has no weight_map")
        for file in weight_map.values():
            if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
                raise CheckpointError(f"{INDEX_FILE}: {str(file)[:80]!r} is not the name of a file beside it")
        found = _headers(path, sorted(set(weight_map.values())))
        misplaced = [n for n, file in weight_map.items() if n not in found or found[n].file != file]
        if misplaced:
            raise CheckpointError(f"{INDEX_FILE}: not where it says: {_some(misplaced)}")
        return found
    if (path / WEIGHTS_FILE).exists():
        return _headers(path, [WEIGHTS_FILE])
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"its weights are pickles ({_some(pickles)}), which can run code when read\n"
            "  only safetensors files are read; where you trust the folder, convert it with transformers:\n"
            "  LlamaForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise CheckpointError(f"has neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _headers(path: Path, files: Sequence[str]) -> dict[str, HfTensor]:
    found: dict[str, HfTensor] = {}
    for file in files:
        if not (path / file).is_file():
            what = "is not a regular file" if (path / file).exists() else "is missing"
            raise CheckpointError(f"{file}: {what}")
        try:
            with safe_open(str(path / file), framework="np") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a dict)
                    part = stored.get_slice(name)
                    if name in found:
                        raise CheckpointError(f"{name} is in {found[name].file} and in {file}")
                    found[name] = HfTensor(file, name, str(part.get_dtype()), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise CheckpointError(f"{file}: not a whole safetensors file ({reason})") from None
    return found


def _matched(fmt: HuggingFaceFormat, config: Any, stored: Mapping[str, HfTensor]) -> dict[str, HfTensor]:
    """Octavo's name -> tensor; every tensor must be the model's, and all of the model there."""
    names, shapes = fmt.names(config), fmt.shapes(config)
    missing = [name for name in names.values() if name not in stored]
    expected = set(names.values())
    extra = [name for name in stored if name not in expected and not fmt.is_unused(config, name)]
    here = {name: stored[hf_name] for name, hf_name in names.items() if hf_name in stored}
    misshapen = [
        f"{tensor.name} is {list(tensor.shape)} where {CONFIG_FILE} asks for {list(shapes[name])}"
        for name, tensor in here.items()
        if tensor.shape != shapes[name]
    ]
    strange = [f"{tensor.name} is {tensor.dtype}" for tensor in here.values() if tensor.dtype not in FLOATS]
    faults = {"missing": missing, "not expected": extra, "wrong shape": misshapen}
    faults[f"not one of {', '.join(FLOATS)}"] = strange
    lines = [f"{kind}: {_some(found)}" for kind, found in faults.items() if found]
    if lines:
        shown = "\n  ".join(lines[:2])
        raise CheckpointError(f"its tensors are not those of {CONFIG_FILE}'s model\n  {shown}")
    return here


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.name}: is {'not a regular file' if path.exists() else 'missing'}")
    try:
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise CheckpointError(f"{path.name}: is larger than {_LARGEST_JSON_BYTES:,} bytes")
        return parse_json(path.name, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from None


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a model, RoPE's scaling flattened."""
    scaling = settings.get("rope_scaling") or {"rope_type": "default"}
    plain = {k: v for k, v in settings.items() if k != "rope_scaling" and k not in _FREE_SETTINGS}
    return {**plain, **{f"rope_scaling.{key}": value for key, value in scaling.items()}}


def _some(items: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
