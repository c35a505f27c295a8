"""Sums of chunks: the Triton form (interpreted) against a loop over the chunks and torch's sum, ptxas."""

import pytest
import torch

from kernels.sum_chunks import SPAN, _check, _operator, sum_chunks, sum_chunks_reference
from tests.kernels.hopper import compile_for_hopper


@pytest.fixture
def launch():
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("Triton is compiled here: tests/gpu has this")
    from kernels.triton import sum_chunks as form

    return form.launch


def chunks_of(N, n, dtype=torch.bfloat16, begin=0):
    """Numbers of many magnitudes, so that the order of additions shows; from an address that many further."""
    g = torch.Generator().manual_seed(N)
    x = torch.randn(begin + N * n, generator=g) * 2.0 ** torch.randint(-12, 12, (begin + N * n,), generator=g)
    return x.to(dtype)[begin:].view(N, n)


def in_order(chunks):
    total = torch.zeros(chunks.shape[1])
    for chunk in chunks:
        total = total + chunk.float()
    return total


def bits(t):
    return t.view(torch.int32)


def summed(launch, chunks, *programs, begin=0):
    """What the kernel writes, between elements that it should leave alone."""
    n = chunks.shape[1]
    around = torch.full((begin + n + 16,), 7.0)
    out = around[begin : begin + n]
    launch(chunks, out, None, *programs)
    assert set(around[:begin].tolist()) | set(around[begin + n :].tolist()) == {7.0}
    return out


@pytest.mark.parametrize("n", [1, 15, 16, 511, 512, 528, 1537])
@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 8, 11, 64])
def test_chunks_are_added_in_their_order(launch, N, n):
    chunks = chunks_of(N, n)
    assert torch.equal(summed(launch, chunks), in_order(chunks))


def test_the_order_shows():
    """Or the test above would pass for any."""
    for N in (3, 4, 5, 8, 11, 64):
        chunks = chunks_of(N, 1537)
        assert not torch.equal(in_order(chunks.flip(0)), in_order(chunks)), N


def test_two_chunks_have_the_bits_of_torchs_sum(launch):
    """Of every pair of special numbers and a few common ones, with the sign of zero.

    Not of subnormal ones, which the interpreter's conversion makes 0: tests/gpu has them.
    """
    inf, least, largest = float("inf"), 2.0**-126, 3.3895314e38
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-9, inf, -inf, float("nan"), least, -least, largest])
    chunks = torch.cartesian_prod(values, values).t().contiguous().bfloat16()
    want, got = torch.empty(121), summed(launch, chunks)
    sum_chunks_reference(chunks, want)
    finite = ~want.isnan()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(bits(got[finite]), bits(want[finite]))
    assert int(want.isnan().sum()) == 2 * 11 - 1 + 2  # one is NaN, or infinities of both signs


def test_more_chunks_agree_with_torchs_sum_to_roundings(launch):
    for N in (16, 64):
        chunks = chunks_of(N, 1000)
        want = torch.empty(1000)
        sum_chunks_reference(chunks, want)
        error = (summed(launch, chunks) - want).abs() / chunks.float().abs().sum(0)
        assert float(error.max()) <= N * 2**-24


@pytest.mark.parametrize(("begin", "out_begin"), [(1, 0), (0, 3), (5, 1), (8, 4)])
def test_memory_may_begin_anywhere(launch, begin, out_begin):
    chunks = chunks_of(3, 1040, begin=begin)
    assert torch.equal(summed(launch, chunks, begin=out_begin), in_order(chunks))


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_a_program_walks_over_many_blocks(launch, programs):
    chunks = chunks_of(2, 512 * 7 + 48)
    assert torch.equal(summed(launch, chunks, programs), in_order(chunks))


def test_fp16_and_nothing(launch):
    chunks = chunks_of(5, 700, torch.float16)
    assert torch.equal(summed(launch, chunks), in_order(chunks))
    summed(launch, torch.empty(3, 0, dtype=torch.bfloat16))


