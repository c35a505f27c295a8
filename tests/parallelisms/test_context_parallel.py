"""Ring attention over gloo processes against plain attention; merging of parts against the whole."""

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from models.attention import InnerAttention, document_mask
from parallelisms import context_parallel, ring_attention
from parallelisms.activation_checkpoint import apply_activation_checkpoint
from parallelisms.config import ActivationCheckpointConfig, ParallelismConfig
from parallelisms.context_parallel import SequenceShards, apply_context_parallel, check_attention
from parallelisms.partial_attention import attend, attend_backward, merge
from tests.ranks import run_ranks

B, H, H_KV, S, DH = 2, 4, 2, 32, 16
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 13 + [2] * 14, [0] * 20 + [1] * 12])
CASES = list(
    itertools.product(("allgather", "alltoall"), (True, False), (torch.float32, torch.bfloat16), (2, 4))
)


def qkv(dtype, kv_heads, length=S):
    """q, k, v of whole sequences and the gradient of the output, laid out as a model makes them."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(B, length, heads, DH) for heads in (H, kv_heads, kv_heads, H)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def whole(q, k, v, grad, mask=None):
    """Output and gradients of plain attention in fp64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    out.backward(grad.double())
    return out.detach(), q.grad, k.grad, v.grad


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


# Parts of the keys, on one process.


@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_parts_merge_to_the_whole(backend, kv_heads):
    """Two halves of the keys, for the later half of the queries."""
    q, k, v, grad = qkv(torch.float32, kv_heads)
    want = whole(q, k, v, grad)
    late, half = slice(S // 2, None), S // 2
    out, lse = (t.clone() for t in attend(q[:, :, late], k[:, :, late], v[:, :, late], True, backend))
    merge(out, lse, *attend(q[:, :, late], k[:, :, :half], v[:, :, :half], False, backend))
    assert relative(out, want[0][:, :, late]) < 1e-6
    final = (out, lse.contiguous())
    own = attend_backward(
        grad[:, :, late], q[:, :, late], k[:, :, late], v[:, :, late], *final, True, backend
    )
    first = attend_backward(
        grad[:, :, late], q[:, :, late], k[:, :, :half], v[:, :, :half], *final, False, backend
    )
    assert relative(own[0] + first[0], want[1][:, :, late]) < 1e-6
    assert relative(own[1], want[2][:, :, late]) < 1e-6  # only late queries see late keys
    assert relative(own[2], want[3][:, :, late]) < 1e-6


def test_balanced_chunks_meet_in_equal_amounts():
    """Every rank's queries meet about as many keys under the balanced layout, and none twice."""
    T = 16
    for balanced in (True, False):
        work = []
        for rank in range(4):
            ring = ring_attention._Ring("", rank, 4, balanced)
            met = 0
            for source in range(4):
                if part := ring.part(source, T):
                    rows, keys, causal = part
                    pairs = len(range(T)[rows]) * len(range(T)[keys])
                    met += T * (T + 1) // 2 if causal else pairs
            work.append(met)
        assert sum(work) == 64 * 65 // 2  # every causal pair of 64 positions once
        assert (len(set(work)) == 1) == balanced, work


# The ring, over processes.


class Recorder:
    """Elements handed to collectives, by name; the collectives themselves are real."""

    def __init__(self, ops):
        self.ops, self.sent = ops, {}

    def __getattr__(self, name):
        op = getattr(self.ops, name)
        if name == "wait_tensor":
            return op

        def record(t, *args):
            self.sent[name] = self.sent.get(name, 0) + t.numel()
            return op(t, *args)

        return record


def settings(rotate, balanced):
    return ParallelismConfig(
        context_parallel_rotate_method=rotate, context_parallel_load_balancer="headtail" if balanced else None
    )


def attention(mesh, rotate, balanced):
    holder = torch.nn.ModuleDict({"inner": InnerAttention()})
    apply_context_parallel(holder, "inner", mesh, settings(rotate, balanced))
    return holder["inner"]


def spread(mesh, rotate, balanced, tensors, *, mask=False, compiled=False):
    """Relative errors of this rank's rows of (out, dq, dk, dv)."""
    positions = SequenceShards([], mesh, settings(rotate, balanced)).positions(S)
    every = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
    same = DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None]
    want = whole(*tensors, mask=every & same if mask else None)
    q, k, v = (t.detach()[:, :, positions].requires_grad_() for t in tensors[:3])
    module = attention(mesh, rotate, balanced)
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    out = run(q, k, v, document_mask(DOCUMENTS, positions) if mask else None)
    out.backward(tensors[3][:, :, positions])
    return [
        relative(g, w[:, :, positions])
        for g, w in zip((out.detach(), q.grad, k.grad, v.grad), want, strict=True)
    ]


def sent(mesh, rotate):
    """Elements per collective in one forward and backward of the grouped attention."""
    recorder = Recorder(ring_attention._c10d)
    ring_attention._c10d = recorder
    spread(mesh, rotate, True, qkv(torch.float32, H_KV))
    ring_attention._c10d = recorder.ops
    return recorder.sent


