"""The sections that say how a model is spread, recomputed and compiled. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ParallelismConfig:
    """Degrees of the device mesh and how each axis is used."""

    data_parallel_replicate_degree: int = field(default=1, metadata={"min": 1})
    """Replicas of the whole (or sharded) model: DDP alone, HSDP together with sharding."""
    data_parallel_shard_degree: int = field(default=-1, metadata={"min": -1})
    """FSDP2 shards; -1 takes all devices that the other degrees leave."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free a unit's gathered weights after its forward; `default` does so unless pipelined, or there is one
    shard alone and the next two are not `torch` and `copy`: then they are cast once a step, not twice."""
    fsdp_reduce_scatter: Literal["auto", "torch", "compute_pool", "bfloat16_wire"] = "auto"
    """Where sharded gradients lie and how they travel: in a memory pool of their own (`torch`), in that of
    the computation, or there after travelling in bf16; the sum is fp32 in all three. `auto`: on GPUs the last
    where it can be."""
    fsdp_transport: Literal["auto", "nccl", "copy_engine"] = "nccl"
    """Move gradients (with `bfloat16_wire`), and weights that are not resharded, by NCCL's kernels, or by
    copies between the GPUs of one host, which hold no multiprocessors; `auto` copies where it can."""
    fsdp_single_shard: Literal["auto", "copy", "direct"] = "auto"
    """On one device alone: gather and reduce as on many (`copy`), or keep a bf16 copy of the weights over
    steps and take gradients from where backward left them (`direct`); `auto` does on a GPU where it can."""
    tensor_parallel_degree: int = field(default=1, metadata={"min": 1})
    """Devices that share each matrix, with sequence-parallel norms between them."""
    disable_loss_parallel: bool = False
    """Gather vocabulary-sharded logits before the loss rather than computing it sharded."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel collectives with matmuls through symmetric memory; needs compile."""
    pipeline_parallel_degree: int = field(default=1, metadata={"min": 1})
    """Ranks that the layers are cut over."""
    module_fqns_per_model_part: list[list[str]] | None = None
    """Explicit module names per pipeline stage, in place of the automatic split."""
    pipeline_parallel_first_stage_less_layers: int = field(default=1, metadata={"min": 0})
    """Layers that the first stage gives up in exchange for the embedding."""
    pipeline_parallel_last_stage_less_layers: int = field(default=1, metadata={"min": 0})
    """Layers that the last stage gives up in exchange for norm and output."""
    pipeline_parallel_layers_per_stage: int | None = field(default=None, metadata={"min": 1})
    """Layers per virtual stage; unset means one stage (or two, by schedule) per rank."""
    pipeline_parallel_schedule: Literal[
        "1F1B",
        "GPipe",
        "Interleaved1F1B",
        "LoopedBFS",
        "InterleavedZeroBubble",
        "ZBVZeroBubble",
        "DualPipeV",
        "PipelineScheduleSingle",
        "PipelineScheduleMulti",
    ] = "1F1B"
    """Order of forward and backward micro-batches over the stages."""
    pipeline_parallel_schedule_csv: str = ""
    """File with a custom schedule, for PipelineScheduleMulti."""
    pipeline_parallel_microbatch_size: int = field(default=1, metadata={"min": 1})
    """Sequences per pipeline micro-batch."""
    pipeline_parallel_expert_parallel_overlap: bool = True
    """Overlap expert communication with compute under DualPipeV."""
    context_parallel_degree: int = field(default=1, metadata={"min": 1})
    """Devices that share each sequence (ring attention)."""
    context_parallel_load_balancer: Literal["headtail", "ptrr"] | None = "headtail"
    """How causal work is evened out over context-parallel ranks; `none` leaves it uneven."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """How keys and values travel between context-parallel ranks."""
    expert_parallel_degree: int = field(default=1, metadata={"min": 1})
    """Devices that share the experts of a mixture-of-experts model."""
    expert_tensor_parallel_degree: int = field(default=1, metadata={"min": 1})
    """Tensor parallelism inside experts: 1, or the tensor-parallel degree."""
    expert_parallel_comm_backend: Literal["standard", "deepep"] = "standard"
    """Library for the experts' all-to-all."""

    def reshards_after_forward(self, shards: int) -> bool:
        """Whether gathered weights are freed after forward, where a parameter has this many shards.

        A pipeline gathers once for all micro-batches. Of one shard, the "gathered" weights are a cast copy of
        2 bytes a parameter, which backward frees while gradients grow in the same pool.
        """
        if self.fsdp_reshard_after_forward != "default":
            return self.fsdp_reshard_after_forward == "always"
        alone = shards == 1 and (self.fsdp_reduce_scatter != "torch" or self.fsdp_single_shard == "direct")
        return self.pipeline_parallel_degree == 1 and not alone

    def problems(self) -> Iterator[tuple[str, str]]:
        """What cannot work within this section."""
        if self.data_parallel_shard_degree == 0:
            yield "data_parallel_shard_degree", "got 0; allowed: -1 (all remaining devices) or 1 and more"


