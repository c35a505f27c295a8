"""Sums of chunks on a GPU: torch's bits over two, a loop's over more, on the current stream."""

import pytest
import torch

from kernels.sum_chunks import SPAN, sum_chunks, sum_chunks_reference

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def chunks_of(N, n, begin=0, dtype=BF16):
    """Numbers of many magnitudes, and some that are not finite, subnormal or zeros."""
    g = torch.Generator(device="cuda").manual_seed(N)
    size = begin + N * n
    exponents = torch.randint(-12, 12, (size,), generator=g, device="cuda")
    x = torch.randn(size, generator=g, device="cuda") * 2.0**exponents
    for place, value in enumerate((-0.0, 0.0, 2.0**-133, float("inf"), -float("inf"), float("nan"))):
        x[place :: 97 + place] = value
    return x.to(dtype)[begin:].view(N, n)


def same(got, want):
    """Bit for bit; of a NaN only that it is one."""
    there = ~want.isnan()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[there].view(torch.int32), want[there].view(torch.int32))


def in_order(chunks):
    total = torch.zeros(chunks.shape[1], device="cuda")
    for chunk in chunks:
        total = total + chunk.float()
    return total


@pytest.mark.parametrize("n", [1, 16, 513, 4096, 1_000_003, 5_000_016])  # up to ten blocks a program
def test_two_chunks_have_the_bits_of_torchs_sum(n):
    chunks = chunks_of(2, n)
    got = torch.empty(n, device="cuda")
    sum_chunks(chunks, got)
    same(got, torch.sum(chunks, dim=0, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("n", [5, 1040, 70_001])
@pytest.mark.parametrize("N", [1, 3, 4, 5, 8, 13, 64])
def test_more_are_added_in_their_order(N, n, dtype):
    chunks = chunks_of(N, n, dtype=dtype)
    got = torch.empty(n, device="cuda")
    sum_chunks(chunks, got)
    same(got, in_order(chunks))


@pytest.mark.parametrize(("begin", "out_begin"), [(1, 0), (0, 3), (5, 1), (8, 4)])
def test_memory_may_begin_anywhere(begin, out_begin):
    chunks = chunks_of(3, 10_000, begin)
    around = torch.full((10_016,), 7.0, device="cuda")
    sum_chunks(chunks, around[out_begin : out_begin + 10_000])
    same(around[out_begin : out_begin + 10_000], in_order(chunks))
    assert around[:out_begin].tolist() == [7.0] * out_begin
    assert around[out_begin + 10_000 :].tolist() == [7.0] * (16 - out_begin)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("n", [1, 512, 70_001, 5_000_016])
def test_squares_of_the_sums(n, alone):
    chunks = torch.randint(-3, 4, (2, n), device="cuda").to(BF16)
    out, squares = torch.empty(n, device="cuda"), torch.empty(-(-n // SPAN), device="cuda")
    sum_chunks(chunks, out, squares, alone=alone)
    same(out, in_order(chunks))
    want = torch.empty(n, device="cuda"), torch.empty_like(squares)
    sum_chunks_reference(chunks, *want)
    same(squares, want[1])


def test_any_number_of_programs_gives_the_same():
    from kernels.triton.sum_chunks import launch

    chunks = chunks_of(2, 1_000_000)
    for programs in (1, 7, 132, 10**6):
        got = torch.empty(1_000_000, device="cuda")
        launch(chunks, got, None, programs)
        same(got, in_order(chunks))


@pytest.mark.parametrize(("N", "n"), [(3, 2**30 + 16), (3, 2**30 + 1), (1, 2**31 + 48), (1, 2**31 + 5)])
def test_more_elements_than_32_bits_count(N, n):
    """The ends of each chunk are summed as those of small ones."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    part = 8192
    chunks, ends = torch.zeros(N, n, dtype=BF16, device="cuda"), chunks_of(N, 2 * part)
    chunks[:, :part], chunks[:, -part:] = ends[:, :part], ends[:, part:]
    got = torch.full((n,), 7.0, device="cuda")
    sum_chunks(chunks, got)
    same(torch.cat((got[:part], got[-part:])), in_order(ends))
    assert int(torch.count_nonzero(got[part:-part])) == 0


def test_it_runs_on_the_current_stream():
    """Its input is written there, late."""
    chunks, got = torch.zeros(2, 2**20, dtype=BF16, device="cuda"), torch.empty(2**20, device="cuda")
    sum_chunks(chunks, got)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        chunks.fill_(1.0)
        sum_chunks(chunks, got)
    stream.synchronize()
    assert torch.equal(got, torch.full_like(got, 2.0))
