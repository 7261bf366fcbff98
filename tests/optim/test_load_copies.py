"""load_state_dict(copy=True): the same as without, in memory of its own."""

import copy

import pytest
import torch
from lockstep import bits, copy_of, give_grads, make_params, snapshot
from torch import nn

import optim_ext
from optim_ext import LBFGS


@optim_ext.rule(state=("exp_avg",), scalars={"total": 0.0}, backend="interpreted")
def Momentum(param, grad, exp_avg, total, *, lr=0.1, beta=0.9):
    exp_avg = beta * exp_avg + grad
    return param - lr * exp_avg, exp_avg, total + 1.0


def train(optimizer, params, steps=2, first=0):
    for step in range(first, first + steps):
        give_grads(params, step)
        optimizer.step()


def tensors_in(value):
    if torch.is_tensor(value):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in values for tensor in tensors_in(each)]


def memory(value):
    return {tensor.untyped_storage()._cdata for tensor in tensors_in(value)}


def check(make, steps=2):
    """`make` gives an optimizer and its parameters, alike each time."""
    source, params = make()
    train(source, params, steps)
    saved = source.state_dict()
    before = copy.deepcopy(saved)
    (plain, its), (copied, own) = make(), make()
    plain.load_state_dict(copy.deepcopy(saved))
    copied.load_state_dict(saved, copy=True)
    state = [(g["params"], {k: v for k, v in g.items() if k != "params"}) for g in copied.state_dict()["param_groups"]]
    assert memory([copied.state_dict()["state"], [options for _, options in state]]).isdisjoint(memory(saved))
    assert [bits(t) for t in tensors_in(copied.state_dict())] == [bits(t) for t in tensors_in(plain.state_dict())]
    for entry, other in zip(copied.state.values(), plain.state.values(), strict=True):
        assert [*entry] == [*other] and all(type(entry[key]) is type(other[key]) for key in entry)
    train(plain, its, 2, steps)
    train(copied, own, 2, steps)
    assert [bits(p) for p in own] == [bits(p) for p in its]
    assert [bits(t) for t in tensors_in(saved)] == [bits(t) for t in tensors_in(before)]


def test_shares_no_memory_and_has_the_same_bits(variant):
    def make():
        params = make_params()
        return variant.spec.ours(params, **copy_of(variant.options)), params

    check(make)


@pytest.mark.parametrize(
    "options",
    [
        {"param_precision": "master"},
        {"param_precision": "stochastic", "state_precision": "q8"},
        {"state_precision": "bf16"},
    ],
    ids=str,
)
def test_with_precision_options(options):
    def make():
        params = make_params(((64, 80), (7,)), torch.bfloat16)
        return optim_ext.AdamW(params, **options), params

    check(make)


@pytest.mark.about_the_cpu("rules have kernels for it alone")
def test_a_rule_and_a_tensor_rate():
    def make():
        params = make_params()
        return Momentum(params, lr=torch.tensor(0.1), max_norm=1.0), params

    check(make)


def test_without_it_state_is_shared_as_in_torch():
    params, others = make_params(), make_params()
    optimizer, other = optim_ext.AdamW(params), optim_ext.AdamW(others)
    train(optimizer, params)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[others[4]]["exp_avg"] is optimizer.state[params[4]]["exp_avg"]
    other.load_state_dict(optimizer.state_dict(), copy=True)
    before = snapshot(optimizer)
    train(other, others)
    assert snapshot(optimizer)["state"] == before["state"]


def test_one_tensor_in_many_places_stays_one():
    params = make_params(((3,), (4,)))
    optimizer = optim_ext.AdamW(params)
    train(optimizer, params)
    step = torch.tensor(2.0)
    for p in params:
        optimizer.state[p]["step"] = step
    others = make_params(((3,), (4,)))
    other = optim_ext.AdamW(others)
    other.load_state_dict(optimizer.state_dict(), copy=True)
    mine = [other.state[p]["step"] for p in others]
    assert mine[0] is mine[1] and mine[0] is not step


def test_what_is_not_of_a_parameter_and_hooks():
    """A pre-hook may replace what is loaded; a post-hook sees the copies."""
    param = nn.Parameter(torch.ones(3))
    optimizer = optim_ext.SGD([param], momentum=0.9)
    train(optimizer, [param])
    saved = optimizer.state_dict()
    saved["state"]["extra"] = {"kept": [torch.ones(2)]}
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(memory(dict(o.state)).isdisjoint(memory(saved))))
    optimizer.load_state_dict(saved, copy=True)
    assert seen == [True] and torch.equal(optimizer.state["extra"]["kept"][0], torch.ones(2))
    inner = saved["state"]["extra"]["kept"][0]
    assert inner is not optimizer.state["extra"]["kept"][0]


def test_lbfgs():
    def start():
        param = nn.Parameter(torch.tensor([3.0, -2.0]))
        return LBFGS([param], max_iter=4), param

    def step(optimizer, param):
        def closure():
            optimizer.zero_grad()
            loss = (param**4).sum() + param[0] * param[1]
            loss.backward()
            return loss

        optimizer.step(closure)

    optimizer, param = start()
    step(optimizer, param)
    saved, at = optimizer.state_dict(), param.detach().clone()
    runs = []
    for given, options in ((copy.deepcopy(saved), {}), (saved, {"copy": True})):
        other, own = start()
        with torch.no_grad():
            own.copy_(at)
        other.load_state_dict(given, **options)
        if options:
            assert memory(dict(other.state)).isdisjoint(memory(saved))
        step(other, own)
        runs.append([bits(own), *(bits(t) for t in tensors_in(other.state_dict()))])
    assert runs[0] == runs[1]


def test_a_refused_state_leaves_everything(variant):
    params = make_params()
    optimizer = variant.spec.ours(params, **copy_of(variant.options))
    train(optimizer, params)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(variant.spec.ours(params[:2], **copy_of(variant.options)).state_dict(), copy=True)
    assert snapshot(optimizer) == before
