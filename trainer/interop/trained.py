"""A trained model, whatever holds it: a run folder, a step-N folder, or a Hugging Face folder.

    trained = open_trained("outputs/debug_model")       sizes, dtypes, tokenizer; no tensor is read yet
    model = load_model(trained, torch.bfloat16, devices)

What generates, evaluates and exports begins here. Of a run folder the newest valid step is taken; what a
run saved in Hugging Face's format (``step-N-hf``) counts as a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import MODELS
from models.spec import ModelSpec
from trainer.checkpoint import folders
from trainer.checkpoint.files import CheckpointError
from trainer.checkpoint.integrity import verify_files
from trainer.checkpoint.manifest import Manifest, open_checkpoint
from trainer.checkpoint.reader import TORCH_DTYPES, read_tensors
from trainer.checkpoint.state import model_tensors
from trainer.data.tokenizer import Tokenizer, build_tokenizer, find_tokenizer_file
from trainer.interop.hf_folder import is_hf_folder, open_hf_folder, stop_ids
from trainer.interop.hf_read import read_hf

HF_SUFFIX = "-hf"
"""Ending of the folder that a run writes as Hugging Face's: ``step-1000-hf``."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """Weights on disk and what is known of them."""

    path: Path
    model_name: str
    config: Any
    """The architecture; max_seq_len is what it was trained (or published) for."""
    settings: Mapping[str, Any]
    """Every setting of the run that saved it, flat; empty for a Hugging Face folder."""
    dtypes: Mapping[str, str]
    """FQN -> dtype as stored, by its safetensors name."""
    assets: str | None
    """Where its tokenizer was; None where it has none."""
    fingerprint: str | None
    """Of the tokenizer that it was trained with, where that is known."""
    fill: Callable[[Mapping[str, Tensor]], None]
    """Fills tensors by FQN, in place."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a text, beside the tokenizer's own: a chat model's end of turn, say."""

    @property
    def spec(self) -> ModelSpec:
        """The model's row."""
        return MODELS[self.model_name]

    def whole(self, fqn: str) -> Tensor:
        """One tensor in its stored dtype, on the host."""
        shape = self.spec.huggingface.shapes(self.config)[fqn]  # type: ignore[union-attr]
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[self.dtypes[fqn]])
        self.fill({fqn: tensor})
        return tensor


@dataclass(frozen=True)
class LoadedModel:
    """A trained model in memory."""

    model: nn.Module
    spec: ModelSpec
    device: torch.device
    """Where tokens go in; blocks may lie on others too."""
    where: str
    """Devices and dtype, in words."""

    @property
    def document_mask(self) -> bool:
        """Whether attention keeps to a packed document."""
        return getattr(self.model.config, "attn_mask_type", "causal") == "document"


