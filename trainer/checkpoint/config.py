"""The [checkpoint] section. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

PARTS = ("optimizer", "lr_scheduler", "dataloader", "train_state")
"""What `exclude_from_loading` may name. train_state: step, tokens seen."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, when, and what a run starts from."""

    enable: bool = False
    """Save checkpoints, and resume from the newest one in the folder."""
    enable_ft_dataloader_checkpoints: bool = True
    """Per-replica data positions for replicated fault tolerance."""
    folder: str = "checkpoint"
    """Subfolder of job.dump_folder, or a URL that fsspec opens (s3://bucket/run)."""
    interval: int = field(default=500, metadata={"min": 1})
    """Steps between saves."""
    interval_minutes: float = field(default=0.0, metadata={"min": 0.0})
    """Save also when this much time has passed since the last save; 0 is never."""
    initial_load_path: str | None = None
    """Checkpoint to start from while the folder has none: a folder, or a URL that fsspec opens."""
    initial_load_model_only: bool = True
    """Take only the model's weights from it."""
    initial_load_in_hf: bool = False
    """It is a Hugging Face folder of safetensors (without a path: model.hf_assets_path)."""
    initial_load_in_hf_quantized: bool = False
    """Its weights are block-quantized float8; refused, since no model here is published so."""
    last_save_model_only: bool = False
    """Drop optimizer and data position from the final save, which then cannot be continued exactly."""
    last_save_in_hf: bool = False
    """Write the final save as a Hugging Face folder, step-N-hf; needs last_save_model_only."""
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Dtype of a model-only final save."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Whether training goes on while a save is written."""
    keep_latest_k: int = field(default=10, metadata={"min": 0})
    """Checkpoints kept; 0 keeps all, 1 is refused."""
    load_step: int = field(default=-1, metadata={"min": -1})
    """Step to resume from; -1 is the newest."""
    exclude_from_loading: list[str] = field(default_factory=list)
    """Parts of the state not to load: optimizer, lr_scheduler, dataloader, train_state."""
    accept_model_changes: bool = False
    """Resume although settings that decide what the weights compute (rope_theta, say) have changed."""
    enable_first_step_checkpoint: bool = False
    """Save after step 1 too, to learn early whether saving works."""
    create_seed_checkpoint: bool = False
    """Write the initial model as step 0 and exit."""
    load_only: bool = False
    """Load but never save."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What cannot work within this section."""
        from trainer.checkpoint.remote import check_protocol, is_url
        from trainer.config.errors import unknown

        for name in ("folder", "initial_load_path"):
            place = getattr(self, name) or ""
            if is_url(place):
                try:
                    check_protocol(place)
                except ValueError as error:
                    yield name, str(error)
        folder = PurePath(self.folder)
        if "://" not in self.folder and (
            folder.is_absolute() or ".." in folder.parts or folder == PurePath(".")
        ):
            yield "folder", f"got {self.folder!r}; allowed: a name below job.dump_folder"
        for name in self.exclude_from_loading:
            if name not in PARTS:
                yield "exclude_from_loading", unknown("part of the state", name, PARTS)
