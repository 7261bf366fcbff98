"""Hyper-parameters set in a group, where no constructor checks them: the same numbers as torch's for-loop, or both refuse.

Torch computes in Python what it multiplies by, so some values make it divide by zero there, or take the root of a negative
number. Ours refuses those before it writes anything and names them."""

import math

import pytest
import torch
from lockstep import copy_of, make_params, random, snapshot
from specs import SPECS

import optim_ext

# Where torch's for-loop computes on with averages of squares that are negative, ours refuses: (class, option, index).
REFUSED_HERE_ALONE = {("NAdam", "betas", 1), ("LAMB", "betas", 1), ("Adafactor", "beta2_decay", None)}

VALUES = (0.0, 1.0, -1.0, 2.0, math.nan, math.inf, -math.inf)
SHAPES = ((3, 4), (5,))


class Row:
    """A class, and the options it is made with."""

    def __init__(self, ours, theirs, options, shapes=SHAPES, sparse=False):
        self.ours, self.theirs, self.options, self.shapes, self.sparse = ours, theirs, options, shapes, sparse

    def params(self):
        return make_params(self.shapes, torch.float64)

    def give_grads(self, params, step):
        for i, param in enumerate(params):
            grad = random(param.shape, param.dtype, 100 * step + i)
            param.grad = grad.to_sparse(1) if self.sparse else grad

    def hypers(self):
        """(option, index in its tuple or None) of everything that is a number."""
        group = self.ours(self.params(), **copy_of(self.options)).param_groups[0]
        for option, value in group.items():
            if isinstance(value, tuple):
                yield from ((option, i) for i, entry in enumerate(value) if entry is not None)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                yield option, None

    @property
    def name(self):
        return self.ours.__name__


def rows():
    for spec in SPECS:
        # Centered, RMSprop has only rounding left of a gradient it has not averaged.
        typical = {key: value for key, value in spec.typical.items() if key != "centered"}
        for options in ({}, typical):
            yield spec.name, Row(spec.ours, spec.torch, options)
    yield "SparseAdam", Row(optim_ext.SparseAdam, torch.optim.SparseAdam, {}, sparse=True)
    yield "Muon", Row(optim_ext.Muon, torch.optim.Muon, {}, shapes=((3, 4), (5, 2)))


CASES = [
    pytest.param(
        row, option, index, value,
        id=f"{name}({','.join(row.options)})-{option}{'' if index is None else index}={value}",
    )
    for name, row in rows()
    for option, index in row.hypers()
    for value in VALUES
    if math.isfinite(value) or option != "ns_steps"
]  # fmt: skip


def set_hyper(optimizer, option, index, value):
    group = optimizer.param_groups[0]
    if index is not None:
        entries = list(group[option])
        entries[index] = value
        value = tuple(entries)
    elif isinstance(group[option], int) and math.isfinite(value):
        value = int(value)
    group[option] = value


def outcome(optimizer):
    try:
        optimizer.step()
    except Exception as error:
        return error
    return None


def values_of(optimizer, params):
    state = [value for p in params for _, value in sorted(optimizer.state[p].items())]
    return [*(p.detach() for p in params), *(value for value in state if isinstance(value, torch.Tensor))]


@pytest.mark.parametrize(("row", "option", "index", "value"), CASES)
def test_same_numbers_or_both_refuse(row, option, index, value):
    mine, other = row.params(), row.params()
    for step in range(6):
        if step == 0:
            ours, theirs = row.ours(mine, **copy_of(row.options)), row.theirs(other, **copy_of(row.options))
        if step == 1:
            set_hyper(ours, option, index, value)
            set_hyper(theirs, option, index, value)
        row.give_grads(mine, step)
        row.give_grads(other, step)
        before = snapshot(ours)
        refused, refused_there = outcome(ours), outcome(theirs)
        if refused is not None:
            assert snapshot(ours) == before
            there = None if (row.name, option, index) in REFUSED_HERE_ALONE else values_of(theirs, other)
            return check_refusal(refused, refused_there, there, option, index, value)
        assert refused_there is None, f"torch raises {refused_there!r} in step {step}"
        for found, expected in zip(values_of(ours, mine), values_of(theirs, other), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True)


