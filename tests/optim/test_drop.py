"""optimizer.drop: parameters leave with everything the optimizer has of them, or none does."""

import copy
import gc
import weakref

import pytest
import torch
from lockstep import bits, copy_of, give_grads, make_params, snapshot
from torch import nn

import optim_ext
from optim_ext import LBFGS, swa_utils


@optim_ext.rule(state=("exp_avg",), backend="interpreted")
def Momentum(param, grad, exp_avg, *, lr=0.1, beta=0.9):
    exp_avg = beta * exp_avg + grad
    return param - lr * exp_avg, exp_avg


def train(optimizer, params, steps=2, first=0):
    for step in range(first, first + steps):
        give_grads(params, step)
        optimizer.step()


def test_the_others_go_on_as_if_it_had_never_been_there(variant):
    """Their bits and state; the dropped one stays as it is."""
    params, others = make_params(), make_params()
    ours = variant.spec.ours(params, **copy_of(variant.options))
    without = variant.spec.ours([p for i, p in enumerate(others) if i != 4], **copy_of(variant.options))
    for step in range(4):
        give_grads(params, step)
        give_grads(others, step)
        if step == 2:
            ours.drop(params[4])
            left = bits(params[4])
        ours.step()
        without.step()
    assert bits(params[4]) == left and params[4] not in ours.state
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        if i != 4:
            assert bits(p) == bits(q)
            for key, value in without.state.get(q, {}).items():
                assert bits(ours.state[p][key]) == bits(value) if torch.is_tensor(value) else value
    assert len(ours.param_groups[0]["params"]) == len(params) - 1


def test_a_rule_of_a_user():
    params = make_params()
    optimizer = Momentum(params)
    train(optimizer, params)
    optimizer.drop(params[:3])
    train(optimizer, params, first=2)
    assert set(optimizer.state) == set(params[3:])


def test_names_and_groups():
    """Names go with their parameters; an empty group stays, as schedulers count groups."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = optim_ext.AdamW(
        [{"params": list(model[0].named_parameters("0")), "lr": 0.1}, {"params": list(model[1].named_parameters("1"))}]
    )
    scheduler = optim_ext.lr_scheduler.StepLR(optimizer, 1)
    optimizer.drop(["0.weight", model[0].bias])
    optimizer.drop(model[1].named_parameters())
    assert [group["params"] for group in optimizer.param_groups] == [[], []]
    assert [group["param_names"] for group in optimizer.param_groups] == [[], []]
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": [("again", model[0].weight)]})
    train(optimizer, [model[0].weight])
    assert list(optimizer.state) == [model[0].weight]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            lambda params: [params[0], torch.zeros(2, 3)],
            r"parameter 1 of those given \(shape \[2, 3\]\) is no parameter of this",
        ),
        (
            lambda params: [params[1], ("head.weight", torch.zeros(2))],
            "parameter 'head.weight' is no parameter of this AdamW",
        ),
        (lambda params: [params[1], "p99"], "'p99' is no parameter of this AdamW"),
    ],
    ids=["tensor", "named", "name"],
)
def test_an_unknown_parameter_is_refused_and_none_is_dropped(wrong, words):
    params = make_params()
    optimizer = optim_ext.AdamW([(f"p{i}", p) for i, p in enumerate(params)])
    train(optimizer, params)
    before, groups = snapshot(optimizer), copy.copy(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=words):
        optimizer.drop(wrong(params))
    assert snapshot(optimizer) == before and all(
        p is q for p, q in zip(groups, optimizer.param_groups[0]["params"], strict=True)
    )


def test_what_is_no_parameter_at_all():
    optimizer = optim_ext.AdamW(make_params())
    with pytest.raises(TypeError, match="drop takes parameters, found int in place 0"):
        optimizer.drop([3])
    with pytest.raises(ValueError, match=r"'w' is no parameter of this AdamW; it was given no names"):
        optimizer.drop("w")
    optimizer.drop([])


def test_nothing_keeps_a_dropped_parameter_alive():
    params = make_params(((3,), (4, 4)))
    optimizer = optim_ext.AdamW(params, max_norm=1.0)
    train(optimizer, params)
    seen = [weakref.ref(params[1]), weakref.ref(optimizer.state[params[1]]["exp_avg"])]
    optimizer.drop(params.pop())
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_an_armed_clip_is_about_those_that_are_left():
    """The step takes their norm, and says so in the tensor that was returned."""
    params, others = make_params(), make_params()
    ours, without = optim_ext.SGD(params, lr=0.1), optim_ext.SGD(others[:4] + others[5:], lr=0.1)
    give_grads(params, 0)
    give_grads(others, 0)
    norm = ours.clip_grad_norm(0.5)
    ours.drop([params[4]])
    expected = without.clip_grad_norm(0.5)
    ours.step()
    without.step()
    assert bits(norm) == bits(expected)
    assert [bits(p) for i, p in enumerate(params) if i != 4] == [bits(p) for i, p in enumerate(others) if i != 4]


def test_between_the_steps_of_optimizers_with_one_norm():
    params = make_params(((3,), (4,), (5,)))
    optimizers = [optim_ext.SGD(params[:2], lr=0.1), optim_ext.AdamW(params[2:])]
    give_grads(params, 0)
    optim_ext.utils.clip_optimizers(optimizers, 1.0)
    with pytest.raises(RuntimeError, match="after their steps"):
        optimizers[0].drop(params[0])
    for optimizer in optimizers:
        optimizer.step()
    optimizers[0].drop(params[0])
    policy = optim_ext.utils.share_grad_policy(optimizers, max_norm=1.0)
    give_grads(params, 1)
    optimizers[1].step()
    with pytest.raises(RuntimeError, match="after their steps"):
        optimizers[0].drop(params[1])
    optimizers[0].step()
    assert policy.last_norm is not None


def test_averages_go_on_with_the_whole_model():
    """They are the model's, not the optimizer's: a dropped parameter is averaged as it stands."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = optim_ext.AdamW(model.parameters(), lr=0.1)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer.average_into(ema)
    train(optimizer, list(model.parameters()))
    optimizer.drop(model[0].parameters())
    before = [bits(p) for p in model[0].parameters()]
    train(optimizer, list(model.parameters()), 3)
    assert [bits(p) for p in model[0].parameters()] == before and ema.n_averaged == 5
    twin = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    twin.load_state_dict(ema.state_dict())
    train(optimizer, list(model.parameters()), 1, 5)
    twin.update_parameters(model)
    assert [bits(p) for p in twin.parameters()] == [bits(p) for p in ema.parameters()]