@dataclass(frozen=True)
class ActivationCheckpointConfig:
    """What is recomputed in backward rather than kept."""

    mode: Literal["selective", "full", "memory_budget", "none", "auto"] = "selective"
    """Nothing, every block, chosen blocks or ops, or what a memory budget asks for; `auto` takes the least
    that fits the device's memory by `octavo plan`."""
    selective_ac_option: str = "2"
    """For `selective`: an integer n recomputes every n-th block, `op` keeps the costly ops of every block,
    and every second of its matmuls, float8 ones included."""
    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = field(
        default_factory=lambda: ["moe.router.gate"]
    )
    """Linears (by part of their FQN) whose matmul is recomputed even under `op`."""
    early_stop: bool = False
    """Stop a block's recomputation as soon as the last tensor that backward needs is there."""
    memory_budget: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0})
    """For `memory_budget`: 0 recomputes all it can, 1 keeps everything; needs compile of the model."""
    visualize_memory_budget_pareto: bool = False
    """Write the compiler's memory-against-recompute curve to the run folder."""
    preserve_rng_state: bool = True
    """Restore the random state around recomputation; only matters to models that draw random numbers."""
    determinism_check: str = "default"
    """Compare shapes and types of recomputed tensors with the first ones: `default` or `none`."""
    debug: bool = False
    """Trace each recomputation; slow, for finding what differs."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What cannot work within this section."""
        option = self.selective_ac_option
        if option != "op" and not (option.isdecimal() and int(option) > 0):
            yield "selective_ac_option", f"got {option!r}; allowed: 'op' or a positive integer such as '2'"
        if self.determinism_check not in ("default", "none"):
            yield "determinism_check", f"got {self.determinism_check!r}; allowed: 'default', 'none'"


@dataclass(frozen=True)
class CompileConfig:
    """`torch.compile`, one block at a time and for the loss."""

    enable: bool = False
    """Compile the components named below."""
    components: list[str] = field(default_factory=lambda: ["model", "loss"])
    """What is compiled: `model` (each block on its own) and `loss`."""
    backend: str = "inductor"
    """Name of the dynamo backend."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What cannot work within this section."""
        unknown = [name for name in self.components if name not in ("model", "loss")]
        if unknown:
            yield "components", f"got {', '.join(unknown)}; allowed: model, loss"
        if self.enable and not self.components:
            yield "components", "is empty while compile.enable is on, so nothing would be compiled"


@dataclass(frozen=True)
class CommConfig:
    """Collectives: timeouts and what is recorded of them."""

    init_timeout_seconds: int = field(default=300, metadata={"min": 1})
    """Timeout of a collective until the end of step 1 (it waits for compile and first allocation)."""
    train_timeout_seconds: int = field(default=100, metadata={"min": 1})
    """Timeout of a collective after step 1."""
    trace_buf_size: int = field(default=20000, metadata={"min": 0})
    """Entries of NCCL's flight recorder; 0 switches it off."""
    save_traces_folder: str = "comm_traces"
    """Subfolder of the run folder for flight-recorder dumps."""
    save_traces_file_prefix: str = "rank_"
    """Prefix of the dump files; the rank follows."""
    mode: Literal["default", "fake_backend", "local_tensor"] = "default"
    """`default` talks to real ranks; `fake_backend` lets one process stand for all of them (dry run)."""
