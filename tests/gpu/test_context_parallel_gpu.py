"""Context parallelism on CUDA: kernels that give log-sum-exp merge to plain attention; runs on two GPUs."""

import pytest
import torch
import torch.nn.functional as F

from parallelisms.partial_attention import attend, attend_backward, merge

pytestmark = pytest.mark.gpu


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("flash", torch.bfloat16, 8e-3),
        ("cudnn", torch.bfloat16, 8e-3),
        ("math", torch.bfloat16, 8e-3),
        ("auto", torch.float32, 2e-3),
    ],
)
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_parts_merge_to_the_whole(backend, dtype, tolerance, kv_heads):
    """The later half of the queries: causal over its own keys, all of the earlier ones (strided views)."""
    S, half = 1024, 512
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(2, S, heads, 64, generator=generator).to("cuda", dtype).transpose(1, 2)
        for heads in (8, kv_heads, kv_heads, 8)
    )
    whole = [t.double().requires_grad_() for t in (q, k, v)]
    want = F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
    want[:, :, half:].backward(grad[:, :, half:].double())
    late, early = slice(half, None), slice(0, half)
    out, lse = attend(q[:, :, late], k[:, :, late], v[:, :, late], True, backend)
    out, lse = out.float(), lse.clone()
    merge(out, lse, *attend(q[:, :, late], k[:, :, early], v[:, :, early], False, backend))
    assert relative(out, want.detach()[:, :, late]) < tolerance
    final, total = (out.to(dtype), lse.contiguous()), torch.zeros_like(q[:, :, late], dtype=torch.float32)
    for keys, causal in ((late, True), (early, False)):
        parts = attend_backward(
            grad[:, :, late], q[:, :, late], k[:, :, keys], v[:, :, keys], *final, causal, backend
        )
        total += parts[0]
        assert relative(parts[1], whole[1].grad[:, :, keys]) < 2 * tolerance
        assert relative(parts[2], whole[2].grad[:, :, keys]) < 2 * tolerance
    assert relative(total, whole[0].grad[:, :, late]) < 2 * tolerance


@pytest.mark.multi_gpu
@pytest.mark.parametrize("rotate", ["allgather", "alltoall"])
def test_two_gpus_train_as_one(train, rotate):
    """Compiled, with per-op recomputation, in bf16; and with documents kept apart."""
    flags = [
        "--compile.enable",
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=op",
        "--training.seq_len=512",
        "--training.steps=20",
    ]
    if rotate == "allgather":
        flags.append("--model.overrides.attn_mask_type=document")
    spread = [
        "--parallelism.context_parallel_degree=2",
        f"--parallelism.context_parallel_rotate_method={rotate}",
    ]
    one = train(*flags, env={"CUDA_VISIBLE_DEVICES": "0"}, name="one")
    two = train(*flags, *spread, ngpu=2, env={"CUDA_VISIBLE_DEVICES": "0,1"}, name="two")
    assert two.differences(one)["loss"] < 5e-3
    assert two.differences(one)["grad_norm"] < 3e-2
