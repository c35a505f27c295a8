"""The one-pass step on a GPU: the reference's bits, torch's fused numbers, no memory, no waiting."""

import pytest
import torch

from kernels.adamw import adamw_step
from trainer.optim.clipping import clip_for
from trainer.optim.one_pass import OnePassAdamW
from trainer.resilience.bad_steps import gated_step

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SIZES = [1, 0, 1023, 4097, 2048, 1_000_003, 0]


def lists_of(sizes, param, grad, state, device):
    """The operator's lists; one gradient begins between the boundaries of wide accesses."""
    g = torch.Generator().manual_seed(5)
    normal = [[torch.randn(n, generator=g) for n in sizes] for _ in range(4)]
    grads = [t.to(grad).to(device) for t in normal[1]]
    place = sizes.index(4097)
    grads[place] = torch.cat((grads[place][:1], grads[place]))[1:]
    return (
        [t.to(param).to(device) for t in normal[0]],
        grads,
        [(t / 10).to(state).to(device) for t in normal[2]],
        [(t.square() / 100).to(state).to(device) for t in normal[3]],
        [torch.tensor(float(i), device=device) for i in range(1, len(sizes) + 1)],
        [torch.zeros(n, dtype=BF16, device=device) for n in sizes],
        [torch.tensor(1e9, device=device) for _ in sizes],
    )


@pytest.mark.parametrize("beta1", [0.9, 0.3])
@pytest.mark.parametrize(("weight_decay", "decoupled"), [(0.0, True), (0.1, True), (0.1, False)])
@pytest.mark.parametrize(
    ("param", "grad", "state"), [(F32, F32, F32), (F32, BF16, F32), (BF16, BF16, BF16), (BF16, F32, F32)]
)
def test_kernel_has_the_bits_of_the_reference(param, grad, state, weight_decay, decoupled, beta1):
    arguments = (1e-3, beta1, 0.95, 1e-8, weight_decay, decoupled)
    here, there = (lists_of(SIZES, param, grad, state, device) for device in ("cpu", "cuda"))
    adamw_step(*here, torch.tensor(0.37), torch.tensor(0.0), *arguments)
    adamw_step(*there, torch.tensor(0.37).cuda(), torch.tensor(0.0).cuda(), *arguments)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "copies", "amaxes")
    for name, left, right in zip(names, here, there, strict=True):
        assert [int((a != b.cpu()).sum()) for a, b in zip(left, right, strict=True)] == [0] * 7, name


def test_a_shut_gate_changes_no_bit():
    before, after = (lists_of(SIZES, F32, F32, F32, "cuda") for _ in range(2))
    after[1][3][5] = float("nan")
    adamw_step(*after, None, torch.tensor(1.0).cuda(), 1e-3, 0.9, 0.95, 1e-8, 0.1, True)
    for place in (0, 2, 3, 5, 6):
        assert all(torch.equal(a, b) for a, b in zip(before[place], after[place], strict=True))


def test_amax_of_what_is_not_finite():
    lists = lists_of([4097, 4097], F32, F32, F32, "cuda")
    lists[0][0][4096], lists[0][1][7], lists[0][1][9] = float("inf"), -float("inf"), float("nan")
    adamw_step(*lists, None, None, 1e-3, 0.9, 0.95, 1e-8, 0.1, True)
    assert lists[6][0].item() == float("inf")
    assert torch.isnan(lists[6][1])


def test_more_elements_than_32_bits_count():
    """The last elements of 2^31 + 4097 are those of a tensor of their own."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    size, part = 2**31 + 4097, 8192
    generator = torch.Generator(device="cuda").manual_seed(0)
    whole = [torch.zeros(size, dtype=BF16, device="cuda") for _ in range(4)]
    for tensor in whole:
        for piece in (tensor[:part], tensor[-part:]):
            piece.copy_(torch.rand(part, generator=generator, device="cuda"))
    ends = [[t[:part].clone(), t[-part:].clone()] for t in whole]
    step = torch.ones((), device="cuda")
    arguments = (None, None, 1e-3, 0.9, 0.95, 1e-8, 0.1, True)
    adamw_step(*([t] for t in whole), [step], [], [], *arguments)
    adamw_step(*ends, [step, step], [], [], *arguments)
    for tensor, (first, last) in zip(whole, ends, strict=True):
        assert torch.equal(tensor[:part], first)
        assert torch.equal(tensor[-part:], last)
    assert not torch.equal(whole[0][:part], whole[1][:part])


def parameters():
    generator = torch.Generator().manual_seed(1)
    shapes = [(1024, 512), (512,), (1000, 333)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).cuda()) for shape in shapes]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).cuda()


def test_twenty_clipped_steps_follow_fused():
    """torch's kernel has 1 - beta of betas in fp32, off by up to 2.4e-7 of it; the rest is rounding."""
    mine, theirs = parameters(), parameters()
    one_pass = OnePassAdamW(mine, **SETTINGS)
    fused = torch.optim.AdamW(theirs, **SETTINGS, fused=True)
    for step in range(20):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        norm, factor = clip_for(one_pass, mine, 1.0)
        one_pass.step(grad_scale=factor)
        other, _ = clip_for(fused, theirs, 1.0)
        fused.step()
        assert norm.item() == other.item()
    for left, right in zip(mine, theirs, strict=True):
        own, other = one_pass.state[left], fused.state[right]
        assert {key: t.device for key, t in own.items()} == {key: t.device for key, t in other.items()}
        assert own["step"].item() == other["step"].item() == 20.0
        largest = other["exp_avg"].abs().max().item()
        torch.testing.assert_close(own["exp_avg"], other["exp_avg"], rtol=0, atol=3e-6 * largest)
        torch.testing.assert_close(own["exp_avg_sq"], other["exp_avg_sq"], rtol=3e-6, atol=0)
        torch.testing.assert_close(left, right, rtol=2e-6, atol=5e-6)


def test_a_step_takes_no_memory_and_waits_for_nothing():
    params = parameters()
    optimizer = OnePassAdamW(params, **SETTINGS)
    give_gradients(params, 0)
    bad = torch.zeros((), device="cuda")
    _, factor = clip_for(optimizer, params, 1.0)
    gated_step(optimizer, bad, factor)  # makes the moments, compiles the kernels
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, factor = clip_for(optimizer, params, 1.0)
        gated_step(optimizer, bad, factor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 2**16


def test_norm_of_bf16_gradients_is_of_fp32():
    params = parameters()
    give_gradients(params, 0)
    for param in params:
        grad, param.grad = param.grad.bfloat16(), None
        param.grad_dtype = BF16
        param.grad = grad
    norm, _ = clip_for(OnePassAdamW(params, **SETTINGS), params, 1.0)
    exact = torch.cat([p.grad.flatten().double() for p in params]).norm().item()
    assert norm.dtype == F32
    assert norm.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("flags", [(), ("--compile.enable",)])
def test_a_run_follows_fused(train, flags):
    def losses(implementation):
        env = {"CUDA_VISIBLE_DEVICES": "0"}
        flag = f"--optimizer.implementation={implementation}"
        return train(*flags, flag, "--training.steps=10", env=env, name=implementation).losses

    assert losses("one_pass") == pytest.approx(losses("fused"), rel=2e-3)
