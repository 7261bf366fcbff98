"""Several optimizers on one model that clip and skip by one norm: clip_optimizers and share_grad_policy."""

import copy
import math
import pickle

import pytest
import torch
from device import DEVICE
from lockstep import bits, give_grads, make_params, random, snapshot

import optim_ext
from optim_ext import utils


def pair(params, **options):
    """Muon for the matrices and AdamW for the rest, as they are used together."""
    matrices = [p for p in params if p.ndim == 2]
    rest = [p for p in params if p.ndim != 2]
    return [optim_ext.Muon(matrices, lr=0.1), optim_ext.AdamW(rest, lr=0.1, **options)]


def step_all(optimizers):
    for optimizer in optimizers:
        optimizer.step()


def clip_by_call(optimizers, max_norm, norm_type):
    return lambda: utils.clip_optimizers(optimizers, max_norm, norm_type)


def clip_by_policy(optimizers, max_norm, norm_type):
    policy = utils.share_grad_policy(optimizers, max_norm=max_norm, norm_type=norm_type)
    return lambda: policy


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("clip", [clip_by_call, clip_by_policy])
def test_equals_torch_over_all_parameters(clip, norm_type):
    params, twins = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    ours, plain = pair(params), pair(twins)
    arm = clip(ours, 0.5, norm_type)
    for step in range(4):
        for own in (params, twins):
            give_grads(own, step)
        result = arm()
        with_gradients = [p for p in twins if p.numel()]  # torch has no largest element of nothing
        expected = torch.nn.utils.clip_grad_norm_(with_gradients, 0.5, norm_type)
        step_all(ours[:: 1 if step < 2 else -1]), step_all(plain)  # in any order
        norm = result if isinstance(result, torch.Tensor) else result.last_norm
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_one_norm_is_taken_for_a_round_of_a_policy(monkeypatch):
    params = make_params()
    optimizers = pair(params)
    policy = utils.share_grad_policy(optimizers, max_norm=0.5)
    taken = []
    take = optim_ext._joint.norm_of_all
    monkeypatch.setattr(optim_ext._joint, "norm_of_all", lambda *given: taken.append(1) or take(*given))
    for step in range(3):
        give_grads(params, step)
        step_all(optimizers)
        assert len(taken) == step + 1 and optimizers[0].grad_policy is policy is optimizers[1].grad_policy


@pytest.mark.parametrize("bad", [math.nan, 1e6])
@pytest.mark.parametrize("first", [0, 1])
def test_all_are_skipped_by_what_one_of_them_has(bad, first):
    params = make_params()
    optimizers = pair(params)[:: 1 if first == 0 else -1]
    policy = utils.share_grad_policy(optimizers, skip_nonfinite=True, skip_above=1e3)
    give_grads(params, 0)
    step_all(optimizers)
    give_grads(params, 1)
    optimizers[1].param_groups[0]["params"][0].grad.fill_(bad)
    before = [snapshot(optimizer) for optimizer in optimizers]
    step_all(optimizers)
    assert [snapshot(optimizer) for optimizer in optimizers] == before
    assert policy.skipped_steps == 1 and policy.last_step_skipped
    give_grads(params, 2)
    step_all(optimizers)
    assert policy.skipped_steps == 1 and not policy.last_step_skipped