def open_trained(path: str, step: int | None = None) -> TrainedModel:
    """Find a trained model at `path`, and verify it.

    Args:
        path: A run folder, the folder with its steps, a step-N folder or a Hugging Face folder.
        step: Which step of a run; None for the newest valid one.

    Raises:
        ValueError: nothing is there.
        CheckpointError: what is there is not valid, or no model that this version knows.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        raise ValueError(f"{path}: no such folder")
    place = place.resolve()
    alone = folders.step_of(place.name) is not None or is_hf_folder(place)
    if alone and step is not None:
        raise ValueError(f"step = {step} has no effect: {path} is one checkpoint")
    if alone:
        return _open_one(place)
    candidates = _steps(place)
    if not candidates:
        raise ValueError(
            f"{path}: no trained model there\n"
            "  give a run folder, a step-N folder or a Hugging Face folder (config.json, safetensors)"
        )
    if step is not None:
        if step not in candidates:
            raise ValueError(f"{path}: no step {step}; it has {', '.join(map(str, sorted(candidates)))}")
        return _open_one(candidates[step])
    for number in sorted(candidates, reverse=True):
        try:
            return _open_one(candidates[number])
        except CheckpointError as error:
            log.warning("skipped %s", error)
    raise CheckpointError(f"{path}: none of its {len(candidates)} checkpoints can be used")


def tokenizer_path(trained: TrainedModel, given: str | None) -> Path | None:
    """The file of the model's tokenizer: `given`, or where it was; None where the model has none.

    Raises:
        ValueError: it is not there, or it is another one than the model was trained with.
    """
    where = trained.assets if given is None else given
    if where is None:
        return None
    try:
        file = find_tokenizer_file(where)
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{trained.path}: {first}\n  name the model's tokenizer with --tokenizer") from None
    if trained.fingerprint is not None and build_tokenizer(file).fingerprint != trained.fingerprint:
        raise ValueError(
            f"{file}: is not the tokenizer that {trained.path} was trained with\n"
            "  name that one with --tokenizer"
        )
    return file


def tokenizer_of(trained: TrainedModel, given: str | None) -> Tokenizer:
    """The model's tokenizer, loaded and checked against its vocabulary.

    Raises:
        ValueError: there is none, or it does not fit.
    """
    file = tokenizer_path(trained, given)
    if file is None:
        raise ValueError(f"{trained.path} has no tokenizer\n  name the model's with --tokenizer")
    tokenizer = build_tokenizer(file)
    if tokenizer.vocab_size > trained.config.vocab_size:
        raise ValueError(
            f"{file} has {tokenizer.vocab_size} ids, the model {trained.config.vocab_size}\n"
            "  name the model's tokenizer with --tokenizer"
        )
    return tokenizer


def load_on(
    trained: TrainedModel,
    dtype: str = "auto",
    device: str = "auto",
    *,
    cached_tokens: int = 0,
    max_seq_len: int | None = None,
    most_devices: int | None = None,
) -> LoadedModel:
    """Load a model onto the devices it needs.

    Args:
        trained: Of `open_trained`.
        dtype: Of the weights in memory; auto is float32 on a CPU and bfloat16 on GPUs.
        device: auto, cpu or cuda.
        cached_tokens: Tokens whose keys and values will be kept, over the whole batch.
        max_seq_len: As for `load_model`.
        most_devices: Devices to use at most; None for all.

    Raises:
        ValueError: there is no GPU, and one was asked for.
    """
    free = [] if device == "cpu" else gpu_free_bytes()[:most_devices]
    if device == "cuda" and not free:
        raise ValueError("device = 'cuda': no GPU is visible; use auto or cpu")
    kind = ("bfloat16" if free else "float32") if dtype == "auto" else dtype
    element = getattr(torch, kind).itemsize
    sizes = trained.spec.flop_inputs(trained.config)
    cache = 2 * sizes.n_layers * sizes.n_heads * sizes.head_dim * cached_tokens  # an upper bound: no GQA
    devices = choose_devices(element * (sizes.parameters + cache), free)
    model = load_model(trained, getattr(torch, kind), devices, max_seq_len)
    name = torch.cuda.get_device_name(devices[0]) if free else "cpu"
    where = f"{len(devices)} x {name}, {kind}" if len(devices) > 1 else f"{name}, {kind}"
    return LoadedModel(model, trained.spec, devices[0], where)


def load_model(
    trained: TrainedModel, dtype: torch.dtype, devices: Sequence[torch.device], max_seq_len: int | None = None
) -> nn.Module:
    """Build the model and read its weights, tensor by tensor, to where they belong.

    Args:
        trained: Of `open_trained`.
        dtype: Of the parameters; RoPE tables stay in fp32.
        devices: The blocks are spread over them in order; the rest lies on the first.
        max_seq_len: Length of the RoPE tables; None for the model's own.
    """
    config = trained.config if max_seq_len is None else replace(trained.config, max_seq_len=max_seq_len)
    with torch.device("meta"):
        model = trained.spec.build(config).to(dtype)
    _allocate(model, trained.spec.blocks, devices)
    trained.fill(model_tensors(model))
    return model.eval().requires_grad_(False)


def choose_devices(needed_bytes: int, free_bytes: Sequence[int]) -> list[torch.device]:
    """The CPU where there is no GPU; else as few of the GPUs, in order, as the model fits on.

    Args:
        needed_bytes: Weights and caches.
        free_bytes: Free memory of each GPU.
    """
    if not free_bytes:
        return [torch.device("cpu")]
    for count in range(1, len(free_bytes) + 1):
        # Equal shares, with a tenth left for activations.
        if needed_bytes / count <= 0.9 * min(free_bytes[:count]):
            break
    return [torch.device("cuda", index) for index in range(count)]


def gpu_free_bytes() -> list[int]:
    """Free memory of each visible GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.mem_get_info(index)[0] for index in range(count)]