@pytest.mark.parametrize(("n", "programs"), [(1, 1), (512, 1), (513, 2), (512 * 5 + 48, 2), (1024, 7)])
def test_squares_of_the_sums(launch, n, programs):
    """Of each 512; whole numbers, so that their order does not matter."""
    chunks = torch.randint(-3, 4, (3, n), generator=torch.Generator().manual_seed(n)).bfloat16()
    out, around = torch.empty(n), torch.full((-(-n // SPAN) + 2,), 7.0)
    launch(chunks, out, around[1:-1], programs)
    want = [float(span.square().sum()) for span in in_order(chunks).split(SPAN)]
    assert around.tolist() == [7.0, *want, 7.0]
    reference = torch.empty(len(want))
    sum_chunks_reference(chunks, out, reference)
    assert reference.tolist() == want


def test_what_a_kernel_would_not_notice_is_refused():
    good, out = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(8)
    for chunks, target, message in [
        (good, torch.zeros(7), r"\(2, 8\) do not add up to \(7,\)"),
        (good, torch.zeros(1, 8), "do not add up"),
        (good[:0], out, "do not add up"),
        (good.view(-1), out, "do not add up"),
        (good.float(), out, "torch.float32 into torch.float32"),
        (good, out.bfloat16(), "into torch.bfloat16"),
        (torch.zeros(8, 2, dtype=torch.bfloat16).t(), out, "not contiguous"),
        (good, torch.zeros(16)[::2], "not contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            sum_chunks(chunks, target)
    for squares in (torch.zeros(2), torch.zeros(1, dtype=torch.float64), torch.zeros(1, 1)):
        with pytest.raises(ValueError, match="squares are torch"):
            sum_chunks(good, out, squares)
    with pytest.raises(ValueError, match="squares on meta, out on cpu"):
        _check(good, out, torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="chunks on cpu, out on meta"):
        _check(good, out.to("meta"))


def test_torchs_checks_of_the_operator():
    for squares in ([], [torch.zeros(1)]):
        torch.library.opcheck(_operator, (chunks_of(2, 70), torch.zeros(70), squares, True))


def test_the_operator_launches_the_kernel_where_triton_runs(launch, monkeypatch):
    calls = []
    monkeypatch.setattr("kernels.sum_chunks.runs_triton", lambda device: True)
    monkeypatch.setattr("kernels.triton.sum_chunks.launch", lambda *args: (calls.append(1), launch(*args)))
    chunks, out = chunks_of(3, 100), torch.empty(100)
    sum_chunks(chunks, out)
    assert calls == [1]
    assert torch.equal(out, in_order(chunks))


@pytest.mark.parametrize("with_squares", [False, True])
@pytest.mark.parametrize(
    ("N", "is_wide", "registers"), [(2, True, 64), (64, True, 64), (8, False, 32)], ids=["2", "64", "narrow"]
)
def test_on_hopper_accesses_are_wide_and_registers_few(N, is_wide, registers, with_squares):
    """So few that a multiprocessor holds 32 programs of one warp, or 16 of four (10 with squares)."""
    pytest.importorskip("triton")
    from kernels.triton.sum_chunks import BLOCK, LOADS, NARROW_WARPS

    signature = {"chunks": "*bf16", "out": "*fp32", "squares": "*fp32", "n": "i32"}
    constants = {"N": N, "LOADS": LOADS, "SQUARES": with_squares, "BLOCK": BLOCK}
    found = compile_for_hopper(
        "kernels.triton.sum_chunks:sum_chunks_kernel",
        signature | dict.fromkeys(constants, "constexpr"),
        constants,
        num_warps=1 if is_wide else NARROW_WARPS,
        aligned=tuple(signature) if is_wide else (),
    )
    assert found["stack"] == 0  # nothing spills
    assert found["shared"] == 0 or (with_squares and not is_wide)  # elements change hands within a warp
    assert found["registers"] <= (48 if with_squares and not is_wide else registers)
    load, store = ("v4.b32", "v4.b32") if is_wide else ("b16", "b32")
    hint = "L1::evict_first.L2::cache_hint"
    squares = ["st.global.b32"] if with_squares else []
    assert found["accesses"] == [f"ld.global.{hint}.{load}", f"st.global.{hint}.{store}", *squares]
