"""What parameters are with what is kept beside them, out and in, and state as torch has it."""

import pytest
import torch
from kept import TAKING, WAYS, make, name_of, train, value_of
from lockstep import copy_of, random

import optim_ext as optim
from optim_ext import checkpoints

ADAMW = next(spec for spec in TAKING if spec.name == "AdamW")


@pytest.fixture(params=WAYS, ids=name_of)
def way(request):
    return request.param


def test_masters_by_name(way):
    optimizer, params = make(ADAMW, way)
    train(optimizer, params, 3)
    masters = dict(optimizer.master_params())
    assert list(masters) == [f"0.{index}" for index in range(len(params))]
    for p, master in zip(params, masters.values(), strict=True):
        assert master.dtype is torch.float32 and torch.equal(master, value_of(optimizer, p))


def test_masters_go_in_before_and_after_the_first_step(way):
    optimizer, params = make(ADAMW, way)
    for steps in (0, 2):
        train(optimizer, params, steps)
        given = {f"0.{index}": random(p.shape, torch.float32, 70 + index) for index, p in enumerate(params)}
        optimizer.load_master_params(given)
        for p, (name, master) in zip(params, optimizer.master_params(), strict=True):
            exact = way["param_precision"] in ("master", "remainder")
            assert torch.allclose(master, given[name], rtol=0 if exact else 2**-8, atol=0), name
            assert torch.allclose(p.float(), given[name], rtol=2**-8, atol=0)


def test_masters_that_do_not_fit_are_refused_before_the_first_is_written():
    optimizer, params = make(ADAMW, {"param_precision": "master"}, shapes=((4,), (3,)))
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="'0.7' is no parameter of this AdamW"):
        optimizer.load_master_params({"0.0": torch.zeros(4), "0.7": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"parameter 1 of group 0: its master has shape \[4\], expected \[3\]"):
        optimizer.load_master_params({"0.0": torch.zeros(4), "0.1": torch.zeros(4)})
    assert torch.equal(params[0], before) and not optimizer.state


def test_torchs_class_goes_on_from_the_state_and_the_masters(way):
    """In float32 it takes the state without loss."""
    model = torch.nn.Linear(100, 64, dtype=torch.bfloat16)
    optimizer = optim.AdamW(model.parameters(), **way)
    train(optimizer, list(model.parameters()), 3)
    wide = torch.nn.Linear(100, 64)
    wide.load_state_dict(checkpoints.master_state_dict(model, optimizer))
    theirs = torch.optim.AdamW(wide.parameters())
    theirs.load_state_dict(checkpoints.to_torch_state_dict(optimizer))
    for p, other in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(other, value_of(optimizer, p))
        assert set(theirs.state[other]) == {"step", "exp_avg", "exp_avg_sq"}
        if optimizer.state[p].get("exp_avg") is not None:
            assert torch.equal(theirs.state[other]["exp_avg"], optimizer.state[p]["exp_avg"].float())
    assert theirs.param_groups[0].keys() == torch.optim.AdamW(wide.parameters()).param_groups[0].keys()
    train(theirs, list(wide.parameters()), 1, 3)


def test_state_as_torch_has_it_of_every_class():
    for spec in TAKING:
        optimizer, params = make(spec, {"param_precision": "remainder", "state_precision": "q8"})
        train(optimizer, params, 2)
        saved = checkpoints.to_torch_state_dict(optimizer)
        plain, its = make(spec, {})
        train(plain, its, 1)
        assert [set(entry) for entry in saved["state"].values()] == [
            set(entry) for entry in plain.state_dict()["state"].values()
        ], spec.name
        other = spec.ours([torch.nn.Parameter(p.detach().clone()) for p in params], **copy_of(spec.typical))
        other.load_state_dict(saved)


def test_optimizers_of_others_are_refused():
    with pytest.raises(TypeError, match="takes an optimizer of optim_ext, found AdamW"):
        checkpoints.to_torch_state_dict(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))


def test_explain_says_what_the_options_come_to():
    params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((64, 64), (64, 64), (8,))]
    optimizer = optim.AdamW(params, param_precision="remainder", state_precision="q8")
    (report,) = optim.explain(optimizer)
    assert "2 bfloat16 parameters: remainder, exp_avg and exp_avg_sq q8" in report.reason
    assert "1 bfloat16 parameters: remainder, exp_avg and exp_avg_sq fp32" in report.reason
