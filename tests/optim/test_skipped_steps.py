"""last_norm, last_step_skipped and skipped_steps of an optimizer: what its policy says, or GradScaler without one."""

import math

import pytest
import torch
from lockstep import bits, copy_of, give_grads, make_params
from specs import SPECS
from torch import nn

import optim_ext
from optim_ext import LBFGS

FUSED = [spec for spec in SPECS if spec.fused]


def with_scaler(optimizer, model, steps, bad, **scaler):
    """Train, and note after each step what the optimizer says."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, **scaler)
    said = []
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((2, 3), math.inf if step in bad else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped = optimizer.last_step_skipped
        said.append((None if skipped is None else bool(skipped), int(optimizer.skipped_steps)))
    return said


@pytest.mark.parametrize("spec", FUSED, ids=lambda s: s.name)
def test_a_fused_step_that_the_scaler_has_skipped(spec):
    model = nn.Linear(3, 2)
    optimizer = spec.ours(model.parameters(), **copy_of(spec.typical), fused=True)
    assert optimizer.last_step_skipped is None and optimizer.skipped_steps == 0
    assert with_scaler(optimizer, model, 5, (0, 1, 3)) == [(True, 1), (True, 2), (False, 2), (True, 3), (False, 3)]
    assert optimizer.last_norm is None
    skipped, count = optimizer.last_step_skipped, optimizer.skipped_steps
    assert (skipped.dtype, skipped.shape, count.dtype, count.shape) == (torch.bool, (), torch.int64, ())
    count += 7
    assert optimizer.skipped_steps == 3


def test_the_same_under_a_policy():
    model = nn.Linear(3, 2)
    optimizer = optim_ext.AdamW(model.parameters(), fused=True, max_norm=1.0)
    assert with_scaler(optimizer, model, 3, (1,)) == [(False, 0), (True, 1), (False, 1)]
    assert optimizer.last_norm is optimizer.grad_policy.last_norm
    optimizer.set_grad_policy()
    assert optimizer.skipped_steps == 0  # by the scaler alone, while there is no policy


def test_a_step_that_is_not_fused_is_the_scalers_secret():
    """It does not take the step at all, which nothing tells the optimizer."""
    model = nn.Linear(3, 2)
    optimizer = optim_ext.AdamW(model.parameters())
    assert with_scaler(optimizer, model, 2, (1,)) == [(None, 0), (None, 0)]


def test_a_step_without_the_scaler_says_nothing():
    model = nn.Linear(3, 2)
    optimizer = optim_ext.AdamW(model.parameters(), fused=True)
    with_scaler(optimizer, model, 2, (1,))
    assert optimizer.last_step_skipped
    for step in range(3):  # the plan is repeated in the end
        give_grads(list(model.parameters()), step)
        optimizer.step()
        assert optimizer.last_step_skipped is None and optimizer.skipped_steps == 1
    assert with_scaler(optimizer, model, 1, (), enabled=False) == [(None, 1)]


def test_a_step_that_fails_has_not_been_skipped():
    params = make_params()
    optimizer = optim_ext.AdamW(params, fused=True)
    give_grads(params, 0)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(2)
    with pytest.raises((ValueError, RuntimeError), match="found_inf"):
        optimizer.step()
    assert optimizer.last_step_skipped is None and optimizer.skipped_steps == 0


def test_the_norm_of_a_clipped_step():
    params = make_params()
    optimizer = optim_ext.AdamW(params)
    give_grads(params, 0)
    norm = optimizer.clip_grad_norm(1.0)
    assert optimizer.last_norm is None  # of a step
    optimizer.step()
    assert bits(optimizer.last_norm) == bits(norm)
    give_grads(params, 1)
    optimizer.step()
    assert bits(optimizer.last_norm) == bits(norm)  # the last step that took one
    policy = optimizer.set_grad_policy(max_norm=1.0)
    assert optimizer.last_norm is None
    optimizer.step()
    assert optimizer.last_norm is policy.last_norm is not None


def test_lbfgs_has_its_policys():
    param = nn.Parameter(torch.ones(3))
    optimizer = LBFGS([param], skip_nonfinite=True)

    def closure():
        optimizer.zero_grad()
        loss = (param * math.nan).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last_step_skipped and optimizer.skipped_steps == 1 and optimizer.last_norm.isnan()
    plain = LBFGS([param])
    assert plain.last_norm is None and plain.last_step_skipped is None and plain.skipped_steps == 0


def test_a_scheduler_that_waits_for_a_step():
    """The line for accelerate's wrapper, which cannot see that a fused step was skipped."""
    model = nn.Linear(3, 2)
    optimizer = optim_ext.SGD(model.parameters(), lr=1.0, fused=True)
    scheduler = optim_ext.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for bad, rate in ((False, 0.5), (True, 0.5), (False, 0.25)):
        with_scaler(optimizer, model, 1, (0,) if bad else ())
        if not optimizer.last_step_skipped:
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == rate
