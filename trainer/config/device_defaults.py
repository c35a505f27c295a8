"""What ``auto`` stands for in settings of speed and memory, on the device of a run.

    setting                                    on a GPU with Triton             elsewhere
    training.loss_kernel                       fused                            torch
    quantize.linear.float8.cast_kernels        triton                           torch
    quantize.linear.float8.saved_input         least in a compiled block, or    high_precision
                                               float8, where backward reads it
    quantize.linear.float8.keep_float8_shards  true, where it saves casts       false
    quantize.linear.float8.force_recompute_    true in a compiled block, of     false
      fp8_weight_in_bwd                        weights gathered in bf16
    parallelism.fsdp_single_shard              direct, where it may be          copy
    parallelism.fsdp_reduce_scatter            bfloat16_wire where gradients    torch
                                               are bf16, or compute_pool
    parallelism.fsdp_transport                 copy_engine where gradients      nccl
                                               travel so within one host

None changes results by more than the rounding of a sum. `docs/performance.md` has what was measured with
them. A setting that is given stays as it is, and others give way to it. `activation_checkpoint.mode`, whose
choice needs the device's memory, is resolved later by `trainer.plan.resolve`. Torch-free.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trainer.config.derived import batch_arithmetic, dp_shard_degree, model_config


def with_device_defaults(config: Any, *, kernels: bool, world_size: int, peers: bool = False) -> Any:
    """The config of a run with every ``auto`` of the table replaced.

    Args:
        config: Checked.
        kernels: Whether Triton kernels run on its devices.
        world_size: Processes.
        peers: They have a GPU each, on one host, that can use the others' memory.
    """
    training, compiles = config.training, config.compile
    if training.loss_kernel == "auto":
        asked = compiles.enable and compiles.components == ["loss"]  # for a compiled loss, and nothing else
        training = replace(training, loss_kernel="fused" if kernels and not asked else "torch")
    parallelism = _parallelism(config, kernels, world_size, peers)
    float8 = _float8(config, kernels)
    if float8.keep_float8_shards == "auto":
        keeps = kernels and _gathers_float8_again(config, parallelism, world_size)
        float8 = replace(float8, keep_float8_shards=keeps)
    linear = replace(config.quantize.linear, float8=float8)
    return replace(
        config,
        training=training,
        parallelism=parallelism,
        quantize=replace(config.quantize, linear=linear),
    )


def _float8(config: Any, kernels: bool) -> Any:
    section = config.quantize.linear.float8
    cast_kernels, saved_input = section.cast_kernels, section.saved_input
    if cast_kernels == "auto":
        wanted = kernels and not section.emulate
        cast_kernels = "triton" if wanted or saved_input in ("float8", "least") else "torch"
    if saved_input == "auto":
        reads = cast_kernels == "triton" and section.recipe_name != "rowwise_with_gw_hp"
        remade = "least" if _compiler_remakes_products(config) else "float8"
        saved_input = remade if reads else "high_precision"
    recompute = section.force_recompute_fp8_weight_in_bwd
    if recompute == "auto":
        keeps = _blocks_compiled(config) and not section.enable_fsdp_float8_all_gather
        recompute = keeps and kernels and cast_kernels == "triton"
    return replace(
        section,
        cast_kernels=cast_kernels,
        saved_input=saved_input,
        force_recompute_fp8_weight_in_bwd=recompute,
    )


def _blocks_compiled(config: Any) -> bool:
    return config.compile.enable and "model" in config.compile.components


def _compiler_remakes_products(config: Any) -> bool:
    """Whether a block's backward can compute the product that w2 reads from what w1 and w3 gave."""
    return _blocks_compiled(config) and getattr(model_config(config), "swiglu_kernel", "torch") != "fused"


def _gathers_float8_again(config: Any, parallelism: Any, world_size: int) -> bool:
    """Whether a weight that is cast for the float8 all-gather is gathered more than once a step."""
    if not config.quantize.linear.float8.enable_fsdp_float8_all_gather or config.training.enable_cpu_offload:
        return False
    shards = dp_shard_degree(config, world_size) * parallelism.context_parallel_degree
    if shards == 1:
        return False
    # A pipeline that does not free weights gathers once for all its micro-batches.
    accumulates = batch_arithmetic(config, world_size).gradient_accumulation_steps > 1
    again = accumulates and parallelism.pipeline_parallel_degree == 1
    return again or parallelism.reshards_after_forward(shards)


def _parallelism(config: Any, kernels: bool, world_size: int, peers: bool) -> Any:
    section, training = config.parallelism, config.training
    float8 = config.quantize.linear.float8
    pooled = kernels and training.dtype == "float32" and not training.enable_cpu_offload
    single, reduce_scatter = section.fsdp_single_shard, section.fsdp_reduce_scatter
    transport = section.fsdp_transport
    if single == "auto":
        alone = (
            pooled
            and world_size == 1
            and batch_arithmetic(config, 1).gradient_accumulation_steps == 1
            and training.mixed_precision_param == "bfloat16"
            and config.optimizer.implementation == "one_pass"
            and section.fsdp_reshard_after_forward != "always"
            and reduce_scatter == "auto"
            and float8.keep_float8_shards is not True
        )
        single = "direct" if alone else "copy"
    shards = dp_shard_degree(config, world_size) * section.context_parallel_degree
    if reduce_scatter == "auto" and transport == "copy_engine":
        reduce_scatter = "bfloat16_wire"
    elif reduce_scatter == "auto":
        narrow = training.mixed_precision_param == "bfloat16" and section.pipeline_parallel_degree == 1
        best = "bfloat16_wire" if shards > 1 and narrow else "compute_pool"
        reduce_scatter = best if pooled and single == "copy" else "torch"
    if transport == "auto":
        copies = peers and shards > 1 and reduce_scatter == "bfloat16_wire"
        transport = "copy_engine" if copies and not training.enable_cpu_offload else "nccl"
    return replace(
        section, fsdp_single_shard=single, fsdp_reduce_scatter=reduce_scatter, fsdp_transport=transport
    )