def scaled_run(how, unscale, clip, iterations=5):
    """Two optimizers under one GradScaler; `how` they are made decides where gradients are unscaled."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    optimizers = [
        optim_ext.AdamW(model[i].parameters(), lr=0.01, fused=fused) for i, fused in zip((0, 2), how, strict=True)
    ]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, growth_interval=2)
    arm = clip(optimizers, 0.1, 2.0) if clip else lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    norms = []
    for i in range(iterations):
        scaler.scale((model(random((4, 8), torch.float32, i)) - 1).square().mean()).backward()
        if unscale:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        result = arm()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        norms.append(float(result if isinstance(result, torch.Tensor) else result.last_norm))
        model.zero_grad()
    return norms, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("clip", [clip_by_call, clip_by_policy])
@pytest.mark.parametrize(
    ("how", "unscale"),
    [((False, False), True), ((True, True), True), ((True, False), True), ((True, True), False)],
    ids=["unscaled before", "fused, unscaled before", "one fused, unscaled before", "fused, unscaled in the step"],
)
def test_under_a_scaler(clip, how, unscale):
    expected = scaled_run((False, False), True, None)
    for ours, theirs in zip(scaled_run(how, unscale, clip), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [clip_by_call, clip_by_policy])
@pytest.mark.parametrize("how", [(False, False), (True, False), (False, True)], ids=str)
def test_gradients_that_a_scaler_unscales_one_optimizer_after_the_other_have_no_norm(clip, how):
    with pytest.raises(RuntimeError, match=r"call scaler.unscale_\(optimizer\) for every optimizer"):
        scaled_run(how, False, clip)


def test_a_norm_for_gradients_that_are_gone_is_void():
    params, twins = make_params(), make_params()
    ours, plain = pair(params), pair(twins)
    give_grads(params, 0)
    utils.clip_optimizers(ours, 0.01)
    for own in (params, twins):
        give_grads(own, 1)
    step_all(ours), step_all(plain)
    assert [bits(p) for p in params] == [bits(p) for p in twins]


def test_a_round_that_one_of_them_missed():
    """As where GradScaler does not step the one with infinite gradients."""
    params, twins = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    ours, plain = pair(params), pair(twins)
    utils.share_grad_policy(ours, max_norm=0.5)
    for step in range(3):
        for own in (params, twins):
            give_grads(own, step)
        torch.nn.utils.clip_grad_norm_(twins, 0.5)
        order = slice(0, 1) if step == 0 else slice(None, None, -1)
        step_all(ours[order]), step_all(plain[order])
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_failing_step_begins_no_round():
    params = make_params()
    optimizers = pair(params)
    policy = utils.share_grad_policy(optimizers, skip_above=0.0)
    give_grads(params, 0)
    optimizers[0].param_groups[0]["momentum"] = math.nan
    with pytest.raises(ValueError, match="momentum"):
        optimizers[0].step()
    assert policy.skipped_steps == 0 and policy.last_norm is None
    optimizers[0].param_groups[0]["momentum"] = 0.9
    step_all(optimizers)
    assert policy.skipped_steps == 1


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies(again):
    """Made together they share the copy of the policy; one alone cannot know the norm."""
    params = make_params()
    optimizers = pair(params)
    policy = utils.share_grad_policy(optimizers, max_norm=0.5)
    copies = again(optimizers)
    assert copies[0].grad_policy is copies[1].grad_policy is not policy
    alone = again(optimizers[1])
    for own in (optimizers, copies, [alone]):
        give_grads([p for optimizer in own for p in optimizer.param_groups[0]["params"]], 0)
    step_all(optimizers), step_all(copies)
    for one, other in zip(optimizers, copies, strict=True):
        for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            assert bits(p) == bits(q)
    assert bits(policy.last_norm) == bits(copies[0].grad_policy.last_norm)
    with pytest.raises(RuntimeError, match="2 optimizers share this policy, but only 1 of them"):
        alone.step()
    alone.set_grad_policy(max_norm=0.5)
    alone.step()


def test_leaving_and_replacing_a_policy():
    params = make_params()
    optimizers = pair(params)
    first = utils.share_grad_policy(optimizers, max_norm=0.5)
    for clip in (lambda: optimizers[0].clip_grad_norm(1.0), lambda: utils.clip_optimizers(optimizers, 1.0)):
        with pytest.raises(RuntimeError, match="shares a policy with others"):
            clip()
    optimizers[0].set_grad_policy()
    give_grads(params, 0)
    step_all(optimizers)
    rest = [p.grad.flatten() for p in optimizers[1].param_groups[0]["params"]]
    torch.testing.assert_close(first.last_norm, torch.cat(rest).norm())
    second = utils.share_grad_policy(optimizers, skip_nonfinite=True)
    assert optimizers[0].grad_policy is optimizers[1].grad_policy is second


def test_an_optimizer_that_is_gone():
    params = make_params()
    optimizers = pair(params)
    utils.share_grad_policy(optimizers, max_norm=0.5)
    del optimizers[0]
    give_grads(params, 0)
    with pytest.raises(RuntimeError, match="call share_grad_policy again"):
        optimizers[0].step()


def test_what_has_no_joint_norm():
    params = make_params()
    give_grads(params, 0)
    named = optim_ext.SGD([("w", params[0])], lr=0.1)
    for joint in (lambda o: utils.clip_optimizers(o, 1.0), lambda o: utils.share_grad_policy(o, max_norm=1.0)):
        with pytest.raises(TypeError, match="optimizer 1 is Adam, expected one of optim_ext's"):
            joint([named, torch.optim.Adam(params)])
        with pytest.raises(ValueError, match="parameter 'w' of optimizer 1 is in optimizer 0, too"):
            joint([optim_ext.SGD(params, lr=0.1), named])
        with pytest.raises(ValueError, match="at least one optimizer"):
            joint([])
    with pytest.raises(ValueError, match="a policy needs max_norm"):
        utils.share_grad_policy([named])
    with pytest.raises(ValueError, match="max_norm must be at least 0"):
        utils.clip_optimizers([named], -1.0)
    params[0].grad.fill_(math.inf)
    with pytest.raises(RuntimeError, match="non-finite"):
        utils.clip_optimizers([named], 1.0, error_if_nonfinite=True)
    assert named.grad_policy is None and named._controls.armed is None
