"""The formulas against what real blocks save: their sizes are those of 8B, divided by 16."""

from dataclasses import replace

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes

from converters.base import ConverterContext
from converters.config import Float8SectionConfig
from converters.float8 import gemm
from converters.float8.converter import Float8Converter
from models.llama3.config import FLAVORS
from models.llama3.model import TransformerBlock
from models.llama3.spec import SPEC
from models.rope import RotaryEmbedding
from parallelisms.activation_checkpoint import apply_activation_checkpoint
from parallelisms.config import ActivationCheckpointConfig
from tests.parallelisms.kept import kept_tensors, policies_recorded
from trainer.config.load import load
from trainer.plan.auto import requested
from trainer.plan.layout import build_layout
from trainer.plan.memory_shape import block_memory
from trainer.plan.shapes import read_model

TOKENS, WIDTH = 512, 256
SIZES = {"dim": WIDTH, "n_heads": 8, "n_kv_heads": 8, "ffn_hidden_dim": 896, "vocab_size": 64, "n_layers": 2}


FUSED = {"norm_kernel": "fused", "swiglu_kernel": "fused", "rope_kernel": "fused"}


def inductors_partition(module, inputs, **options):
    """How inductor divides a graph of forward and backward, after the passes that it runs on it."""
    joint_graph_passes(module)
    return min_cut_rematerialization_partition(module, inputs, compiler="inductor", **options)


def saved_by_the_block(recompute, recipe, compiled, kernels=None, saved_input=None):
    """{dtype: bytes} that a real block keeps between forward and backward, its weights left out."""
    if compiled and recipe and "rowwise" in recipe and not gemm.CPU_HAS_ROW_SCALES:
        pytest.skip("the converter refuses it on a CPU before torch 2.13")
    torch._dynamo.reset()
    config = replace(FLAVORS["8B"], **SIZES, **(kernels or {}))
    rope = RotaryEmbedding(32, TOKENS, 500000.0, fused=config.rope_kernel == "fused")
    block = TransformerBlock(0, config, rope)
    model = nn.ModuleDict({"layers": nn.ModuleDict({"0": block})})
    ops = ()
    if recipe:
        converter = Float8Converter(
            Float8SectionConfig(
                recipe_name=recipe,
                saved_input=saved_input or "auto",
                cast_kernels="triton" if saved_input else "auto",
            ),
            ConverterContext("cpu", TOKENS, compile_model=compiled, roles=SPEC.roles),
        )
        converter.convert(model)
        ops = converter.ops_to_save()
    model.to(torch.bfloat16)
    apply_activation_checkpoint(model, "layers", recompute, ops)
    if compiled:
        # The partitioner that inductor uses, without its code generation.
        backend = "aot_eager_decomp_partition"
        if saved_input:
            backend = aot_autograd(
                fw_compiler=nop, decompositions=select_decomp_table(), partition_fn=inductors_partition
            )
        block.compile(backend=backend, fullgraph=True)
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found = {}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (t.dtype, storage)
        return t

    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), policies_recorded() as contexts:
        block(x)
    if not compiled:
        for made in contexts:
            for t in kept_tensors(made):
                note(t)
    total = {}
    for dtype, storage in found.values():
        total[dtype] = total.get(dtype, 0) + storage.nbytes()
    return total


def planned(recompute, recipe, compiled, kernels=None, saved_input=None):
    flags = [f"--model.overrides.{key}={value}" for key, value in {**SIZES, **(kernels or {})}.items()]
    flags += ["--model.flavor=8B", f"--training.seq_len={TOKENS}", "--training.local_batch_size=1"]
    flags += ["--compile.enable"] * compiled
    if recipe:
        flags += [
            "--model.converters=float8",
            "--float8.filter_fqns=output",
            f"--float8.recipe_name={recipe}",
        ]
    if saved_input:
        flags += ["--float8.cast_kernels=triton", f"--float8.saved_input={saved_input}"]
    config = load(flags, env={}).config
    layout = build_layout(config, 1)
    mode = requested(recompute).of_layer(0)
    return block_memory(config, read_model(config, layout, "cpu"), layout).saved(mode)


PER_OP = ActivationCheckpointConfig(mode="selective", selective_ac_option="op")
KEEP = ActivationCheckpointConfig(mode="none")
FULL = ActivationCheckpointConfig(mode="full")


