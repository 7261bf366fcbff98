"""Muon: torch's matrix products in batches of equal shape, the rest native."""

import copy

import pytest
import torch
from lockstep import bits, give_grads, make_params, native_ops, twin

import optim_ext

SHAPES = ((8, 5), (5, 8), (8, 5), (6, 6), (1, 4), (8, 5), (4, 1), (0, 3))
OPTIONS = [
    {},
    {"lr": 0.02, "momentum": 0.9, "nesterov": False},
    {"lr": torch.tensor(0.02), "weight_decay": 0.0},
    {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    {"lr": 0.02, "adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5), "momentum": 0.3},
]
# The orthogonalized update has the precision of bfloat16, and sums in another order when computed in a batch.
CLOSE = {"rtol": 1e-2, "atol": 2e-3}


@pytest.mark.parametrize(
    "options, dtype",
    [  # in bfloat16 and without Nesterov momentum torch divides the momentum buffer itself by its norm
        (options, dtype)
        for options in OPTIONS
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        if dtype != torch.bfloat16 or options.get("nesterov") is not False
    ],
    ids=str,
)
def test_equals_torch(options, dtype):
    params = make_params(SHAPES, dtype)
    twins = twin(params)
    ours, theirs = optim_ext.Muon(params, **options), torch.optim.Muon(twins, **options)
    for step in range(4):
        frozen = {1} if step == 2 else set()
        give_grads(params, step, frozen)
        give_grads(twins, step, frozen)
        ours.step()
        theirs.step()
    tight = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for mine, other in zip(params, twins, strict=True):
        # In bfloat16 torch rounds the momentum as it goes, and small singular values of what is orthogonalized are
        # all rounding.
        slack = {"rtol": 3e-2, "atol": 0.1} if dtype == torch.bfloat16 else CLOSE
        torch.testing.assert_close(mine, other, **slack)
        buffers = ours.state[mine]["momentum_buffer"], theirs.state[other]["momentum_buffer"]
        torch.testing.assert_close(*buffers, rtol=tight, atol=tight)
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    assert native_ops(ours.step) == ["optim_ext::muon_"]


def test_update_is_orthogonal():
    """The singular values of a step from the origin lie where Newton and Schulz's iteration leaves them."""
    param = torch.nn.Parameter(torch.zeros(30, 50))
    optimizer = optim_ext.Muon([param], lr=1.0, weight_decay=0.0)
    param.grad = torch.randn(30, 50)
    optimizer.step()
    values = torch.linalg.svdvals(param.detach())
    assert 0.5 < values.min() and values.max() < 1.3


def test_a_batch_equals_its_matrices_one_by_one():
    together, alone = make_params([(16, 24)] * 5), make_params([(16, 24)] * 5)
    optimizer = optim_ext.Muon(together, lr=0.02)
    singles = [optim_ext.Muon([p], lr=0.02) for p in alone]
    for step in range(3):
        give_grads(together, step)
        give_grads(alone, step)
        for one in (optimizer, *singles):
            one.step()
    torch.testing.assert_close(together, alone, **CLOSE)


def test_strided_parameters():
    params = [torch.randn(6, 9).t(), torch.randn(9, 12)[:, ::2]]
    twins = [p.clone() for p in params]
    ours, theirs = optim_ext.Muon(params, lr=0.02), torch.optim.Muon(twins, lr=0.02)
    for step in range(3):
        give_grads(params, step)
        give_grads(twins, step)
        ours.step()
        theirs.step()
    torch.testing.assert_close(params, twins, **CLOSE)


def test_checkpoints_go_both_ways():
    params = make_params(((4, 6), (6, 4)), torch.float64)
    twins = twin(params)
    ours, theirs = optim_ext.Muon(params), torch.optim.Muon(twins)
    for step in range(2):
        give_grads(params, step)
        ours.step()
    with torch.no_grad():
        for mine, other in zip(params, twins, strict=True):
            other.copy_(mine)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    fresh = optim_ext.Muon(params)
    fresh.load_state_dict(copy.deepcopy(theirs.state_dict()))
    give_grads(params, 5)
    give_grads(twins, 5)
    fresh.step()
    theirs.step()
    torch.testing.assert_close(params, twins, **CLOSE)


def test_refusals_are_torchs():
    messages = []
    for library in (torch.optim, optim_ext):
        with pytest.raises(ValueError) as caught:
            library.Muon([torch.zeros(3)])
        messages.append(str(caught.value))
        param = torch.zeros(2, 2, dtype=torch.complex64)
        param.grad = torch.zeros_like(param)
        with pytest.raises(RuntimeError) as caught:
            library.Muon([param]).step()
        messages.append(str(caught.value))
        param = torch.zeros(2, 2)
        param.grad = torch.ones(2, 2).to_sparse()
        with pytest.raises(RuntimeError) as caught:
            library.Muon([param]).step()
        messages.append(str(caught.value))
        param.grad = torch.ones(2, 2)
        with pytest.raises(ValueError) as caught:
            library.Muon([param], ns_steps=100).step()
        assert "Number of steps must be less than 100" in str(caught.value)
    assert messages[:3] == messages[3:]


def test_bad_input_is_refused_before_any_write():
    params = make_params(((4, 6), (6, 4)))
    optimizer = optim_ext.Muon([{"params": params[:1]}, {"params": params[1:]}])
    give_grads(params, 0)
    optimizer.step()
    right = optimizer.state[params[1]]["momentum_buffer"]
    optimizer.state[params[1]]["momentum_buffer"] = torch.zeros(6, 5)
    before = [bits(p) for p in params], bits(optimizer.state[params[0]]["momentum_buffer"])
    with pytest.raises(RuntimeError, match="parameter 0 of group 1: momentum_buffer has shape"):
        optimizer.step()
    assert ([bits(p) for p in params], bits(optimizer.state[params[0]]["momentum_buffer"])) == before
    optimizer.state[params[1]]["momentum_buffer"] = right
    optimizer.param_groups[0]["weight_decay"] = float("nan")
    with pytest.raises(ValueError, match="weight_decay is NaN"):
        optimizer.step()
    assert ([bits(p) for p in params], bits(optimizer.state[params[0]]["momentum_buffer"])) == before


def test_opcheck():
    lists = [
        make_params(((4, 6), (6, 4))),
        make_params(((4, 6), (6, 4)), seed=5),
        make_params(((4, 6), (6, 4)), seed=9),
    ]
    lists = [[t.detach() for t in one] for one in lists]
    keywords = {
        **{"lr": torch.tensor(0.02), "weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "eps": 1e-7},
        **{"ns_a": 3.4, "ns_b": -4.8, "ns_c": 2.0, "ns_steps": 5, "match_rms_adamw": False},
    }
    torch.library.opcheck(torch.ops.optim_ext.muon_.default, tuple(lists), keywords)


@pytest.mark.parametrize("place", range(3))
def test_coefficients_that_are_nan(place):
    coefficients = [3.4445, -4.775, 2.0315]
    coefficients[place] = float("nan")
    param = torch.nn.Parameter(torch.ones(4, 4))
    param.grad = torch.randn(4, 4)
    with pytest.raises(ValueError, match=rf"ns_coefficients\[{place}\] is NaN"):
        optim_ext.Muon([param], ns_coefficients=tuple(coefficients)).step()
    assert torch.equal(param, torch.ones(4, 4))
