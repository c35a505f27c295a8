"""The one-pass step: the reference against torch's fused optimizer, the Triton form against the reference."""

import math

import pytest
import torch

from kernels.adamw import _bias_corrections, adamw_step
from tests.kernels.hopper import compile_for_hopper

F32, BF16 = torch.float32, torch.bfloat16
SIZES = [1, 0, 1023, 4097, 0, 2048, 64, 0]
"""Ends of blocks, whole blocks, and nothing: also as the last."""
SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def tensors(sizes, param, grad, state):
    """(params, grads, exp_avgs, exp_avg_sqs, steps, copies, amaxes), the same for the same arguments."""
    g = torch.Generator().manual_seed(3)
    normal = [[torch.randn(n, generator=g) for n in sizes] for _ in range(4)]
    return (
        [t.to(param) for t in normal[0]],
        [t.to(grad) for t in normal[1]],
        [(t / 10).to(state) for t in normal[2]],
        [(t.square() / 100).to(state) for t in normal[3]],
        [torch.tensor(float(i)) for i in range(1, len(sizes) + 1)],
        [torch.zeros(n, dtype=BF16) for n in sizes],
        [torch.tensor(1e9) for _ in sizes],
    )


def step(lists, scale=None, shut=None, **settings):
    settings = {**SETTINGS, "weight_decay": 0.1, "decoupled": True, **settings}
    adamw_step(*lists, scale, shut, **settings)


@pytest.fixture
def launched(monkeypatch):
    """The Triton form on CPU tensors; the interpreter's fma rounds twice, so it is given a better one."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("Triton is compiled here: tests/gpu has this")
    from kernels.triton.adamw import launch

    def fma(self, x, y, z):
        exact = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(exact.astype("float32"), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)

    def go(lists, scale=None, shut=None, **settings):
        settings = {**SETTINGS, "weight_decay": 0.1, "decoupled": True, **settings}
        params, grads, exp_avgs, exp_avg_sqs, steps, copies, amaxes = lists
        corrections = _bias_corrections(steps, *(settings[key] for key in ("lr", "beta1", "beta2")))
        parts = (params, grads, exp_avgs, exp_avg_sqs, copies, amaxes)
        launch(parts, *corrections, scale, shut, **settings)

    return go


def differing(left, right):
    """Elements that differ, by list."""
    return [
        sum(int((a != b).sum()) for a, b in zip(x, y, strict=True)) for x, y in zip(left, right, strict=True)
    ]


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_reference_has_the_bits_of_torchs_fused_optimizer(dtype, weight_decay, decoupled):
    """But for what is behind the last whole vector of 16, where torch's kernel computes otherwise."""
    sizes = [4096, 64, 16 * 1001, 5]
    mine, theirs = tensors(sizes, dtype, dtype, dtype), tensors(sizes, dtype, dtype, dtype)
    step(mine, weight_decay=weight_decay, decoupled=decoupled)
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    for p, g, m, v, t in zip(*theirs[:5], strict=True):
        settings = {**SETTINGS, "weight_decay": weight_decay, "amsgrad": False, "maximize": False}
        fused([p], [g], [m], [v], [], [t], **settings)
    assert differing([lists[:3] for lists in mine[:4]], [lists[:3] for lists in theirs[:4]]) == [0, 0, 0, 0]
    for mine_last, last in zip(mine, theirs[:4], strict=False):
        torch.testing.assert_close(mine_last[3], last[3], rtol=1e-6 if dtype == F32 else 0.01, atol=1e-9)
    for p, copy, amax in zip(mine[0], mine[5], mine[6], strict=True):
        assert float(amax) == float(p.abs().max())
        assert torch.equal(copy, p.to(BF16))


@pytest.mark.parametrize("beta1", [0.9, 0.3])
@pytest.mark.parametrize(("weight_decay", "decoupled"), [(0.0, True), (0.1, True), (0.1, False)])
@pytest.mark.parametrize("grad", [F32, BF16])
def test_triton_form_has_the_bits_of_the_reference(launched, grad, weight_decay, decoupled, beta1):
    mine, theirs = tensors(SIZES, F32, grad, F32), tensors(SIZES, F32, grad, F32)
    settings = {"weight_decay": weight_decay, "decoupled": decoupled, "beta1": beta1}
    launched(mine, torch.tensor(0.37), torch.tensor(0.0), **settings)
    step(theirs, torch.tensor(0.37), torch.tensor(0.0), **settings)
    assert differing(mine[:5], theirs[:5]) == [0, 0, 0, 0, 0]
    assert mine[6] == theirs[6]
    assert float(mine[6][1]) == 0.0  # of nothing
    for copy, other in zip(mine[5], theirs[5], strict=True):  # the interpreter truncates to bf16
        torch.testing.assert_close(copy, other, rtol=2**-7, atol=0)


@pytest.mark.parametrize(("param", "grad", "state"), [(BF16, BF16, BF16), (BF16, F32, F32)])
def test_triton_form_of_bf16_parameters(launched, param, grad, state):
    mine, theirs = tensors(SIZES, param, grad, state), tensors(SIZES, param, grad, state)
    launched(mine)
    step(theirs)
    for left, right in zip(mine[:4], theirs[:4], strict=True):
        assert [t.dtype for t in left] == [t.dtype for t in right]
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == BF16 else 1e-6, atol=1e-9)