def test_what_is_kept_beside_parameters_goes_too():
    params = make_params(((64, 80), (64, 80)), torch.bfloat16)
    optimizer = optim_ext.AdamW(params, param_precision="master", state_precision="q8", skip_nonfinite=True)
    train(optimizer, params)
    optimizer.drop(params[0])
    train(optimizer, params, first=2)
    assert list(optimizer.state) == [params[1]] and [name for name, _ in optimizer.master_params()] == ["0.0"]


def test_a_parameter_that_is_there_twice():
    params = make_params(((3,), (4,)))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = optim_ext.SGD([params[0], params[1], params[0]], lr=0.1)
    optimizer.drop(params[0])
    assert optimizer.param_groups[0]["params"] == [params[1]]


def test_groups_in_other_containers():
    params = make_params()
    optimizer = optim_ext.AdamW(params)
    optimizer.param_groups[0]["params"] = tuple(params)
    train(optimizer, params)
    optimizer.drop(params[0])
    train(optimizer, params, first=2)
    assert len(optimizer.param_groups[0]["params"]) == len(params) - 1


def test_lbfgs_starts_anew():
    """Its history is of all parameters as one vector. Bounds for each parameter go with theirs."""
    params = [nn.Parameter(torch.full((2,), 3.0)) for _ in range(3)]

    def closure():
        optimizer.zero_grad()
        loss = sum(((p - 1) ** 2).sum() for p in params)
        loss.backward()
        return loss

    optimizer = LBFGS(params, bounds=([0.0, 2.0, None], None))
    optimizer.step(closure)
    left = bits(params[1])
    optimizer.drop(params[1])
    assert not optimizer.state and optimizer.param_groups[0]["bounds"] == ([0.0, None], None)
    with torch.no_grad():
        params[0].fill_(5.0)
    optimizer.step(closure)
    assert bits(params[1]) == left and params[0].allclose(torch.ones(2), atol=1e-3)


def test_checkpoints_are_of_what_is_left():
    params, others = make_params(), make_params()
    optimizer = optim_ext.AdamW(params)
    train(optimizer, params)
    optimizer.drop(params[0])
    other = optim_ext.AdamW(others[1:])
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params[1:], others[1:], strict=True):
        assert bits(optimizer.state[p]["exp_avg"]) == bits(other.state[q]["exp_avg"])
