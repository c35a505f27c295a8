from dataclasses import replace

import pytest
import torch

from models.attention import InnerAttention, document_mask
from models.llama3.config import Llama3Config
from models.llama3.model import Llama3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CONFIG = Llama3Config(
    dim=512, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=512, multiple_of=256, max_seq_len=512
)


def build(config, seed=0):
    with torch.device("meta"):
        model = Llama3(config)
    model.to_empty(device="cuda")
    torch.manual_seed(seed)
    model.init_weights()
    return model


def tokens():
    return torch.randint(512, (2, 512), generator=torch.Generator().manual_seed(1)).cuda()


def document_ids(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1).cuda()


def qkv(kv_heads=2, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = [(2, 8, 512, 64), (2, kv_heads, 512, 64), (2, kv_heads, 512, 64)]
    return [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]


def kernel_names(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return " ".join(event.key for event in profile.key_averages()).lower()


@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash", "efficient", "math"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_causal_backends_agree(backend, compiled, kv_heads):
    attention = InnerAttention(backend)
    if compiled:
        torch._dynamo.reset()
        attention.compile(fullgraph=True)
    q, k, v = qkv(kv_heads)
    out = attention(q, k, v)
    out.sum().backward()
    exact = [t.detach().double().cpu().requires_grad_() for t in (q, k, v)]
    expected = InnerAttention()(*exact)
    expected.sum().backward()
    torch.testing.assert_close(out.cpu().double(), expected, atol=2e-2, rtol=2e-2)
    for got, want in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(got.grad.cpu().double(), want.grad, atol=6e-2, rtol=6e-2)
    names = kernel_names(lambda: attention(q, k, v))
    wanted = {"auto": "cudnn", "cudnn": "cudnn", "flash": "flash_fwd", "efficient": "fmha", "math": "softmax"}
    assert wanted[backend] in names, names


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", [(512,), (100, 300, 112)])
def test_flex_equals_dense_document_mask(compiled, lengths):
    torch._dynamo.reset()
    attention = InnerAttention()
    if compiled:
        attention.compile(fullgraph=True)
    q, k, v = qkv()
    ids = document_ids(*lengths)
    out = attention(q, k, v, document_mask(ids))
    out.sum().backward()
    exact = [t.detach().double().cpu().requires_grad_() for t in (q, k, v)]
    expected = InnerAttention()(*exact, document_mask(ids.cpu()))
    expected.sum().backward()
    torch.testing.assert_close(out.cpu().double(), expected, atol=2e-2, rtol=2e-2)
    for got, want in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(got.grad.cpu().double(), want.grad, atol=6e-2, rtol=6e-2)


@pytest.mark.parametrize("mask_type", ["causal", "document"])
def test_compiled_model_equals_eager_and_compiles_once(mask_type):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = replace(CONFIG, attn_mask_type=mask_type)
    eager, compiled = (build(config).to(torch.bfloat16) for _ in range(2))
    for block in compiled.layers.values():
        block.compile(fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((512,), (100, 300, 112), (256, 256)):
            ids = document_ids(*lengths)
            expected, got = eager(tokens(), ids), compiled(tokens(), ids)
            torch.testing.assert_close(got.float(), expected.float(), atol=0.1, rtol=0.05)
            got.float().mean().backward()


def test_document_model_equals_cpu():
    config = replace(CONFIG, attn_mask_type="document")
    model = build(config)
    on_cpu = Llama3(config)
    on_cpu.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    ids = document_ids(100, 300, 112)
    with torch.no_grad():
        got, expected = model(tokens(), ids).cpu(), on_cpu(tokens().cpu(), ids.cpu())
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


def test_init_is_deterministic_and_truncated():
    one, two = build(CONFIG, seed=3), build(CONFIG, seed=3)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    weight = one.layers["0"].attention.wq.weight
    assert 0.058 < weight.abs().max().item() <= 0.0600001
    assert one.rope.cos.is_cuda