def _allocate(model: nn.Module, blocks: str, devices: Sequence[torch.device]) -> None:
    """Give a model on ``meta`` memory, not yet filled; weights that are one stay one."""
    first: dict[int, str] = {}
    same = {n: first.setdefault(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)}
    for name, child in model.named_children():
        if name != blocks:
            child.to_empty(device=devices[0])
            continue
        count = len(list(child.children()))
        for index, block in enumerate(child.children()):
            block.to_empty(device=devices[index * len(devices) // count])
    for name, original in same.items():
        if name != original:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(original))


def _steps(place: Path) -> dict[int, Path]:
    """Step -> folder, of a run or of the folder with its steps."""
    found: dict[int, Path] = {}
    for folder in (place, *sorted(p for p in place.iterdir() if p.is_dir() and not p.is_symlink())):
        for candidate in sorted(folder.glob(f"step-*{HF_SUFFIX}")) if folder.is_dir() else []:
            step = folders.step_of(candidate.name.removesuffix(HF_SUFFIX))
            if step is not None and candidate.is_dir():
                found[step] = candidate
        own = {step: path for step, path in folders.step_folders(folder) if isinstance(path, Path)}
        found.update(own)
        if found:
            return found
    return found


def _open_one(folder: Path) -> TrainedModel:
    if is_hf_folder(folder):
        hf = open_hf_folder(folder)
        dtypes = {fqn: tensor.dtype for fqn, tensor in hf.tensors.items()}
        assets: str | None = str(folder)
        try:
            find_tokenizer_file(str(folder))
        except ValueError:
            assets = None
        return TrainedModel(
            folder,
            hf.model_name,
            hf.config,
            {},
            dtypes,
            assets,
            None,
            lambda targets: read_hf(hf, targets),
            stop_ids(folder),
        )
    try:
        records, manifest = open_checkpoint(folder)
        verify_files(folder, records)
        model_name, config = architecture(manifest.config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None

    def fill(targets: Mapping[str, Tensor]) -> None:
        try:
            read_tensors(folder, manifest, {f"model.{fqn}": target for fqn, target in targets.items()})
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None

    dtypes = {fqn: entry.dtype for fqn, entry in manifest.under("model").items()}
    settings = manifest.config
    assets = settings.get("model.hf_assets_path")
    assets = assets if isinstance(assets, str) else None
    return TrainedModel(folder, model_name, config, settings, dtypes, assets, _fingerprint(manifest), fill)


def architecture(settings: Mapping[str, Any]) -> tuple[str, Any]:
    """Row of the MODELS table and sizes that a run's flat settings describe.

    Raises:
        CheckpointError: they describe no model that this version has.
    """
    name, flavor = settings.get("model.name"), settings.get("model.flavor")
    spec = MODELS.get(name) if isinstance(name, str) else None
    if spec is None or not isinstance(flavor, str) or flavor not in spec.flavors:
        raise CheckpointError(f"is of a model that this version does not have ({name!r}, flavor {flavor!r})")
    start = "model.overrides."
    given = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
    longest = [settings.get("training.seq_len")]
    if settings.get("validation.enable"):
        longest.append(settings.get("validation.seq_len"))
    lengths = [length for length in longest if type(length) is int and length > 0]
    values = {"max_seq_len": max(lengths), **given} if lengths else given
    try:
        config = replace(spec.flavors[flavor], **values)
        wrong = spec.problems(config)
    except (TypeError, ValueError, ZeroDivisionError):
        raise CheckpointError("the model's settings in its manifest are malformed") from None
    if wrong:
        raise CheckpointError(f"the model's settings in its manifest: {wrong[0][0]} {wrong[0][1]}")
    return name, config  # type: ignore[return-value]


def _fingerprint(manifest: Manifest) -> str | None:
    found = manifest.dataloader.get("tokenizer")
    return found if isinstance(found, str) else None
