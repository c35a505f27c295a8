"""Kernels of loss, norm, SwiGLU and RoPE on a CUDA GPU: against references, at sizes of 8B and odd ones."""

import math

import pytest
import torch
from torch import nn

from kernels import cross_entropy as ce
from kernels import rms_norm as norm
from kernels import rope, swiglu
from trainer.chunked_loss import apply_chunked_loss
from trainer.data.packing import IGNORED_LABEL
from trainer.loss import cross_entropy_sum, fused_cross_entropy_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def normal(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def steps_apart(a, b):
    """The largest distance in representable bf16 numbers."""

    def order(t):
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((order(a) - order(b)).abs().max())


@pytest.mark.parametrize(("T", "V"), [(64, 128256), (33, 50257), (7, 203), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_entropy(T, V, dtype):
    logits = 3 * normal(T, V, dtype=dtype)
    index = torch.randint(0, V, (T,), device="cuda")
    index[::4] = IGNORED_LABEL
    lse, at_label = ce.cross_entropy(logits, index)
    want_lse, want_at_label = ce.row_sums_reference(logits, index)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=2e-6)
    assert torch.equal(at_label, want_at_label)
    factor = torch.where(index == IGNORED_LABEL, 0.0, 1e-4)
    want = ce.gradient_reference(logits, index, lse, factor)
    ce.cross_entropy_gradient_(logits, index, lse, factor)
    if dtype == torch.bfloat16:
        torch.testing.assert_close(logits.float(), want.float(), rtol=2**-7, atol=1e-11)
    else:
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-10)
    assert float(logits[::4].abs().max()) == 0.0


def test_cross_entropy_beyond_two_to_the_31():
    T, V = 17000, 128256
    logits = torch.zeros(T, V, dtype=torch.bfloat16, device="cuda")
    logits[-1, 5] = 9.0
    index = torch.full((T,), 5, device="cuda")
    lse, at_label = ce.cross_entropy(logits, index)
    assert float(at_label[-1]) == 9.0
    assert float(lse[0]) == pytest.approx(math.log(V), rel=1e-6)
    assert float(lse[-1]) == pytest.approx(math.log(V - 1 + math.exp(9.0)), rel=1e-6)
    ce.cross_entropy_gradient_(logits, index, lse, torch.ones(T, device="cuda"))
    assert float(logits[-1, 5]) == pytest.approx(math.exp(9.0) / (V - 1 + math.exp(9.0)) - 1, rel=1e-2)


def test_nan_in_one_logit_reaches_its_row_alone():
    logits = normal(4, 9000)
    logits[2, 8999] = math.nan
    lse, _ = ce.cross_entropy(logits, torch.zeros(4, dtype=torch.int64, device="cuda"))
    assert lse.isnan().tolist() == [False, False, True, False]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(256, 32000, bias=False, device="cuda", dtype=torch.bfloat16)

    def forward(self, hidden, document_ids=None, labels=None):
        return self.output(hidden) if labels is None else self.output(hidden, labels)


@pytest.mark.parametrize("loss_fn", [cross_entropy_sum, fused_cross_entropy_sum])
@pytest.mark.parametrize("chunk", [0, 300, 2048])
def test_forms_of_the_loss_agree(chunk, loss_fn):
    hidden = normal(2, 1024, 256)
    labels = torch.randint(0, 32000, (2, 1024), device="cuda")
    labels[1, 700:] = IGNORED_LABEL
    torch.manual_seed(0)
    head, x = Head(), hidden.clone().requires_grad_()
    want = cross_entropy_sum(head(x), labels) / 1724
    want.backward()
    own = hidden.clone().requires_grad_()
    weight_gradient, head.output.weight.grad = head.output.weight.grad, None
    if apply_chunked_loss(head, {"output": "output"}, chunk, loss_fn):
        got = head(own, labels=labels) / 1724
    else:
        got = loss_fn(head(own), labels) / 1724
    torch.cuda.set_sync_debug_mode("error")
    try:
        got.backward()  # nothing waits for the upstream gradient
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    for mine, theirs in ((own.grad, x.grad), (head.output.weight.grad, weight_gradient)):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 6e-3, (chunk, float(error))


def test_the_fused_loss_takes_no_memory_besides_the_logits():
    logits = normal(4096, 32000).requires_grad_()
    labels = torch.randint(0, 32000, (1, 4096), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = fused_cross_entropy_sum(logits[None], labels)
    torch.autograd.grad(loss, logits)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * logits.nbytes


@pytest.mark.parametrize("shape", [(8192, 14336), (33, 77), (1,)])
def test_swiglu(shape):
    grad, gate, up = (normal(*shape, seed=seed) for seed in range(3))
    y, amax = swiglu.silu_mul_with_amax(gate, up)
    assert steps_apart(y, swiglu.silu_mul_reference(gate, up)) <= 1
    assert float(amax) == float(y.abs().max())
    assert torch.equal(swiglu.silu_mul(gate, up), y)
    dgate, dup, amaxes = swiglu.silu_mul_backward(grad, gate, up, True)
    want = swiglu.silu_mul_backward_reference(grad, gate, up)
    for mine, theirs in zip((dgate, dup), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-5)
    assert amaxes.tolist() == [float(dgate.abs().max()), float(dup.abs().max())]
    again = swiglu.silu_mul_backward(grad, gate, up, False)
    assert torch.equal(again[0], dgate)
    assert torch.equal(again[1], dup)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_amax_of_what_is_not_finite(bad):
    gate, up = torch.ones(2, 100_000, device="cuda", dtype=torch.bfloat16)
    up[77_777] = -bad
    amax = float(swiglu.silu_mul_with_amax(gate, up)[1])
    assert math.isnan(amax) if math.isnan(bad) else amax == math.inf


@pytest.mark.parametrize(("M", "D"), [(8192, 4096), (1000, 8192), (65, 16384), (3, 600), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_norm(M, D, dtype):
    x, r, grad, stream = (normal(M, D, dtype=dtype, seed=seed) for seed in range(4))
    weight = (1 + normal(D, dtype=torch.float32, seed=9) / 8).to(dtype)
    h, y = norm.add_rms_norm(x, r, weight, 1e-5)
    assert torch.equal(h, x + r)
    want, rstd = norm.rms_norm_reference(h, weight, 1e-5)
    if dtype == torch.bfloat16:
        assert steps_apart(y, want) <= 1
    else:
        torch.testing.assert_close(y, want)
    module = nn.RMSNorm(D, eps=1e-5, device="cuda", dtype=dtype)
    module.weight.data.copy_(weight)
    torch.testing.assert_close(y, module(h), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    again, amax = norm.rms_norm_with_amax(h, weight, 1e-5)
    assert torch.equal(again, y)
    assert float(amax) == float(y.abs().max())
    for added, grads in ((None, [grad]), (stream, [grad]), (stream, [grad, x]), (None, [x, grad, stream])):
        dh, dw, amax = norm.rms_norm_backward(grads, h, weight, rstd, added, True)
        assert float(amax) == float(dh.abs().max())
        assert torch.equal(norm.rms_norm_backward(grads, h, weight, rstd, added, False)[0], dh)
        want_dh, want_dw = norm.rms_norm_backward_reference(grads, h, weight, rstd, added)
        tolerance = {"rtol": 2**-7, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(dh, want_dh, **tolerance)
        assert (dw.float() - want_dw.float()).norm() <= 4e-3 * want_dw.float().norm()


def tables(rows, head_dim):
    pairs = torch.arange(head_dim // 2, device="cuda") / head_dim
    angles = torch.arange(rows, device="cuda", dtype=torch.float32)[:, None] / 500000.0 ** (2 * pairs)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1, 8192, 32, 128), 8192),
        ((1, 8192, 8, 128), 8192),
        ((1, 4096, 64, 128), 8192),
        ((2, 1000, 5, 64), 1001),
        ((3, 77, 1, 96), 77),
        ((2, 130, 24, 256), 130),
        ((1, 1, 1, 2), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotary_is_the_reference_to_the_bit(shape, rows, dtype, inverse):
    x, (cos, sin) = normal(*shape, dtype=dtype), tables(rows, shape[3])
    used = (cos[: shape[1], None], sin[: shape[1], None])
    want = rope.rotate(x, used[0], -used[1] if inverse else used[1])
    y, amax = rope.rotate_pairs(x, cos, sin, inverse, True)
    assert torch.equal(y, want)
    assert amax.tolist() == [float(y.abs().max())]
    assert torch.equal(rope.rotate_pairs(x, cos, sin, inverse, False)[0], y)
    heads_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.nn.functional.pad(x, (1, 2))[..., 1:-2]  # no head starts at sixteen bytes
    for same in (heads_first, padded, x.mT.contiguous().mT):
        assert torch.equal(rope.rotate_pairs(same, cos, sin, inverse, False)[0], y)


def test_rotary_gradient_is_autograds_to_the_bit():
    cos, sin = tables(500, 128)
    plain, own = (normal(2, 400, 6, 128).requires_grad_() for _ in range(2))
    grad = normal(2, 6, 400, 128, seed=1).transpose(1, 2)
    rope.rotate(plain, cos[:400, None], sin[:400, None]).backward(grad)
    rope.rotate_pairs(own, cos, sin, False, False)[0].backward(grad)
    assert torch.equal(own.grad, plain.grad)


def test_rotary_beyond_two_to_the_31():
    cos, sin = tables(8192, 128)
    x = torch.zeros(66, 8192, 32, 128, dtype=torch.bfloat16, device="cuda")  # 2.2 G elements
    x[-1, -1, -1, -2] = 3.0
    y, amax = rope.rotate_pairs(x, cos, sin, False, True)
    want = torch.stack((3 * cos[-1, -1], 3 * sin[-1, -1])).bfloat16()
    assert torch.equal(y[-1, -1, -1, -2:], want)
    assert float(amax) == float(want.abs().max())
    assert int(y.count_nonzero()) == int(want.count_nonzero())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_rotary_amax_of_what_is_not_finite(bad):
    x, (cos, sin) = normal(1, 999, 8, 128), tables(999, 128)
    x[0, 777, 3, 100] = bad
    y, amax = rope.rotate_pairs(x, cos, sin, True, True)
    assert int(y.isfinite().logical_not().sum()) == 2
    assert math.isnan(float(amax)) if math.isnan(bad) else float(amax) == math.inf


def test_fused_kernels_run_inside_a_compiled_function():
    def part(x, r, weight, gate_weight):
        h, y = norm.add_rms_norm(x, r, weight, 1e-5)
        return h + swiglu.silu_mul(y @ gate_weight, y)

    leaves = [normal(64, 256, seed=0), normal(64, 256, seed=1), normal(256, seed=2), normal(256, 256, seed=3)]
    results = []
    for function in (part, torch.compile(part, fullgraph=True)):
        mine = [t.clone().requires_grad_() for t in leaves]
        out = function(*mine)
        out.float().square().sum().backward()
        results.append([out.detach(), *(t.grad for t in mine)])
    for eager, compiled in zip(*results, strict=True):
        error = (eager.float() - compiled.float()).norm() / eager.float().norm()
        assert error < 1e-2
