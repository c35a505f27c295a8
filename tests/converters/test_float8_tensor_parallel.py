"""Float8 under tensor parallelism, two gloo processes against one: numbers, and the bytes that travel."""

import contextlib
import dataclasses
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from converters.base import ConverterContext
from converters.config import Float8SectionConfig
from converters.float8 import (
    Float8ColwiseParallel,
    Float8Linear,
    Float8LinearConfig,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
    convert_to_float8_training,
)
from converters.float8.converter import Float8Converter
from models import MODELS
from parallelisms.tensor_parallel import apply_tensor_parallel
from tests.ranks import run_ranks
from trainer.loss import cross_entropy_sum

SPEC = MODELS["llama3"]
LAYERS, DIM, BATCH, SEQ = 1, 64, 2, 32
CONFIG = dataclasses.replace(
    SPEC.flavors["debugmodel"],
    n_layers=LAYERS,
    dim=DIM,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=128,
    max_seq_len=SEQ,
)
TOKENS = torch.randint(0, 128, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
LABELS = TOKENS.roll(-1, 1)

CASES = {
    "tensorwise": {"filter_fqns": ["output"]},
    "with_output": {"filter_fqns": []},
    "wk_wv_filtered": {"filter_fqns": ["output", "wk", "wv"]},
    "power_of_2": {"filter_fqns": ["output"], "round_scales_to_power_of_2": True},
    "cast_kernels": {"filter_fqns": ["output"], "cast_kernels": "triton", "saved_input": "float8"},
    "least": {"filter_fqns": ["output"], "cast_kernels": "triton", "saved_input": "least"},
    "rowwise": {"filter_fqns": ["output"], "recipe_name": "rowwise"},
    "rowwise_with_gw_hp": {"filter_fqns": ["output"], "recipe_name": "rowwise_with_gw_hp"},
    "delayed": {
        "filter_fqns": ["output"],
        **{f"scaling_type_{tensor}": "delayed" for tensor in ("input", "weight", "grad_output")},
    },
}
COMPILED = ("tensorwise", "wk_wv_filtered", "cast_kernels", "least")


class Gathers(TorchDispatchMode):
    """Counts all-gathers of this rank, and the bytes that each gives away."""

    def __init__(self):
        super().__init__()
        self.calls, self.sent_bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it unpacks itself and comes again
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            kind = str(args[0].dtype).removeprefix("torch.")
            self.calls[kind] += 1
            self.sent_bytes[kind] += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def counting_backend(calls):
    """A backend that runs graphs as they are, and counts the gathers in them by dtype."""

    def count(graph, inputs):
        for node in graph.graph.nodes:
            if node.target is torch.ops._c10d_functional.all_gather_into_tensor.default:
                calls[str(node.args[0].meta["val"].dtype).removeprefix("torch.")] += 1
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=count)


def build(case, mesh=None, backend=None):
    section = Float8SectionConfig(**CASES[case])
    context = ConverterContext(device_type="cpu", tokens_per_microbatch=64, roles=SPEC.roles)
    converter = Float8Converter(section, context)
    with torch.device("meta"):
        model = SPEC.build(CONFIG)
    converter.convert(model)
    if mesh is not None:
        apply_tensor_parallel(model, SPEC.roles, mesh, style_for=converter.parallel_style)
    if backend is not None:
        for block in model.layers.values():
            block.compile(backend=backend, fullgraph=True)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model, converter


def loss_and_gradients(model, counter=None):
    with counter or contextlib.nullcontext():
        loss = cross_entropy_sum(model(TOKENS), LABELS)
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def compare(got, want):
    """Relative difference of the loss; the smallest SQNR of a parameter's gradient in dB, and its name."""
    sqnr = {
        name: float(10 * torch.log10(g.square().sum() / (got[1][name] - g).square().sum().clamp(min=1e-30)))
        for name, g in want[1].items()
    }
    name = min(sqnr, key=sqnr.get)
    return abs(got[0] - want[0]) / want[0], sqnr[name], name


def refusals(mesh):
    """Messages of what the styles refuse."""
    tensorwise, rowwise = Float8LinearConfig(), Float8LinearConfig.from_recipe_name("rowwise")
    attempts = {
        "plain": (nn.Linear(32, 32), Float8ColwiseParallel()),
        "bias": (Float8Linear(32, 32, config=tensorwise), Float8RowwiseParallel()),
        "rowwise": (
            nn.Sequential(Float8Linear(32, 32, bias=False, config=rowwise)),
            PrepareFloat8ModuleInput(),
        ),
        "layouts": (
            nn.Sequential(Float8Linear(32, 32, config=tensorwise)),
            PrepareFloat8ModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(0)),
        ),
    }
    messages = {}
    for name, (module, style) in attempts.items():
        try:
            parallelize_module(module, mesh, style)
        except ValueError as error:
            messages[name] = str(error)
    return messages


