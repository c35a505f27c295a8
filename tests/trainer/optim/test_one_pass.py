"""The one-pass optimizers against torch's fused ones: the same bits, the same state, the same clipping."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from converters.float8.fsdp import FSDPFloat8Shard, GatherSettings
from tests.ranks import run_ranks
from trainer.config.errors import ConfigError
from trainer.optim import optimizer as building
from trainer.optim.clipping import clip_for, clip_grad_norm
from trainer.optim.config import OptimizerConfig
from trainer.optim.one_pass import OnePassAdam, OnePassAdamW
from trainer.resilience.bad_steps import gated_step

SHAPES = [(32, 16), (16,), (8, 4, 16)]
"""Whole vectors of 16: there torch's fused optimizer and this one have the same bits."""
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLASSES = [(OnePassAdamW, torch.optim.AdamW), (OnePassAdam, torch.optim.Adam)]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params, step, dtype=None):
    """The gradients of `step`: the same for all that ask; longer than a norm of 1."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(dtype or param.dtype)
        if dtype is not None:
            param.grad_dtype = dtype
        param.grad = grad


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def state_of(optimizer, params):
    """Every tensor of the state, in one order."""
    assert all(list(optimizer.state[p]) == ["step", "exp_avg", "exp_avg_sq"] for p in params)
    return [tensor for p in params for tensor in optimizer.state[p].values()]


@pytest.mark.parametrize(("ours", "torchs"), CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_clipped_steps_have_the_bits_of_fused(ours, torchs, dtype):
    """fp32: bits. bf16: clipping first rounds the gradients to bf16, so without it."""
    max_norm = 1.0 if dtype == torch.float32 else 0.0
    mine, theirs = parameters(dtype), parameters(dtype)
    one_pass, fused = ours(mine, **SETTINGS), torchs(theirs, **SETTINGS, fused=True)
    for step in range(50):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        for group in [*one_pass.param_groups, *fused.param_groups]:
            group["lr"] = 1e-2 / (1 + step)
        kept = [p.grad.clone() for p in mine]
        norm, factor = clip_for(one_pass, mine, max_norm)
        one_pass.step(grad_scale=factor)
        assert equal(kept, [p.grad for p in mine])
        other_norm, nothing = clip_for(fused, theirs, max_norm)
        fused.step()
        assert nothing is None
        assert float(norm) == float(other_norm) > 10
    assert equal(mine, theirs)
    assert equal(state_of(one_pass, mine), state_of(fused, theirs))
    assert {t.dtype for t in state_of(one_pass, mine)} == {torch.float32, dtype}


@pytest.mark.parametrize(("ours", "torchs"), CLASSES)
@pytest.mark.parametrize("fused", [True, False])
def test_state_goes_to_torchs_optimizer_and_back(ours, torchs, fused):
    """Three steps each of torch's, ours, torch's: as nine of ours, also where torch's step is on the host."""
    kinds = [(torchs, {"fused": fused}), (ours, {}), (torchs, {"fused": fused})]
    mine, theirs = parameters(), parameters()
    whole, saved = ours(mine, **SETTINGS), None
    for turn, (kind, extra) in enumerate(kinds):
        optimizer = kind(theirs, **SETTINGS, **extra)
        if saved is not None:
            hyperparameters = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(saved if kind is ours else {**saved, "param_groups": hyperparameters})
        for step in range(3 * turn, 3 * turn + 3):
            for params, own in ((mine, whole), (theirs, optimizer)):
                give_gradients(params, step)
                own.step()
        if kind is ours:
            assert all(group["fused"] for group in optimizer.param_groups)
        saved = optimizer.state_dict()
    assert {float(state["step"]) for state in optimizer.state.values()} == {9.0}
    if fused:
        assert equal(mine, theirs)
        assert equal(state_of(whole, mine), state_of(optimizer, theirs))
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_state_of_other_rules_is_refused():
    params = parameters()
    give_gradients(params, 0)
    other = torch.optim.AdamW(params, amsgrad=True)
    other.step()
    with pytest.raises(ValueError, match="neither amsgrad"):
        OnePassAdamW(params, **SETTINGS).load_state_dict(other.state_dict())


def test_gradients_in_bf16_of_parameters_in_fp32():
    """As their values in fp32; the norm is of fp32 too, also where gradients are of both dtypes."""
    mine, theirs = parameters(), parameters()
    one_pass, fused = OnePassAdamW(mine, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS, fused=True)
    for step in range(3):
        give_gradients(mine[:2], step, torch.bfloat16)
        give_gradients(mine[2:], 50)
        give_gradients(theirs, step)
        for param, other in zip(mine, theirs, strict=True):
            other.grad = param.grad.float()
        norm, factor = clip_for(one_pass, mine, 1.0)
        one_pass.step(grad_scale=factor)
        assert norm.dtype == torch.float32
        assert float(norm) == pytest.approx(float(clip_grad_norm(theirs, 1.0)), rel=1e-7)
        fused.step()
    assert mine[0].grad.dtype == torch.bfloat16
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_copies_and_magnitudes_follow_the_parameters():
    params = parameters()
    optimizer = OnePassAdamW(params, **SETTINGS)
    copies = [torch.zeros(p.shape, dtype=torch.bfloat16) for p in params[:2]]
    amaxes = [torch.zeros(()) for _ in params[1:]]
    optimizer.low_precision_copies = dict(zip(params[:2], copies, strict=True))
    optimizer.amaxes = dict(zip(params[1:], amaxes, strict=True))
    kept: list[torch.Tensor] = []
    for step in range(3):
        give_gradients(params, step)
        gated_step(optimizer, torch.tensor(float(step == 1)))
        if step == 1:
            assert equal(kept, [*params, *copies, *amaxes])
        kept = [t.detach().clone() for t in (*params, *copies, *amaxes)]
        assert equal(copies, [p.to(torch.bfloat16) for p in params[:2]])
        assert [float(a) for a in amaxes] == [float(p.detach().abs().max()) for p in params[1:]]


