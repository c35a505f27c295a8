"""Flags of runs whose memory is planned, and the plan; a step that is small enough to count by hand."""

from trainer.config.load import load
from trainer.metrics.devices import DEVICES
from trainer.plan.memory import StepShape, Unit
from trainer.plan.plan import make_plan

DEVICE = {device.key: device for device in DEVICES}
EIGHT_LAYERS = [
    "--model.flavor=8B",
    "--model.overrides.n_layers=8",
    "--training.local_batch_size=1",
    "--training.seq_len=8192",
    "--activation_checkpoint.mode=none",
    "--compile.enable",
]
FLOAT8 = ["--model.converters=float8", "--quantize.linear.float8.filter_fqns=output"]
ROWWISE = [*FLOAT8, "--float8.recipe_name=rowwise"]
WHOLE = ["--model.flavor=8B", "--training.local_batch_size=1", "--training.seq_len=8192"]
PER_OP = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]
NONE = ["--activation_checkpoint.mode=none"]
FULL = ["--activation_checkpoint.mode=full"]
TWO = ["--training.local_batch_size=2"]
BF16 = ["--training.dtype=bfloat16"]
GATHER = [*FLOAT8, "--quantize.linear.float8.enable_fsdp_float8_all_gather"]
COMPILE = ["--compile.enable"]
PRECOMPUTE = "--float8.precompute_float8_dynamic_scale_for_fsdp"
ONE_PASS = "--optimizer.implementation=one_pass"
NEVER = "--parallelism.fsdp_reshard_after_forward=never"
WIRE = "--parallelism.fsdp_reduce_scatter=bfloat16_wire"
NCCL = "--parallelism.fsdp_transport=nccl"
COPIES = "--parallelism.fsdp_transport=copy_engine"
IN_FLOAT8 = "--float8.saved_input=float8"
KEEP_TURNED = "--float8.no_force_recompute_fp8_weight_in_bwd"
FUSED = ["--model.overrides.norm_kernel=fused", "--model.overrides.swiglu_kernel=fused"]
FORMER = [
    "--training.loss_kernel=torch",
    "--float8.cast_kernels=torch",
    "--float8.no_keep_float8_shards",
    "--parallelism.fsdp_reduce_scatter=torch",
    "--parallelism.fsdp_single_shard=copy",
]
"""Of the runs whose memory was measured before there were kernels."""

EMBEDDING, NORMS, LINEARS = 525_336_576, 69_632, 1_744_830_464
"""Elements of eight layers of the 8B flavor: of the table, of all norms, of the blocks' linears."""

HAND_COUNTED = StepShape(
    units=(Unit("block", 200, 100, 50, False, 70, 30), Unit("head", 20, 10, 5, True, 8, 0)),
    parameter_bytes=220,
    optimizer_bytes=440,
    fsdp_degree=2,
    in_flight=1,
    accumulates=False,
    whole_gradients=False,
    logits_bytes=40,
    loss_forward_bytes=0,
    loss_saved_bytes=40,
    loss_backward_bytes=40,
    compute_bytes=2,
    master_bytes=4,
    offloaded=False,
)
"""Two units of 100 and 10 elements over 2 ranks."""


def plan(flags, world_size=1, device="h100"):
    return make_plan(load(flags, env={}), world_size, DEVICE[device])