@pytest.mark.parametrize(
    ("recompute", "recipe"),
    [
        (KEEP, None),
        (PER_OP, None),
        (FULL, None),
        (KEEP, "tensorwise"),
        (PER_OP, "tensorwise"),
        pytest.param(PER_OP, "rowwise", marks=pytest.mark.slow),
        pytest.param(KEEP, "rowwise", marks=pytest.mark.slow),
        pytest.param(KEEP, "rowwise_with_gw_hp", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) or value is None else value.mode,
)
def test_compiled_blocks_save_what_is_planned(recompute, recipe, monkeypatch):
    # On a CPU a transposed copy is an opaque op, which the compiler must save; on a GPU it is fused.
    monkeypatch.setattr(gemm, "_row_major", lambda x: x if x.is_contiguous() else x.contiguous())
    saved = sum(saved_by_the_block(recompute, recipe, compiled=True).values())
    # Beside what the plan counts: a number or two per position (norms), a random state, scales.
    assert saved == pytest.approx(planned(recompute, recipe, compiled=True), rel=0.02)


@pytest.mark.parametrize("recipe", [None, "tensorwise"])
def test_eager_blocks_save_what_is_planned(recipe):
    """On a CPU a norm keeps fp32 copies of its input where a GPU's kernel keeps the input itself: x and h."""
    saved = saved_by_the_block(KEEP, recipe, compiled=False)
    log_sum_exp = 8 * TOKENS * 4
    stream = 2 * TOKENS * WIDTH
    assert saved[torch.bfloat16] + 2 * stream + log_sum_exp == planned(KEEP, recipe, compiled=False)


@pytest.mark.parametrize(
    ("recipe", "saved_input", "compiled"),
    [
        (None, None, False),
        ("tensorwise", None, False),
        ("tensorwise", "float8", False),
        ("tensorwise", "least", False),
        ("tensorwise", "float8", True),
        pytest.param("rowwise", "float8", True, marks=pytest.mark.slow),
        pytest.param("tensorwise", "least", True, marks=pytest.mark.slow),
        pytest.param("tensorwise", "high_precision", True, marks=pytest.mark.slow),
    ],
)
def test_per_op_keeps_what_is_planned(recipe, saved_input, compiled):
    """Where casts are kept, those that a matmul which is computed again reads too."""
    saved = sum(saved_by_the_block(PER_OP, recipe, compiled, saved_input=saved_input).values())
    expected = planned(PER_OP, recipe, compiled, saved_input=saved_input)
    assert saved == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("compiled", [True, False])
def test_fused_kernels_keep_what_is_planned(compiled, monkeypatch):
    monkeypatch.setattr(gemm, "_row_major", lambda x: x if x.is_contiguous() else x.contiguous())
    saved = sum(saved_by_the_block(KEEP, "tensorwise", compiled, FUSED).values())
    assert saved == pytest.approx(planned(KEEP, "tensorwise", compiled, FUSED), rel=0.02)


@pytest.mark.parametrize(
    ("saved_input", "kernels", "compiled"),
    [
        ("least", None, True),
        ("float8", None, True),
        pytest.param("high_precision", None, True, marks=pytest.mark.slow),
        pytest.param("least", FUSED, True, marks=pytest.mark.slow),
        ("float8", None, False),
        ("least", None, False),
    ],
)
def test_saved_inputs_are_what_is_planned(saved_input, kernels, compiled):
    """With least neither the product nor a cast of it, and attention's output once."""
    found = saved_by_the_block(KEEP, "tensorwise", compiled, kernels, saved_input)
    casts = {
        "high_precision": TOKENS * (2 * WIDTH + 896) * compiled,
        "float8": TOKENS * (3 * WIDTH + 896 if compiled else 6 * WIDTH + 896),
        "least": TOKENS * (2 if compiled else 5) * WIDTH,
    }[saved_input]
    weights = 4 * WIDTH**2 + 3 * WIDTH * 896 if compiled else 0
    assert found[torch.float8_e4m3fn] == casts + weights
    expected = planned(KEEP, "tensorwise", compiled, kernels, saved_input)
    if not compiled:
        # A CPU's norms keep fp32 copies of x and h in the place of these.
        assert found[torch.bfloat16] + casts + 4 * TOKENS * WIDTH + 8 * TOKENS * 4 == expected
    else:
        assert sum(found.values()) == pytest.approx(expected, rel=0.02)


def test_a_filtered_sibling_keeps_the_input_in_high_precision():
    flags = [
        "--model.flavor=8B",
        "--training.seq_len=8192",
        "--training.local_batch_size=1",
        "--compile.enable",
    ]
    flags += ["--model.converters=float8"]

    def kept(filters):
        config = load([*flags, f"--float8.filter_fqns={filters}"], env={}).config
        layout = build_layout(config, 1)
        return block_memory(config, read_model(config, layout, "cuda"), layout).saved("none")

    assert kept("output,wk,wv") - kept("output") == 2 * 8192 * 4096
    assert kept("output,w2") - kept("output") == 2 * 8192 * 14336