class GatedUnit(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(32, 64), nn.Linear(64, 32, bias=False), nn.Linear(32, 64)

    def forward(self, x, scale=None):
        return self.w2(torch.sigmoid(self.w1(x)) * self.w3(x))


def library_use(mesh):
    """The three styles on a module of the user's own, biases and bf16 included, given by a plan."""
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    outputs, gradients = [], []
    for parallel in (False, True):
        torch.manual_seed(0)
        unit = convert_to_float8_training(GatedUnit().bfloat16())
        if parallel:
            plan = {
                "": PrepareFloat8ModuleInput(
                    input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
                ),
                "w1": Float8ColwiseParallel(),
                "w3": Float8ColwiseParallel(),
                "w2": Float8RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            }
            parallelize_module(unit, mesh, plan.pop(""))
            parallelize_module(unit, mesh, plan)
        local = x.chunk(2, 1)[mesh.get_local_rank()] if parallel else x
        local = local.clone().requires_grad_()
        y = unit(local, None)
        y.float().square().sum().backward()
        outputs.append(y.full_tensor() if parallel else y)
        whole = [DTensor.from_local(local.grad, mesh, (Shard(1),)) if parallel else local.grad]
        whole += [p.grad for p in unit.parameters()]
        gradients.append([g.full_tensor() if parallel else g for g in whole])
    want = (1.0, {str(i): g.float() for i, g in enumerate([outputs[0], *gradients[0]])})
    return compare((1.0, {str(i): g.float() for i, g in enumerate([outputs[1], *gradients[1]])}), want)


def worker(rank, folder):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        found = {"refusals": refusals(mesh), "library": library_use(mesh)}
        for case in CASES:
            want = loss_and_gradients(build(case)[0])
            model, converter = build(case, mesh)
            gathers = Gathers()
            got = loss_and_gradients(model, gathers)
            found[case] = (*compare(got, want), dict(gathers.calls), dict(gathers.sent_bytes))
            if case in COMPILED:
                calls = Counter()
                compiled, _ = build(case, mesh, counting_backend(calls))
                found["compiled_" + case] = (*compare(loss_and_gradients(compiled), want), dict(calls))
            if case == "delayed":
                single, single_converter = build(case)
                histories = []
                for one, its in ((model, converter), (single, single_converter)):
                    for _ in range(2):
                        loss_and_gradients(one)
                        its.after_backward(one)
                    histories.append(its.state_dict(one))
                found["histories"] = max(
                    float(((histories[0][key] - value).abs() / value.abs().clamp(min=1e-9)).max())
                    for key, value in histories[1].items()
                )
        torch.save(found, f"{folder}/found{rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(worker, 2, folder)
        return torch.load(Path(folder) / "found0")


SCALED_AS_ONE = [
    *("tensorwise", "with_output", "wk_wv_filtered", "power_of_2", "delayed", "cast_kernels", "least"),
]


@pytest.mark.parametrize("case", [*SCALED_AS_ONE, *(f"compiled_{case}" for case in COMPILED)])
def test_a_scale_for_the_whole_tensor_gives_what_one_process_gives(found, case):
    """Not only to float8 accuracy: the float8 elements are the same, so what is left is fp32 rounding."""
    loss, sqnr_db, name = found[case][:3]
    assert loss < 1e-5
    assert sqnr_db > 60, name


@pytest.mark.parametrize("case", ["rowwise", "rowwise_with_gw_hp"])
def test_row_scales_of_split_rows_are_as_accurate(found, case):
    loss, sqnr_db, name = found[case][:3]
    assert loss < 0.01
    assert sqnr_db > 17, name


# A rank gives away its part of (B, S, D); the output's input and the embedding's gradient stay fp32.
PART = BATCH * (SEQ // 2) * DIM
ENDS = 2


@pytest.mark.parametrize("case", ["tensorwise", "power_of_2", "cast_kernels"])
def test_every_gather_of_a_block_travels_in_float8(found, case):
    """Two forward (one for wq wk wv, one for w1 w3) and two backward (wo, w2), a byte an element."""
    calls, sent_bytes = found[case][3:]
    assert calls == {"uint8": 4 * LAYERS, "float32": ENDS}
    assert sent_bytes == {"uint8": 4 * LAYERS * PART, "float32": ENDS * PART * 4}


def test_a_converted_output_gathers_its_input_in_float8_too(found):
    assert found["with_output"][3] == {"uint8": 4 * LAYERS + 1, "float32": 1}


def test_plain_siblings_make_the_shared_gather_high_precision_and_no_other(found):
    """Wk and wv read the input itself; w1 and w3, and both gradients, still travel in float8."""
    calls, sent_bytes = found["wk_wv_filtered"][3:]
    assert calls == {"uint8": 3 * LAYERS, "float32": LAYERS + ENDS}
    assert sent_bytes["uint8"] == 3 * LAYERS * PART


@pytest.mark.parametrize("case", ["rowwise", "rowwise_with_gw_hp", "delayed"])
def test_other_recipes_gather_in_high_precision(found, case):
    assert found[case][3] == {"float32": 4 * LAYERS + ENDS}


def test_a_compiled_block_gathers_in_float8(found):
    """Forward and backward graph of the one block that is compiled for all."""
    assert found["compiled_tensorwise"][3] == {"uint8": 4}
    assert found["compiled_cast_kernels"][3] == {"uint8": 4}
    assert found["compiled_wk_wv_filtered"][3] == {"uint8": 3, "float32": 1}


def test_delayed_histories_are_those_of_one_process(found):
    assert found["histories"] < 1e-4


def test_the_styles_serve_any_module(found):
    loss, sqnr_db, name = found["library"]
    assert loss == 0
    assert sqnr_db > 17, (
        name
    )  # sums of bf16 partial results round differently, and so do float8 casts of them


def test_what_cannot_work_is_refused(found):
    messages = found["refusals"]
    assert "is for a Float8Linear, got Linear" in messages["plain"]
    assert "bias=False" in messages["bias"]
    assert "Use PrepareModuleInput" in messages["rowwise"]
    assert "allowed: Shard to Replicate" in messages["layouts"]
