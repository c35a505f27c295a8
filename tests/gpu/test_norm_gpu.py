"""Norms in one pass on a GPU: exact sums, the same bits each time, no waiting; how fast is printed."""

import itertools
import math

import pytest
import torch

from kernels.norm import tensor_norms, tensor_norms_reference
from trainer.optim.clipping import clip_for

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16
SIZES = [0, 1, 1023, 4097, 0, 16384, 8192, 8193, 40_000, 1_000_003, 0]


def whole_numbers(sizes, dtype, shift=0):
    """Tensors whose sums of squares are exact in fp32, `shift` elements behind a boundary, amid NaN."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for n in sizes:
        hull = torch.full((n + 64,), math.nan, dtype=dtype, device="cuda")
        values = torch.randint(-2, 3, (n,), generator=generator)
        made.append(hull[16 + shift :][:n].copy_(values))
    return made


def exact(tensors):
    return [float(t.double().norm().float()) for t in tensors]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_kernel_is_exact_where_sums_are(dtype):
    for shift in range(16 // dtype.itemsize):
        tensors = whole_numbers(SIZES, dtype, shift)
        norms = tensor_norms(tensors)
        assert norms.dtype == F32
        assert norms.tolist() == exact(tensors), shift


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_same_bits_each_time_and_close_to_fp64(dtype):
    generator = torch.Generator(device="cuda").manual_seed(2)
    tensors = [
        (torch.randn(n, generator=generator, device="cuda") * 1e-4).to(dtype) for n in [*SIZES, 300_000_001]
    ]
    once = tensor_norms(tensors)
    for _ in range(5):
        assert torch.equal(tensor_norms(tensors), once)
        assert torch.equal(tensor_norms([t.clone() for t in tensors]), once)
    assert once.tolist() == pytest.approx([float(t.double().norm()) for t in tensors], rel=1e-6)


def test_many_tensors_each_find_their_own():
    tensors = whole_numbers([(7 * i) % 5 * 6000 for i in range(600)], BF16)
    assert tensor_norms(tensors).tolist() == exact(tensors)


def test_what_is_not_finite_stays_in_its_tensor():
    tensors = whole_numbers([9000, 9000, 9000, 5], F32)
    tensors[0][8999], tensors[1][17], tensors[1][18] = -math.inf, math.nan, math.inf
    norms = tensor_norms(tensors).tolist()
    assert norms[0] == math.inf
    assert math.isnan(norms[1])
    assert norms[2:] == exact(tensors[2:])


def test_more_elements_than_32_bits_count():
    """And more sums of blocks than the second kernel adds at a time."""
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    large = torch.zeros(2**31 + 4097, dtype=BF16, device="cuda")
    large[:3] = 1
    large[-4097:] = 1
    large[2**31 - 2 : 2**31 + 3] = 2
    small = whole_numbers([5000], BF16)
    expected = math.sqrt(3 + 4 * 5 + 4097 - 3)  # of the twos, three lie in the last 4097
    norms = tensor_norms([*small, large, *small]).tolist()
    assert norms == [*exact(small), pytest.approx(expected, rel=1e-7), *exact(small)]


def test_tensors_of_several_devices_are_refused():
    with pytest.raises(ValueError, match="not of one device and dtype"):
        tensor_norms([torch.zeros(3), torch.zeros(3, device="cuda")])


def test_other_dtypes_take_torchs_way():
    tensors = [torch.randn(1000, device="cuda").half(), torch.randn(10, device="cuda").half()]
    norms = tensor_norms(tensors)
    assert norms.dtype == F32
    assert torch.equal(norms, tensor_norms_reference(tensors))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_clipping_waits_for_nothing(kind):
    """Of any optimizer: also those that have gradients scaled before their step."""
    params = [torch.nn.Parameter(t) for t in whole_numbers([4096, 1000, 70_000], F32)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = kind(params, lr=0.1)
    clip_for(optimizer, params, 1e9)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm, _ = clip_for(optimizer, params, 1e9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 2**14
    assert norm.item() == pytest.approx(math.sqrt(4096 + 1000 + 70_000), rel=1e-7)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_how_fast(dtype, capsys):
    """A model of 8B width with 8 layers, as its gradients lie on one GPU. Nothing is asserted of time."""
    layer = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 3, (4096,), (4096,)]
    shapes = [*layer * 8, (128256, 4096), (128256, 4096), (4096,)]
    count = sum(math.prod(shape) for shape in shapes)
    size = dtype.itemsize * count
    if torch.cuda.mem_get_info()[0] < 1.2 * size:
        pytest.skip(f"needs {1.2 * size / 2**30:.0f} GiB of GPU memory")
    tensors = [torch.full(shape, 2.0**-10, dtype=dtype, device="cuda") for shape in shapes]

    def milliseconds(function):
        function()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
        for event in events:
            event.record()
            function()
        torch.cuda.synchronize()
        return sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))[10]

    ours, torchs = (milliseconds(lambda f=f: f(tensors)) for f in (tensor_norms, tensor_norms_reference))
    found = "; ".join(
        f"{name} {ms:.3f} ms, {size / ms / 1e9:.2f} TB/s" for name, ms in (("ours", ours), ("torch", torchs))
    )
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, norms of {count / 1e9:.2f} G {dtype}: {found}")
    roots = [math.sqrt(math.prod(shape)) / 2**10 for shape in shapes]
    assert tensor_norms(tensors).tolist() == pytest.approx(roots, rel=1e-6)
