"""step(grads=...): functional gradients, with the bits of the same in p.grad, which nobody sees."""

import math

import pytest
import torch
from lockstep import bits, copy_of, give_grads, make_params, random, snapshot
from torch import nn

import optim_ext
from optim_ext import LBFGS, swa_utils


@optim_ext.rule(state=("exp_avg",), backend="interpreted")
def Momentum(param, grad, exp_avg, *, lr=0.1, beta=0.9):
    exp_avg = beta * exp_avg + grad
    return param - lr * exp_avg, exp_avg


def gradients(params, step):
    return [random(p.shape, p.dtype, 1000 * (step + 1) + i) for i, p in enumerate(params)]


def named(params):
    return [(f"p{i}", p) for i, p in enumerate(params)]


WAYS = {
    "list": lambda params, grads: grads,
    "tuple": lambda params, grads: tuple(grads),
    "generator": lambda params, grads: (g for g in grads),
    "by name": lambda params, grads: {f"p{i}": g for i, g in enumerate(grads)},
    "by parameter": lambda params, grads: dict(zip(params, grads, strict=True)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_equals_the_same_in_the_parameters(variant, way):
    """Bit for bit, with some of None; p.grad stays the object and the value it is."""
    params, others = make_params(), make_params()
    ours, theirs = (variant.spec.ours(named(p), **copy_of(variant.options)) for p in (params, others))
    own = [torch.full_like(p, 7.0) if i % 2 else None for i, p in enumerate(params)]
    for p, grad in zip(params, own, strict=True):
        p.grad = grad
    for step in range(3):
        grads = gradients(params, step)
        grads[1] = None
        for q, grad in zip(others, grads, strict=True):
            q.grad = grad
        theirs.step()
        ours.step(grads=way(params, grads))
        assert [bits(p) for p in params] == [bits(q) for q in others]
        assert all(p.grad is grad for p, grad in zip(params, own, strict=True))
    assert all((grad == 7).all() for grad in own if grad is not None)
    for p, q in zip(params, others, strict=True):
        assert ours.state.get(p, {}).keys() == theirs.state.get(q, {}).keys()


def test_groups_in_order():
    params, others = make_params(), make_params()
    groups = lambda own: [{"params": own[3:], "lr": 0.5}, {"params": own[:3]}]  # noqa: E731
    ours, theirs = optim_ext.AdamW(groups(params)), optim_ext.AdamW(groups(others))
    grads = gradients(params, 0)
    for q, grad in zip(others, grads, strict=True):
        q.grad = grad
    ours.step(grads=grads[3:] + grads[:3])
    theirs.step()
    assert [bits(p) for p in params] == [bits(q) for q in others]


def test_functional_gradients():
    """What torch.func.grad returns; names that are missing have no gradient."""
    model = nn.Linear(3, 2)
    optimizer = optim_ext.SGD(model.named_parameters(), lr=0.5)
    values = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda v: torch.func.functional_call(model, v, torch.ones(1, 3)).sum())(values)
    expected = {name: value - 0.5 * grads[name] for name, value in values.items()}
    kept = model.bias.detach().clone()
    optimizer.step(grads={"weight": grads["weight"]})
    assert torch.equal(model.weight, expected["weight"]) and torch.equal(model.bias, kept)
    assert model.weight.grad is None


def test_a_policy_takes_their_norm():
    params, others = make_params(), make_params()
    ours, theirs = (optim_ext.AdamW(p, max_norm=0.5, skip_nonfinite=True) for p in (params, others))
    give_grads(params, 99)
    for step, bad in enumerate((False, True, False)):
        grads = gradients(params, step)
        if bad:
            grads[4][0, 0] = math.inf
        for q, grad in zip(others, grads, strict=True):
            q.grad = grad
        ours.step(grads=grads)
        theirs.step()
        assert bits(ours.grad_policy.last_norm) == bits(theirs.grad_policy.last_norm)
    assert [bits(p) for p in params] == [bits(q) for q in others] and ours.grad_policy.skipped_steps == 1


def test_with_averages_and_precision_options():
    runs = []
    for given in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).bfloat16()
        params = list(model.parameters())
        optimizer = optim_ext.AdamW(params, lr=0.1, param_precision="remainder", state_precision="bf16")
        ema = swa_utils.AveragedModel(model, dtype=torch.float32)
        optimizer.average_into(ema)
        for step in range(3):
            grads = gradients(params, step)
            if not given:
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
            optimizer.step(grads=grads if given else None)
        runs.append([bits(t) for t in (*params, *ema.parameters())])
    assert runs[0] == runs[1]


def test_a_rule_and_sparse_gradients():
    params, others = make_params(), make_params()
    ours, theirs = Momentum(params), Momentum(others)
    grads = gradients(params, 0)
    ours.step(grads=grads)
    for q, grad in zip(others, grads, strict=True):
        q.grad = grad
    theirs.step()
    assert [bits(p) for p in params] == [bits(q) for q in others]
    table = nn.Parameter(torch.ones(5, 2))
    optim_ext.SparseAdam([table], lr=0.5).step(grads=[torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (5, 2))])
    assert (table[1] != 1).all() and (table[0] == 1).all() and table.grad is None


def test_torchs_own_path():
    params, others = ([p.detach() for p in make_params()] for _ in range(2))
    ours, theirs = (optim_ext.Adam(p, differentiable=True) for p in (params, others))
    grads = gradients(params, 0)
    with torch.no_grad():
        for q, grad in zip(others, grads, strict=True):
            q.grad = grad
        ours.step(grads=grads)
        theirs.step()
    assert [bits(p) for p in params] == [bits(q) for q in others] and params[0].grad is None