def sent_with_recomputation(mesh, **mode):
    """Elements gathered in one forward and backward of a checkpointed attention."""
    blocks = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"0": attention(mesh, "allgather", True)})})
    apply_activation_checkpoint(blocks, "layers", ActivationCheckpointConfig(**mode))
    recorder = Recorder(ring_attention._c10d)
    ring_attention._c10d = recorder
    q, k, v, grad = (t[:, :, : S // mesh.size()].detach() for t in qkv(torch.float32, H_KV))
    blocks["layers"]["0"](q.requires_grad_(), k, v).backward(grad)
    ring_attention._c10d = recorder.ops
    return recorder.sent["all_gather_into_tensor"]


def checked(mesh):
    """torch's own checks of a custom op: schema, fake implementation, autograd registration."""
    q, k, v, _ = (t[:, :, : S // mesh.size()].detach().requires_grad_() for t in qkv(torch.float32, H_KV))
    group = mesh.get_group().group_name
    torch.library.opcheck(ring_attention.ring_attention.overload, (q, k, v, group, "alltoall", True, "auto"))
    kv = torch.stack((k, v)).detach().requires_grad_()
    torch.library.opcheck(context_parallel.gather_sequence.overload, (kv, group, True))


def worker(rank, size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp_shard", "cp"))["cp"]
    found = {case: spread(mesh, case[0], case[1], qkv(*case[2:])) for case in CASES}
    for balanced in (True, False):
        documents = qkv(torch.float32, H_KV)
        found["documents", balanced] = spread(mesh, "allgather", balanced, documents, mask=True)
    for rotate in ("allgather", "alltoall"):
        if size == 2:  # compiling takes long, and more processes show no more
            found["compiled", rotate] = spread(mesh, rotate, True, qkv(torch.float32, H_KV), compiled=True)
        found["sent", rotate] = sent(mesh, rotate)
    found["saved"] = sent_with_recomputation(mesh, mode="selective", selective_ac_option="op")
    found["recomputed"] = sent_with_recomputation(mesh, mode="full")
    if size == 2:
        checked(mesh)
    every = [None] * size
    dist.all_gather_object(every, found)
    if rank == 0:
        torch.save(every, f"{folder}/found")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def found(request):
    """(processes, what each of them found)."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(worker, request.param, request.param, folder)
        every = torch.load(Path(folder) / "found", weights_only=False)
    return SimpleNamespace(size=request.param, every=every)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_output_and_gradients_equal_plain_attention(found, dtype):
    """Both ways to travel, balanced or not, grouped heads or not; bf16 to its rounding."""
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    for case in CASES:
        if case[2] == dtype:
            for errors in found.every:
                assert max(errors[case]) < tolerance, (case, errors[case])


def test_documents_stay_apart(found):
    for balanced, errors in itertools.product((True, False), found.every):
        assert max(errors["documents", balanced]) < 1e-6


def test_one_graph_with_the_compiler(found):
    compiled = [errors for each in found.every for key, errors in each.items() if key[0] == "compiled"]
    assert len(compiled) == (4 if found.size == 2 else 0)
    for errors in compiled:
        assert max(errors) < 1e-6


def test_only_key_heads_travel(found):
    """Elements as the head of parallelisms/ring_attention.py says, of H_KV heads."""
    part = 2 * B * S // found.size * H_KV * DH
    for errors in found.every:
        gathered = errors["sent", "allgather"]
        assert gathered == {"all_gather_into_tensor": 2 * part, "reduce_scatter_tensor": found.size * part}
        steps = (found.size - 1) * 2 + found.size
        assert errors["sent", "alltoall"] == {"all_to_all_single": steps * part}


def test_per_op_checkpointing_keeps_the_result(found):
    """Forward and backward gather; recomputing a whole block gathers once more."""
    part = 2 * B * S // found.size * H_KV * DH
    assert {errors["saved"] for errors in found.every} == {2 * part}
    assert {errors["recomputed"] for errors in found.every} == {3 * part}


# Who holds what.


@pytest.mark.parametrize(("balanced", "rows"), [(True, [4, 5, 6, 7, 8, 9, 10, 11]), (False, range(8, 16))])
def test_shards_of_a_sequence(balanced, rows):
    placed = []

    class Positioned(torch.nn.Module):
        def set_positions(self, positions):
            placed.append(positions.tolist())

    mesh = SimpleNamespace(size=lambda: 2, get_local_rank=lambda: 1)
    shards = SequenceShards([Positioned()], mesh, settings("allgather", balanced))
    tokens = torch.arange(32).view(2, 16)
    mine, labels = shards.shard(tokens, -tokens)
    assert mine.tolist() == [list(rows), [16 + row for row in rows]]
    assert torch.equal(labels, -mine)
    shards.shard(tokens)
    shards.shard(tokens[:, :8])
    assert [len(p) for p in placed] == [8, 4]  # once per length
    assert placed[0] == list(rows)


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'layers\.\*\.attn' matches no module"):
        check_attention(torch.nn.Linear(1, 1), "layers.*.attn")