def check_refusal(refused, refused_there, theirs, option, index, value):
    name = option if index is None else rf"{option}[{index}]"
    if math.isnan(value):  # what torch makes of it is NaN all over
        assert (
            isinstance(refused, ValueError)
            and str(refused).startswith("group 0: ")
            and f"{name} is NaN" in str(refused)
        )
        return
    if isinstance(refused, KeyError):  # state that is there only if the constructor is told
        assert isinstance(refused_there, KeyError)
        return
    assert isinstance(refused, (ValueError, ZeroDivisionError)), repr(refused)
    assert f"{name} = {value:g}" in str(refused) and str(refused).startswith("group 0: ")
    if isinstance(refused_there, ZeroDivisionError):
        assert isinstance(refused, ZeroDivisionError)
    elif refused_there is None and theirs is not None:
        assert any(tensor.isnan().any() for tensor in theirs), "torch computes this"


@pytest.fixture
def params():
    params = make_params(SHAPES)
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def test_a_scheduler_that_raises_momentum_to_one(params):
    optimizer = optim_ext.AdamW(params, betas=(0.9, 0.999))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=10, max_momentum=1.0)
    before = snapshot(optimizer)
    with pytest.raises(
        ZeroDivisionError, match=r"^group 0: .*: at step 1 the step size would be inf, with lr = .*, betas\[0\] = 1$"
    ):
        optimizer.step()
    assert snapshot(optimizer) == before
    optimizer.param_groups[0]["betas"] = (0.95, 0.999)
    optimizer.step()
    scheduler.step()


def test_a_bad_group_stops_the_good_ones(params):
    optimizer = optim_ext.Adam([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.step()
    optimizer.param_groups[1]["betas"] = (0.9, 2.0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"^group 1: .*: at step 2 .* with betas\[1\] = 2$"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_each_parameter_is_checked_at_its_own_step(params):
    """lr_decay = -1 divides by zero in the second step only."""
    optimizer = optim_ext.Adagrad(params, lr_decay=0.0)
    optimizer.param_groups[0]["lr_decay"] = -1.0
    optimizer.step()
    optimizer.state[params[0]]["step"].fill_(5.0)
    before = snapshot(optimizer)
    with pytest.raises(
        ZeroDivisionError, match="at step 2 the decayed rate would be inf, with lr = 0.01, lr_decay = -1"
    ):
        optimizer.step()
    assert snapshot(optimizer) == before
    optimizer.state[params[1]]["step"].fill_(5.0)
    optimizer.step()


def test_tensors_are_looked_into(params):
    optimizer = optim_ext.Adam(params, lr=torch.tensor(0.1), betas=(torch.tensor(0.9), torch.tensor(0.9)))
    optimizer.param_groups[0]["betas"][0].fill_(1.0)
    with pytest.raises(ZeroDivisionError, match=r"betas\[0\] = 1"):
        optimizer.step()


def test_an_infinite_rate_is_the_callers_wish(params):
    optimizer = optim_ext.Adam(params, lr=math.inf)
    optimizer.step()
    assert all(torch.equal(param, torch.full_like(param, -math.inf)) for param in params)


def test_an_op_called_by_hand_refuses_too():
    lists = [[torch.ones(3)], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], [], [torch.tensor(0.0)]]
    numbers = {"lr": torch.tensor(0.1), "beta1": torch.tensor(1.0), "beta2": torch.tensor(0.9)}
    flags = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": False}
    with pytest.raises(ValueError, match=r"optim_ext::adam_: at step 1 the step size would be inf"):
        torch.ops.optim_ext.adam_(*lists, **numbers, weight_decay=0.0, eps=1e-8, **flags)
    assert lists[5][0].item() == 0.0