def test_a_scaler_that_has_unscaled():
    """What it looks at is p.grad; gradients made from that may be given then."""
    for bad in (False, True):
        model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
        twin.load_state_dict(model.state_dict())
        optimizer = optim_ext.SGD(model.parameters(), lr=0.5, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(model(torch.full((1, 3), math.inf if bad else 1.0)).sum()).backward()
        scaler.unscale_(optimizer)
        halves = [p.grad / 2 for p in model.parameters()]
        scaler.step(optimizer, grads=halves)
        expected = [p if bad else p - 0.5 * g for p, g in zip(twin.parameters(), halves, strict=True)]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


REFUSED = {
    "closure": (lambda o, p: o.step(lambda: 1.0, grads=[None] * 7), TypeError, "a closure or grads, not both"),
    "too few": (lambda o, p: o.step(grads=[None]), ValueError, "grads has 1 entries, expected 7"),
    "a tensor": (
        lambda o, p: o.step(grads=torch.zeros(7)),
        TypeError,
        "grads is Parameter|grads is Tensor, expected one",
    ),
    "a number": (lambda o, p: o.step(grads=3), TypeError, "grads is int, expected one gradient"),
    "not a tensor": (
        lambda o, p: o.step(grads=[None, 2.0, *[None] * 5]),
        TypeError,
        "gradient of parameter 'p1' is float",
    ),
    "shape": (
        lambda o, p: o.step(grads={"p0": torch.zeros(()), "p4": torch.zeros(5, 3)}),
        RuntimeError,
        "gradient of parameter 'p4': attempting to assign a gradient of size",
    ),
    "dtype": (
        lambda o, p: o.step(grads={"p0": torch.zeros(()), "p4": torch.zeros(3, 5, dtype=torch.int64)}),
        RuntimeError,
        "gradient of parameter 'p4': ",
    ),
    "name": (
        lambda o, p: o.step(grads={"p9": None}),
        ValueError,
        "grads has 'p9', which is no parameter of this AdamW",
    ),
    "tensor": (
        lambda o, p: o.step(grads={torch.ones(1): None}),
        ValueError,
        "grads has a Tensor, which is no parameter",
    ),
    "both": (lambda o, p: o.step(grads={"p0": None, p[0]: None}), ValueError, "both by its name and as a tensor"),
    "armed": (
        lambda o, p: (o.clip_grad_norm(1.0), o.step(grads=[None] * 7)),
        RuntimeError,
        "clip_grad_norm has taken the norm of p.grad",
    ),
    "scale": (
        lambda o, p: (setattr(o, "grad_scale", torch.ones(())), o.step(grads=[None] * 7)),
        RuntimeError,
        "call scaler.unscale_",
    ),
}


@pytest.mark.parametrize("ask, kind, words", REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_is_written(ask, kind, words):
    params = make_params()
    optimizer = optim_ext.AdamW(named(params))
    give_grads(params, 0)
    optimizer.step()
    own, before = [p.grad for p in params], snapshot(optimizer)
    with pytest.raises(kind, match=words):
        ask(optimizer, params)
    assert snapshot(optimizer) == before and all(p.grad is grad for p, grad in zip(params, own, strict=True))


def test_a_step_that_fails_gives_the_gradients_back():
    params = make_params()
    optimizer = optim_ext.AdamW(params)
    give_grads(params, 0)
    optimizer.step()
    own = [p.grad for p in params]
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="NaN|nan"):
        optimizer.step(grads=gradients(params, 1))
    assert all(p.grad is grad for p, grad in zip(params, own, strict=True))


def test_a_shared_policy_and_names_that_are_not_there():
    params = make_params(((3,), (4,)))
    optimizers = [optim_ext.SGD(params[:1], lr=0.1), optim_ext.SGD(params[1:], lr=0.1)]
    with pytest.raises(ValueError, match=r"grads has 'w', .* it was given no names"):
        optimizers[0].step(grads={"w": torch.ones(3)})
    optim_ext.utils.share_grad_policy(optimizers, max_norm=1.0)
    with pytest.raises(RuntimeError, match="a policy that optimizers share takes the norm of p.grad of all of them"):
        optimizers[0].step(grads=[torch.ones(3)])


def test_a_parameter_that_is_there_twice():
    param = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = optim_ext.SGD([param, param], lr=0.5)
    grad = torch.ones(3)
    optimizer.step(grads=[grad, grad])
    assert (param == 0).all() and param.grad is None
    with pytest.raises(ValueError, match="is there twice, with two gradients"):
        optimizer.step(grads=[grad, grad.clone()])


def test_hooks_and_schedulers_see_one_step():
    params = make_params()
    optimizer = optim_ext.AdamW(params)
    scheduler = optim_ext.lr_scheduler.StepLR(optimizer, 1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append([p.grad for p in params]))
    optimizer.step(grads=gradients(params, 0))
    scheduler.step()
    assert calls == [[None] * len(params)]


def test_lbfgs_takes_a_closure_only():
    with pytest.raises(TypeError, match="grads"):
        LBFGS([nn.Parameter(torch.ones(2))]).step(lambda: 1.0, grads=[torch.ones(2)])


def test_a_compiled_step_is_refused(monkeypatch):
    optimizer = optim_ext.SGD(make_params(((3,),)))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"step\(grads=\) cannot be compiled"):
        optimizer.step(grads=[torch.ones(3)])