def test_a_written_float8_shard_forgets_its_scale():
    inner = torch.randn(16, 16)
    param = nn.Parameter(FSDPFloat8Shard(inner, GatherSettings(torch.float8_e4m3fn, False)))
    optimizer = OnePassAdamW([param], **SETTINGS)
    before = inner.clone()
    param.grad = torch.ones(16, 16)
    shard = param.data
    shard._scale = param._scale = torch.ones(())
    optimizer.step()
    assert param._scale is None
    plain = nn.Parameter(before)
    plain.grad = torch.ones(16, 16)
    OnePassAdamW([plain], **SETTINGS).step()
    assert torch.equal(inner, plain)


def test_one_pass_on_a_gpu_needs_triton(monkeypatch, caplog):
    config = OptimizerConfig(implementation="one_pass")
    assert type(building.build_optimizer(nn.Linear(2, 2), config)) is OnePassAdamW
    assert "on a CPU fused is faster" in caplog.text
    monkeypatch.setattr(building, "runs_triton", lambda device: False)
    with pytest.raises(ConfigError, match="needs Triton"):
        building._check_device(torch.device("cuda"))
    monkeypatch.setattr(building, "runs_triton", lambda device: True)
    building._check_device(torch.device("cuda"))


def sharded(mesh, placements):
    """`parameters` as DTensors, and one of which the last rank has nothing."""
    params = [*parameters(), nn.Parameter(torch.arange(3.0).view(1, 3))]
    return [
        nn.Parameter(distribute_tensor(p.detach(), mesh, [place]))
        for p, place in zip(params, placements, strict=True)
    ]


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    mine = sharded(mesh, [Shard(0), Replicate(), Shard(1), Shard(0)])
    settings = GatherSettings(torch.float8_e4m3fn, False)
    wrapped = mine[0]._local_tensor = FSDPFloat8Shard(mine[0]._local_tensor, settings)
    whole = [nn.Parameter(p.detach().full_tensor()) for p in mine[1:]]
    whole.insert(0, nn.Parameter(parameters()[0].detach()))
    optimizers = [kind(params, **SETTINGS) for kind, params in ((OnePassAdamW, mine), (OnePassAdamW, whole))]
    for step in range(5):
        give_gradients(whole, step)
        for p, q in zip(mine, whole, strict=True):
            p.grad = distribute_tensor(q.grad.clone(), mesh, p.placements)
        wrapped._scale = torch.ones(())
        norms = []
        for optimizer, params in zip(optimizers, (mine, whole), strict=True):
            norm, factor = clip_for(optimizer, params, 1.0)
            optimizer.step(grad_scale=factor)
            norms.append(float(norm))
        assert norms[0] == pytest.approx(norms[1], rel=1e-7)
        assert wrapped._scale is None
    gathered = [
        DTensor.from_local(wrapped._tensor, mesh, [Shard(0)]).full_tensor(),
        *(p.detach().full_tensor() for p in mine[1:]),
    ]
    moments = [optimizers[0].state[p]["exp_avg"].full_tensor() for p in mine]
    if rank == 0:
        other = [optimizers[1].state[p]["exp_avg"] for p in whole]
        found = [float((a - b).abs().max()) for a, b in zip(gathered + moments, whole + other, strict=True)]
        torch.save(found, f"{folder}/found")
    assert mine[3].to_local().numel() == (3 if rank == 0 else 0)
    dist.destroy_process_group()


def test_two_ranks_update_their_parts_as_one_updates_the_whole(tmp_path):
    run_ranks(worker, 2, str(tmp_path))
    found = torch.load(tmp_path / "found")
    assert len(found) == 8
    assert max(found) < 1e-7


def test_a_run_goes_on_with_the_other_implementation(prepare):
    """A checkpoint of three fused steps, three more of one_pass: as six of either; and back."""

    def run(name, implementation, steps, seed_from=None):
        flags = ["--checkpoint.enable", "--checkpoint.interval=3", f"--training.steps={steps}"]
        flags += ["--checkpoint.no-last_save_model_only", "--lr_scheduler.total_steps=6"]
        flags += [f"--optimizer.implementation={implementation}", "--training.max_norm=0.5"]
        return prepare(*flags, name=name).train()

    straight = {kind: run(kind, kind, 6) for kind in ("fused", "one_pass")}
    losses = {kind: result.losses[1] for kind, result in straight.items()}
    assert losses["one_pass"] == pytest.approx(losses["fused"], rel=1e-6)
    for first, then in (("fused", "one_pass"), ("one_pass", "fused")):
        run(f"mixed_{first}", first, 3)
        mixed = run(f"mixed_{first}", then, 6)
        assert mixed.losses[1] == pytest.approx(losses["fused"], rel=1e-6)
        state, wanted = mixed.state(), straight["fused"].state()
        assert state.keys() == wanted.keys()
        worst = max(float((state[key].double() - wanted[key].double()).abs().max()) for key in wanted)
        assert worst < 1e-6
        assert float(state["optimizer.norm.weight.step"]) == 6.0