def test_triton_form_where_parts_begin_anywhere(launched):
    """FSDP2 leaves gradients as views into a buffer; only some lie on boundaries of wide accesses."""

    def shifted(lists):
        moved = [torch.cat((torch.full((3,), 7.0), t))[3:] for t in lists[1]]
        return (lists[0], moved, *lists[2:])

    mine, theirs = shifted(tensors(SIZES, F32, F32, F32)), tensors(SIZES, F32, F32, F32)
    assert mine[1][3].data_ptr() % 16 != 0
    launched(mine)
    step(theirs)
    assert differing(mine[:4], theirs[:4]) == [0, 0, 0, 0]


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_a_shut_gate_changes_nothing(form, launched):
    go = step if form == "reference" else launched
    before, after = tensors(SIZES, F32, F32, F32), tensors(SIZES, F32, F32, F32)
    after[1][3][5] = math.nan
    go(after, torch.tensor(math.nan), torch.tensor(1.0))
    assert differing([before[i] for i in (0, 2, 3, 5, 6)], [after[i] for i in (0, 2, 3, 5, 6)]) == [0] * 5


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_amax_of_what_is_not_finite(form, launched):
    go = step if form == "reference" else launched
    lists = tensors([3000, 3000, 1], F32, F32, F32)
    lists[0][0][2999], lists[0][1][7] = math.inf, -math.inf
    lists[0][1][8] = math.nan
    go(lists)
    assert float(lists[6][0]) == math.inf
    assert math.isnan(lists[6][1])
    assert float(lists[6][2]) == abs(float(lists[0][2]))


def test_many_tensors_each_find_their_own(launched):
    sizes = [(7 * i) % 5 * 600 for i in range(40)]
    mine, theirs = tensors(sizes, F32, F32, F32), tensors(sizes, F32, F32, F32)
    launched((*mine[:5], [], []))
    step((*theirs[:5], [], []))
    assert differing(mine, theirs) == [0] * 7


def test_what_a_kernel_would_not_notice_is_refused():
    good = tensors([8, 4], F32, F32, F32)
    for place, wrong, message in [
        (1, [torch.zeros(8), torch.zeros(5)], "grads are not of the sizes"),
        (1, [torch.zeros(8), torch.zeros(4, dtype=BF16)], "grads are of several dtypes"),
        (0, [torch.zeros(8), torch.zeros(4, dtype=torch.float16)], "params are of several dtypes"),
        (2, [torch.zeros(8), torch.zeros(2, 4)[:, :2].t()], "exp_avgs is not contiguous"),
        (3, [torch.zeros(8, dtype=BF16), torch.zeros(4, dtype=BF16)], "of different dtypes"),
        (5, [torch.zeros(8), torch.zeros(4)], "copies are torch.float32"),
        (6, [torch.zeros(())], "1 amaxes"),
    ]:
        with pytest.raises(ValueError, match=message):
            step((*good[:place], wrong, *good[place + 1 :]))


def test_torchs_checks_of_the_operator():
    lists = tensors([70, 4], F32, F32, F32)
    arguments = (*lists, torch.tensor(0.5), None, 1e-3, 0.9, 0.95, 1e-8, 0.1, True)
    torch.library.opcheck(adamw_step, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("dtypes", "accesses"),
    [
        ({}, {"ld.global.v4.b32", "st.global.v4.b32"}),
        ({"GRAD_BF16": True, "COPIES": True}, {"ld.global.v4.b32", "ld.global.v2.b32", "st.global.v2.b32"}),
        (
            {"PARAM_BF16": True, "GRAD_BF16": True, "STATE_BF16": True},
            {"ld.global.v4.b32", "st.global.v4.b32"},
        ),
    ],
)
def test_on_hopper_accesses_are_wide_and_registers_few(dtypes, accesses):
    pytest.importorskip("triton")
    from kernels.triton.tensor_table import WARPS, block_size

    wide = [4, 4, 4] if len(dtypes) < 3 else [2]
    signature = {"table": "*i64"}
    signature |= dict.fromkeys(["step_sizes", "roots", "grad_scale", "found_inf"], "*fp32")
    signature |= {"tensors": "i32"}
    signature |= dict.fromkeys(["decay", "lerp_weight", "beta2", "square_weight", "eps"], "fp32")
    constants = dict.fromkeys(
        ["PARAM_BF16", "GRAD_BF16", "STATE_BF16", "NEAR_GRAD", "COPIES", "AMAXES"], False
    )
    constants |= {"BISECTIONS": 12, "DECAY": 1, "BLOCK": block_size(wide), **dtypes}
    names = ["BISECTIONS", "PARAM_BF16", "GRAD_BF16", "STATE_BF16", "DECAY", "NEAR_GRAD"]
    signature |= dict.fromkeys([*names, "COPIES", "AMAXES", "BLOCK"], "constexpr")
    found = compile_for_hopper(
        "kernels.triton.adamw:adamw_kernel", signature, constants, num_warps=WARPS, aligned=("table",)
    )
    assert found["stack"] == 0  # nothing spills
    assert found["shared"] == 0  # no element changes hands
    assert found["registers"] <= 80  # three programs of 8 warps on a multiprocessor
    assert accesses <= set(found["accesses"])


def test_the_operator_launches_the_kernel_where_triton_runs(launched, monkeypatch):
    theirs, mine, direct = (tensors(SIZES, F32, BF16, F32) for _ in range(3))
    step(theirs, torch.tensor(0.5), torch.tensor(0.0))
    launched(direct, torch.tensor(0.5), torch.tensor(0.0))
    monkeypatch.setattr("kernels.adamw.runs_triton", lambda device: True)
    step(mine, torch.tensor(0.5), torch.tensor(0.0))
    assert differing(mine, direct) == [0] * 7
    assert differing(mine[:5], theirs[:5]) == [0] * 5
    assert differing(mine[5:6], theirs[5:6]) != [0]  # the interpreter truncates: it was the kernel
