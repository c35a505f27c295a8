"""The sections that belong to the run itself. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class JobSection:
    """The run: where its config comes from and where its output goes."""

    config_file: str | None = None
    """TOML file to read; run_train.sh passes CONFIG_FILE."""
    dump_folder: str = "./outputs"
    """The run folder: everything a run writes lies below it."""
    description: str = "default job"
    """Free text, logged at the start."""
    print_config: bool = False
    """Log the resolved config as JSON at the start."""
    save_config_file: str | None = None
    """File below dump_folder for the resolved config as JSON (config.toml is always written)."""
    custom_config_module: str = ""
    """Dotted module with a `JobConfig` dataclass whose fields are merged into the built-in sections."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What cannot work within this section."""
        if self.save_config_file and (
            self.save_config_file.startswith("/") or ".." in self.save_config_file.split("/")
        ):
            yield "save_config_file", f"got {self.save_config_file!r}; it must lie below job.dump_folder"


@dataclass(frozen=True)
class DataLoaderSection:
    """How batches are prepared ahead of the step."""

    num_workers: int = field(default=0, metadata={"min": 0})
    """Threads of each rank that tokenize text; 0 shares the host's cores among its ranks."""
    persistent_workers: bool = False
    """Kept for old files: the background thread lives as long as the run."""
    pin_memory: bool = False
    """Kept for old files: host batches are pinned whenever the device is a GPU."""
    prefetch_factor: int | None = field(default=None, metadata={"min": 1})
    """Batches prepared ahead; unset chooses."""


@dataclass(frozen=True)
class TrainingConfig:
    """What a step is: data, batch, length, precision."""

    dataset: str = "python_sources"
    """Row of the DATASETS table; the default is the Python standard library's own sources."""
    dataset_path: str | None = None
    """Local file, folder or glob (or Hugging Face id) in place of the dataset's own location."""
    text_field: str = "text"
    """Field of a JSON line, or column, that holds the text."""
    mixture: list[str] = field(default_factory=list)
    """Several datasets in place of `dataset`: entries NAME[:PATH][#FIELD]=WEIGHT, weights as shares of the
    windows."""
    bad_data: Literal["refuse", "skip"] = "refuse"
    """What becomes of records and files that cannot be read (bad UTF-8, JSON, no text field): an error, or
    left out, counted and named in the log."""
    add_bos: bool = True
    """Put the tokenizer's bos before every document, where it has one."""
    add_eos: bool = True
    """Put the tokenizer's eos after every document."""
    local_batch_size: int = field(default=8, metadata={"min": 1})
    """Sequences per data-parallel rank in one micro-batch."""
    global_batch_size: int = field(default=-1, metadata={"min": -1})
    """Sequences per step over all ranks; -1 is one micro-batch a rank, more accumulates gradients."""
    seq_len: int = field(default=2048, metadata={"min": 1})
    """Tokens per sequence."""
    max_norm: float = field(default=1.0, metadata={"min": 0.0})
    """Gradients are clipped to this global L2 norm; 0 switches clipping off."""
    steps: int = field(default=10000, metadata={"min": 1})
    """Optimizer steps to train for."""
    max_minutes: float | None = field(default=None, metadata={"above": 0.0})
    """Save and stop before so much time has passed since the launcher's start; exit code 75."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the master parameters."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype that weights are cast to for forward and backward."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Dtype in which gradients are summed over ranks."""
    loss_kernel: Literal["auto", "torch", "fused"] = "auto"
    """Cross-entropy by PyTorch (compiled where `compile` says so), or by kernels that write the logits'
    gradient over the logits and keep nothing else of their size; `auto` takes these on a GPU."""
    loss_chunk_tokens: int = field(default=0, metadata={"min": 0})
    """Output and loss of about so many tokens at a time, gradients at once, so that the logits never exist
    whole; 0 takes a micro-batch as it is."""
    gc_freq: int = field(default=50, metadata={"min": 1})
    """Steps between Python garbage collections, which are otherwise off so that ranks pause together."""
    gc_debug: bool = False
    """Report reference cycles at each collection; slow."""
    dataloader: DataLoaderSection = field(default_factory=DataLoaderSection)
    """How batches are prepared."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What cannot work within this section."""
        if self.global_batch_size == 0:
            yield "global_batch_size", "got 0; allowed: -1 (one micro-batch per rank) or 1 and more"


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out text during the run."""

    enable: bool = False
    """Run validation at step 1 and every `freq` steps."""
    dataset: str = "python_sources_validation"
    """Row of the DATASETS table; the default is the part of the Python sources held out of training."""
    dataset_path: str | None = None
    """Local file, folder or glob (or Hugging Face id) in place of the dataset's own location."""
    text_field: str = "text"
    """Field of a JSON line, or column, that holds the text."""
    local_batch_size: int = field(default=8, metadata={"min": 1})
    """Sequences per data-parallel rank."""
    seq_len: int = field(default=2048, metadata={"min": 1})
    """Tokens per sequence."""
    freq: int = field(default=10, metadata={"min": 1})
    """Steps between validations."""
    steps: int = field(default=-1, metadata={"min": -1})
    """Batches per validation; -1 is the whole set, the same number on every rank."""
    dataloader: DataLoaderSection = field(default_factory=DataLoaderSection)
    """How batches are prepared."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What cannot work within this section."""
        if self.steps == 0:
            yield "steps", "got 0; allowed: -1 (the whole set) or 1 and more"


@dataclass(frozen=True)
class DebugConfig:
    """Seeds and switches for finding out."""

    seed: int | None = field(default=None, metadata={"min": 0})
    """Seed of weights and data order; unset draws one, which is logged and kept in the run folder."""
    deterministic: bool = False
    """Use deterministic algorithms only, so that equal runs are equal bit for bit."""
    deterministic_warn_only: bool = False
    """Warn rather than stop where an operation has no deterministic form."""
    moe_force_load_balance: bool = False
    """Route tokens to experts in turn, for performance tests."""


@dataclass(frozen=True)
class MemoryEstimationConfig:
    """Torchtitan's memory-tracking script; Octavo plans memory instead."""

    enable: bool = False
    """Estimate memory rather than train."""
    disable_fake_mode: bool = False
    """Estimate on real tensors."""


@dataclass(frozen=True)
class FaultToleranceConfig:
    """Replica groups that come and go (torchft)."""

    enable: bool = False
    """Train in replica groups."""
    process_group: Literal["gloo", "nccl"] = "gloo"
    """Backend between replica groups."""
    process_group_timeout_ms: int = field(default=10000, metadata={"min": 1})
    """Timeout between replica groups."""
    replica_id: int = field(default=0, metadata={"min": 0})
    """This replica group."""
    group_size: int = field(default=0, metadata={"min": 0})
    """Number of replica groups."""
    min_replica_size: int = field(default=1, metadata={"min": 1})
    """Replica groups without which no step is taken."""
    semi_sync_method: str | None = None
    """LocalSGD or DiLoCo."""


@dataclass(frozen=True)
class ExperimentalConfig:
    """The door for a user's own parts."""

    custom_import: str = ""
    """Dotted module whose MODELS, CONVERTERS and DATASETS tables are merged into the built-in ones."""
