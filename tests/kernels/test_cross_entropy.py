"""Cross-entropy kernels: reference against PyTorch, Triton (interpreted) against the reference, ptxas."""

import pytest
import torch
import torch.nn.functional as F

from kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_gradient_,
    gradient_reference,
    row_sums_reference,
)
from tests.kernels.hopper import compile_for_hopper
from trainer.data.packing import IGNORED_LABEL
from trainer.loss import cross_entropy_sum, fused_cross_entropy_sum


def rows(T, V, dtype=torch.float32):
    torch.manual_seed(T + V)
    logits = (4 * torch.randn(T, V)).to(dtype)
    index = torch.randint(0, V, (T,))
    index[::3] = IGNORED_LABEL
    index[1::5] = V + 2  # another rank's
    return logits, index


def test_the_reference_is_pytorchs_cross_entropy():
    logits, labels = rows(9, 31)
    labels[labels > 30] = 4
    logits.requires_grad_()
    want = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    want.backward()
    lse, at_label = row_sums_reference(logits.detach(), labels)
    valid = labels != IGNORED_LABEL
    assert float((lse - at_label)[valid].sum()) == pytest.approx(float(want.detach()), rel=1e-6)
    torch.testing.assert_close(gradient_reference(logits.detach(), labels, lse, valid.float()), logits.grad)


@pytest.mark.parametrize(("T", "V"), [(1, 1), (5, 7), (3, 4096), (2, 4097), (4, 9000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_are_the_reference(T, V, dtype):
    from kernels.triton.cross_entropy import launch_gradient, launch_rows

    logits, index = rows(T, V, dtype)
    lse, at_label = launch_rows(logits, index)
    want_lse, want_at_label = row_sums_reference(logits, index)
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(at_label, want_at_label)
    factor = torch.where(index == IGNORED_LABEL, 0.0, 0.37)
    want = gradient_reference(logits, index, lse, factor)
    launch_gradient(logits, index, lse, factor)
    torch.testing.assert_close(logits, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-8)


def test_rows_may_lie_apart_and_none_may_be_there():
    from kernels.triton.cross_entropy import launch_gradient, launch_rows

    wide, index = rows(4, 50)
    part = wide[:, :33]
    lse, _ = launch_rows(part, index)
    torch.testing.assert_close(lse, part.logsumexp(1))
    beside = wide[:, 33:].clone()
    launch_gradient(part, index, lse, torch.ones(4))
    assert torch.equal(wide[:, 33:], beside)
    empty = torch.empty(0, 33)
    assert launch_rows(empty, index[:0])[0].shape == (0,)
    launch_gradient(empty, index[:0], lse[:0], lse[:0])


def test_nan_and_infinity_reach_the_loss():
    from kernels.triton.cross_entropy import launch_rows

    logits, index = rows(3, 70)
    logits[0, 5], logits[1, 6], logits[2, 7] = float("nan"), float("inf"), float("-inf")
    lse, _ = launch_rows(logits, index)
    assert lse[0].isnan()
    assert not lse[1].isfinite()
    torch.testing.assert_close(lse[2], logits[2].logsumexp(0))


def test_the_fused_sum_has_the_plain_ones_value_and_gradient():
    torch.manual_seed(3)
    labels = torch.randint(0, 40, (2, 6))
    labels[1, 2:] = IGNORED_LABEL
    plain = torch.randn(2, 6, 40, requires_grad=True)
    fused = plain.detach().clone().requires_grad_()
    want, got = cross_entropy_sum(plain, labels), fused_cross_entropy_sum(fused * 1.0, labels)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    (want / 7).backward()
    (got / 7).backward()
    torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-5, atol=1e-8)


def test_a_second_backward_of_the_fused_sum_is_refused():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = fused_cross_entropy_sum(logits * 1.0, torch.tensor([[1, 2, 3]]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        loss.backward()


def test_operators_have_right_meta_forms():
    logits, index = rows(4, 9)
    lse, _ = cross_entropy(logits, index)
    torch.library.opcheck(cross_entropy.overload, (logits, index))
    torch.library.opcheck(cross_entropy_gradient_, (logits, index, lse, torch.ones(4)))


def test_hopper_reads_and_writes_sixteen_bytes_without_spilling():
    from kernels.triton.cross_entropy import GROUP, LANES, WARPS

    common = {"row_stride": "i32", "V": "i32"}
    rows_of = {"logits": "*bf16", "index": "*i64", "log_sum": "*fp32", "at_label": "*fp32", **common}
    over = {"logits": "*bf16", "index": "*i64", "log_sum": "*fp32", "factor": "*fp32", **common}
    for kernel, signature, constants in (
        ("rows_kernel", rows_of, {"BLOCKS": 32, "LANES": LANES, "GROUP": GROUP}),
        ("gradient_kernel", over, {"BLOCK": LANES * GROUP}),
    ):
        found = compile_for_hopper(
            f"kernels.triton.cross_entropy:{kernel}",
            {**signature, **dict.fromkeys(constants, "constexpr")},
            constants,
            num_warps=WARPS,
            aligned=tuple(signature),
        )
        assert found["stack"] == 0, kernel
        assert found["registers"] <= 64, kernel  # four programs of 256 threads a multiprocessor
        assert "ld.global.v4.b32" in found["accesses"], (kernel, found)
    assert "st.global.v4.b32" in found["accesses"]
