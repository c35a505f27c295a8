"""`fsdp_single_shard = "direct"`: the same training to the bit, with fewer copies."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from parallelisms.direct_weights import DirectWeights
from tests.parallelisms.test_fsdp import VOCAB, build
from trainer.checkpoint.state import model_tensors
from trainer.loss import cross_entropy_sum
from trainer.optim.clipping import clip_grad_norm

BF16 = torch.bfloat16
EMBEDDING = "tok_embeddings.weight"


@pytest.fixture(autouse=True)
def alone():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


class ReadsBf16(torch.optim.Optimizer):
    """Gradient descent that takes gradients in bf16 and writes the weights' bf16 copies itself."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.low_precision_copies = {}

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            assert p.dtype == torch.float32
            assert p.grad.dtype == BF16
            p.sub_(0.1 * p.grad.float())
            if p in self.low_precision_copies:
                self.low_precision_copies[p].copy_(p.to_local())


def batch(step):
    return torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(step))


def directly(optimizer_class=torch.optim.AdamW, tied=False, **options):
    how = {"reshard": False, "reduce_dtype": BF16, "gathers_embedding": False}
    model, _ = build((1, 1, 1), "torch", tied=tied, **how)
    direct = DirectWeights(model, BF16)
    optimizer = optimizer_class(model.parameters(), **options)
    direct.attach(optimizer)
    return model, optimizer, direct


def loss_of(model, step):
    tokens = batch(step)
    return cross_entropy_sum(model(tokens), tokens.roll(-1, 1)) / tokens.numel()


def train(model, optimizer, direct, before_update, after_update, steps=20):
    """Losses and norms."""
    found = []
    for step in range(steps):
        loss = loss_of(model, step)
        loss.backward()
        if direct is not None:
            direct.hand_over_gradients()
        norm = clip_grad_norm(model.parameters(), 0.5)
        before_update(step)
        optimizer.step()
        optimizer.zero_grad()
        after_update(step)
        found.append((loss.item(), norm.item()))
    return found


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def weights(model):
    return {name: p.detach().to_local().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_are_the_same_to_the_bit(tied):
    """With a save, a validation, a load and a skipped step among them."""
    plain, _ = build((1, 1, 1), "torch", tied=tied)
    plain_adamw = adamw(plain)
    model, optimizer, direct = directly(lr=1e-2, fused=True, tied=tied)
    seen = {id(plain): [], id(model): []}

    def run(which, optimizer, direct=None):
        def before_update(step):
            if step == 3:
                model_tensors(which)  # as a save does: FSDP2 frees what was gathered
            if step == 15:
                optimizer.found_inf = torch.ones(())  # as a bad step is skipped

        def after_update(step):
            if step == 4:
                model_tensors(which)
            if step in (4, 8, 12):
                with torch.no_grad():
                    seen[id(which)].append(loss_of(which, 100).item())
            if step == 12:
                for tensor in model_tensors(which).values():
                    tensor.detach().mul_(0.5)  # as a load does
            if step == 15:
                del optimizer.found_inf

        return train(which, optimizer, direct, before_update, after_update)

    want = run(plain, plain_adamw)
    got = run(model, optimizer, direct)
    assert got == want
    assert len({loss for loss, _ in got}) == 20
    assert seen[id(model)] == seen[id(plain)]
    for name, value in weights(plain).items():
        assert torch.equal(weights(model)[name], value), name


def held(model):
    return {id(p) for p in model.parameters()}


def test_modules_hold_the_optimizers_parameters_between_passes():
    model, optimizer, direct = directly(lr=1e-2)
    masters = held(model)
    loss = loss_of(model, 0)
    computing = [p for block in model.layers.values() for p in block.parameters()]
    assert all(p.dtype == BF16 and not isinstance(p, DTensor) for p in computing)
    pointers = [p.data_ptr() for p in computing]
    loss.backward()
    direct.hand_over_gradients()
    assert held(model) == masters
    assert all(p.grad is None for p in computing)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        loss_of(model, 1)
    assert held(model) == masters
    loss_of(model, 1)
    again = [p for block in model.layers.values() for p in block.parameters()]
    assert [p.data_ptr() for p in again] == pointers


def test_an_optimizer_that_reads_bf16_gets_autograds_gradients():
    """The same memory; and it writes the copies, but for those that a save has freed."""
    model, optimizer, direct = directly(ReadsBf16)
    expected, copies = weights(model), {}
    for step in range(4):
        loss = loss_of(model, step)
        loss.backward()
        computed = {p.grad.data_ptr() for name, p in model.named_parameters() if name != EMBEDDING}
        direct.hand_over_gradients()
        handed_over = {p.grad.to_local().data_ptr() for p in model.parameters()}
        assert computed < handed_over
        assert len(handed_over) == len(expected)
        for name, p in model.named_parameters():
            assert p.grad.dtype == BF16
            expected[name] -= 0.1 * p.grad.to_local().float()
        if step == 2:
            model_tensors(model)
        optimizer.step()
        assert len(optimizer.low_precision_copies) == (0 if step == 2 else len(expected) - 1)
        optimizer.zero_grad()
        copies |= optimizer.low_precision_copies
        with torch.no_grad():
            loss_of(model, 99)
        for name, p in model.named_parameters():
            assert torch.equal(p.detach().to_local(), expected[name]), (step, name)
            if name != EMBEDDING:
                assert torch.equal(copies[p].detach(), expected[name].to(BF16)), (step, name)
