"""Chunked and fused losses, and fused kernels, train as the plain ones do, in every layout, over gloo."""

import pytest

from tests.integration.test_pipeline_parallel import VALIDATE, compare, pp, work

CHUNKS = "--training.loss_chunk_tokens=48"  # of 128 local tokens, or 32 of a pipeline's micro-batch
SMALL_CHUNKS = "--training.loss_chunk_tokens=16"
FUSED = "--training.loss_kernel=fused"
TIED = "--model.overrides.tied_output"
TP = "--parallelism.tensor_parallel_degree=2"
HALVED = [*VALIDATE, "--validation.steps=1", "--training.local_batch_size=2"]  # on each of two data ranks
COMPILED = ["--compile.enable", "--compile.backend=aot_eager"]
ROTARY = "--model.overrides.rope_kernel=fused"
KERNELS = ["--model.overrides.norm_kernel=fused", "--model.overrides.swiglu_kernel=fused", ROTARY]
PER_OP = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]


def test_chunks_and_the_fused_loss_follow_whole_logits(tmp_path):
    """Some labels are ignored; gradients accumulate; validation has another shape."""
    work(tmp_path, 1, {"one": VALIDATE, "one_compiled": [*VALIDATE, CHUNKS, *COMPILED]}, 3)
    runs = {
        "fsdp": [*HALVED, CHUNKS],
        "tp": [*VALIDATE, TP, CHUNKS, FUSED],
        "pp": [*VALIDATE, *pp("ZBVZeroBubble"), SMALL_CHUNKS],
    }
    outs = work(tmp_path, 2, runs, 3)
    assert "loss: output and cross-entropy of 48 tokens at a time" in outs[0]
    for name in ("one_compiled", *runs):
        compare(tmp_path, name, "one")


@pytest.mark.slow
def test_every_layout_and_form_of_loss(tmp_path):
    work(tmp_path, 1, {"one": VALIDATE, "tied": [TIED], "one_fused": [*VALIDATE, FUSED, *COMPILED]}, 4)
    runs = {
        "fsdp_compiled": [*HALVED, CHUNKS, *COMPILED],
        "fsdp_fused": [*HALVED, FUSED],
        "fsdp_kernels": [*HALVED, *KERNELS, *COMPILED, *PER_OP],
        "pp_kernels": [*VALIDATE, *KERNELS, *pp("Interleaved1F1B")],
        "pp_split_kernels": [*VALIDATE, *KERNELS[1:], *pp("ZBVZeroBubble")],
        "tp_kernels": [*VALIDATE, TP, *KERNELS[1:], *COMPILED],
        "cp_kernels": [*VALIDATE, "--parallelism.context_parallel_degree=2", *KERNELS],
        "tp": [*VALIDATE, TP, CHUNKS],
        "tp_fused": [*VALIDATE, TP, FUSED],
        "tp_gathered": [*VALIDATE, TP, "--parallelism.disable_loss_parallel", CHUNKS, FUSED],
        "cp": [*VALIDATE, "--parallelism.context_parallel_degree=2", CHUNKS],
        "pp": [*VALIDATE, *pp("1F1B"), SMALL_CHUNKS, FUSED],
        "pp_split_fused": [*VALIDATE, *pp("ZBVZeroBubble"), FUSED],
        "tied_fsdp": [TIED, CHUNKS],
        "tied_tp": [TIED, TP, CHUNKS, FUSED],
    }
    work(tmp_path, 2, runs, 4)
    for name in ("one_fused", *runs):
        compare(tmp_path, name, "tied" if name.startswith("tied") else "one")


@pytest.mark.slow
def test_chunks_in_four_processes(tmp_path):
    work(tmp_path, 1, {"one": []}, 6)
    runs = {
        "hsdp": ["--parallelism.data_parallel_replicate_degree=2", "--training.local_batch_size=1", CHUNKS],
        "fsdp_tp": [TP, HALVED[-1], CHUNKS, FUSED],
        "tp_pp": [TP, *pp("Interleaved1F1B"), SMALL_CHUNKS],
        "fsdp_pp": [*pp("InterleavedZeroBubble"), HALVED[-1], SMALL_CHUNKS, FUSED],
    }
    work(tmp_path, 4, runs, 6)
    for name in runs:
        compare(tmp_path, name, "one")
