"""R11: a bad step changes nothing, is counted, and names its batch and module."""

import pytest
import torch

from trainer.resilience.bad_steps import BadSteps, BadStepsError, gated_step
from trainer.resilience.config import ResilienceConfig


def spoil(run, steps, value=float("nan"), fqn="layers.1.feed_forward.w2.weight"):
    """Put `value` into one element of a parameter's gradient in `steps`, before clipping."""
    trainer = run.trainer
    parameter = dict(trainer.model.named_parameters())[fqn]
    clean = trainer.forward.forward_backward

    def forward_backward(batch, valid, last):
        loss = clean(batch, valid, last=last)
        if trainer.step in steps:
            parameter.grad.to_local()[0, 3] = value
        return loss

    trainer.forward.forward_backward = forward_backward


def snapshots(run, monkeypatch):
    """State before and after the optimizer's turn, by step."""
    trainer, taken = run.trainer, {}
    step = trainer.faults.optimizer_step

    def observed(*arguments):
        before = run.state()
        step(*arguments)
        taken[trainer.step] = (before, run.state())

    monkeypatch.setattr(trainer.faults, "optimizer_step", observed)
    return taken


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("implementation", ["fused", "foreach", "one_pass"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_no_bit_and_is_named(prepare, monkeypatch, value, implementation):
    run = prepare(f"--optimizer.implementation={implementation}")
    spoil(run, {3, 5}, value)
    taken = snapshots(run, monkeypatch)
    run.train()
    assert [step for step, (before, after) in taken.items() if equal(before, after)] == [3, 5]
    steps = [float(state["step"]) for state in run.trainer.optimizer.state.values()]
    assert set(steps) == {4.0}
    assert run.trainer.faults.bad_steps.skipped == 2
    assert "bad step 3 skipped: grad_norm" in run.log
    assert "the gradient of layers.1.feed_forward.w2.weight was the first that is not finite (1 of" in run.log
    assert "batch: sequences 8 to 11, from python_sources epoch 0" in run.log  # two steps of four before it
    assert "2 skipped so far, 1 in a row" in run.log
    assert all(torch.isfinite(tensor).all() for tensor in run.state().values())


def test_a_run_without_bad_steps_is_the_same_with_and_without_the_gate(prepare):
    gated = prepare(name="gated").train()
    losses, state = gated.losses, gated.state()
    plain = prepare("--no-resilience.skip_bad_steps", name="plain").train()
    assert losses == plain.losses
    assert equal(state, plain.state())


def test_a_forward_pass_that_is_not_finite_names_the_block(prepare):
    run = prepare()
    trainer = run.trainer

    def spoiled(module, inputs, output):
        return output * float("inf") if trainer.step == 4 else output

    trainer.model.layers["1"].attention.register_forward_hook(spoiled)
    run.train()
    assert "bad step 4 skipped: grad_norm nan: the output of layers.1 was the first" in run.log


def test_a_spoiled_loss_is_told_from_a_spoiled_gradient(prepare):
    run = prepare()
    clean = run.trainer.forward._runner.loss_fn
    run.trainer.forward._runner.loss_fn = lambda logits, labels: (
        clean(logits, labels) * (float("nan") if run.trainer.step == 2 else 1)
    )
    run.train()
    assert "gradients are not finite, from output.weight on: so was the loss" in run.log


def test_bad_steps_in_a_row_end_the_run(prepare):
    run = prepare("--resilience.max_bad_steps=2")
    spoil(run, {2, 4, 5})
    with pytest.raises(BadStepsError, match="2 bad steps in a row") as caught:
        run.train()
    assert run.trainer.step == 5
    assert "layers.1.feed_forward.w2.weight" in str(caught.value)
    assert "sequences 16 to 19" in str(caught.value)


def test_a_roll_back_goes_on_with_the_data_that_follows(prepare):
    flags = ("--checkpoint.enable", "--checkpoint.interval=2", "--training.steps=8")
    flags += ("--resilience.max_bad_steps=2", "--resilience.after_bad_steps=roll_back")
    run = prepare(*flags)
    trainer, windows = run.trainer, []
    spoil(run, {3, 4})
    clean = trainer.forward.forward_backward

    def once(batch, valid, last):
        windows.append((trainer.step, trainer.data.windows))
        if windows.count((4, 16)) == 2:  # the second micro-batch of the second bad step: it happens once
            loss = clean(batch, valid, last=last)
            del trainer.forward.forward_backward  # the method itself again
            return loss
        return clean(batch, valid, last=last)

    trainer.forward.forward_backward = once
    run.train()
    assert "rolled back from step 4 to step 2; the data goes on from where it is" in run.log
    assert trainer.step == 8
    assert trainer.data.windows == 4 * (8 + 2)  # what the two bad steps had is not read again
    assert run.losses[0] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert trainer.faults.bad_steps.skipped == 2


def test_without_a_checkpoint_there_is_no_way_back(prepare):
    flags = ("--checkpoint.enable", "--checkpoint.interval=5")
    run = prepare(*flags, "--resilience.max_bad_steps=1", "--resilience.after_bad_steps=roll_back")
    spoil(run, {3})
    with pytest.raises(BadStepsError, match="no checkpoint to roll back to"):
        run.train()


def judged(losses, factor):
    """Which of `losses` a guard skips, with an optimizer of one parameter."""
    guard = BadSteps(ResilienceConfig(loss_spike_factor=factor, max_bad_steps=0), None, lambda t: t)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    skipped = []
    for step, loss in enumerate(losses, 1):
        parameter.grad = torch.ones(2)
        before, count = parameter.detach().clone(), guard.skipped
        norms = guard.new_norms()
        norms.parts.append(([0], torch.tensor([1.0])))
        guard.step(
            optimizer,
            [("weight", parameter)],
            loss=torch.tensor(loss),
            norm=torch.tensor(1.0),
            norms=norms,
            step=step,
            batch="sequences 0 to 3",
        )
        assert torch.equal(before, parameter.detach()) == (guard.skipped > count)
        if guard.skipped > count:
            skipped.append(step)
    return skipped, guard


def test_a_tenfold_loss_is_skipped_and_does_not_move_the_mean(caplog):
    usual = [2.0 + 0.1 * (step % 3) for step in range(30)]
    spikes = [*usual[:25], 20.0, *usual[25:], 23.0]
    skipped, guard = judged(spikes, 5.0)
    assert skipped == [26, 32]
    assert "loss 20.0000 is 9.5 times the running mean 2.0957" in caplog.text
    assert guard.state_dict()["mean_loss"] == judged(usual, 5.0)[1].state_dict()["mean_loss"]
    assert judged(spikes, 0.0)[0] == []
    assert judged([20.0, *usual], 5.0)[0] == []  # too early to tell


def test_a_resumed_guard_judges_as_the_unbroken_one():
    losses = [2.0 + 0.1 * (step % 3) for step in range(30)]
    _, guard = judged(losses, 5.0)
    other = BadSteps(ResilienceConfig(loss_spike_factor=5.0), None, lambda t: t)
    other.load_state_dict(guard.state_dict())
    values = [g._judge(torch.tensor(11.0), torch.tensor(1.0)).tolist() for g in (guard, other)]
    assert values[0] == values[1]
    assert values[0][0] == 1.0


@pytest.mark.parametrize("fused", [True, False])
def test_a_shut_gate_leaves_the_optimizer_as_it_was(fused):
    parameter = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([parameter], fused=fused, weight_decay=0.1)
    parameter.grad = torch.randn(5)
    gated_step(optimizer, torch.zeros(()))
    kept = [parameter.detach().clone(), *(v.clone() for v in optimizer.state[parameter].values())]
    parameter.grad = torch.full((5,), float("nan"))
    gated_step(optimizer, torch.ones(()))
    now = [parameter.detach(), *optimizer.state[parameter].values()]
    assert all(torch.equal(left, right) for left, right in zip(kept, now, strict=True))
    assert not hasattr(optimizer, "found_inf")
