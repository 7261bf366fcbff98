"""Groups, their parameters and the state in other containers than torch makes: torch runs these, so do native steps."""

from collections import ChainMap, UserDict, deque
from types import SimpleNamespace

import pytest
import torch
from lockstep import Lockstep, make_params, native_ops

import optim_ext
from optim_ext.swa_utils import AveragedModel

PARAMS = {
    "a tuple": tuple,
    "a ParameterList": torch.nn.ParameterList,
    "the values of a dict": lambda params: dict(enumerate(params)).values(),
    "a set": set,
    "a deque": deque,
}


def replaced_params(optimizer, container):
    for group in optimizer.param_groups:
        group["params"] = container(group["params"])


def replaced_groups(optimizer, container):
    optimizer.param_groups = container(optimizer.param_groups)


def replaced_state(optimizer, container):
    optimizer.state = container(optimizer.state)


def replaced_entries(optimizer, container):
    for p in list(optimizer.state):
        optimizer.state[p] = container(optimizer.state[p])


OTHERS = {
    "a tuple of groups": (replaced_groups, tuple),
    "groups in a UserDict": (replaced_groups, lambda groups: [UserDict(group) for group in groups]),
    "groups in a ChainMap": (replaced_groups, lambda groups: [ChainMap({}, group) for group in groups]),
    "state in a UserDict": (replaced_state, UserDict),
    "state in a ChainMap": (replaced_state, ChainMap),
    "state of a parameter in a UserDict": (replaced_entries, UserDict),
    "state of a parameter in a ChainMap": (replaced_entries, ChainMap),
    **{f"parameters in {name}": (replaced_params, container) for name, container in PARAMS.items()},
}


def two_groups(params):
    return [{"params": params[:3]}, {"params": params[3:]}]


@pytest.mark.parametrize("replace, container", OTHERS.values(), ids=OTHERS.keys())
def test_steps_as_torch_does(spec, replace, container):
    lockstep = Lockstep(spec, dtype=torch.float64, groups=two_groups).step(2)
    usual = [(o.param_groups, [group["params"] for group in o.param_groups], o.state) for o in lockstep.both]
    for optimizer in lockstep.both:
        replace(optimizer, container)
    assert any(native_ops(lambda: lockstep.step(1)))
    lockstep.step(1, frozen=[1]).step(1)
    for optimizer, (groups, lists, state) in zip(lockstep.both, usual, strict=True):
        optimizer.param_groups = groups
        for group, params in zip(groups, lists, strict=True):
            group["params"] = params
        if replace is not replaced_entries:
            assert all(optimizer.state[p] is entry for p, entry in state.items())
        optimizer.state = state
        for p in list(state):
            state[p] = dict(state[p])
    lockstep.check().step(1).check()


# But for a UserDict, which makes no entries, so that torch cannot start with it.
THAT_MAKE_ENTRIES = {name: row for name, row in OTHERS.items() if name != "state in a UserDict"}


@pytest.mark.parametrize("replace, container", THAT_MAKE_ENTRIES.values(), ids=THAT_MAKE_ENTRIES.keys())
def test_first_step_makes_state_as_torch_does(spec, replace, container):
    lockstep = Lockstep(spec, dtype=torch.float64)
    states = [optimizer.state for optimizer in lockstep.both]
    for optimizer in lockstep.both:
        replace(optimizer, container)
    lockstep.step(1)
    for optimizer, params, state in zip(lockstep.both, (lockstep.params, lockstep.twins), states, strict=True):
        assert list(optimizer.state) and all(optimizer.state[p] for p in params)
        if replace is replaced_state:
            assert all(state[p] is optimizer.state[p] for p in params)


def test_a_generator_of_parameters_serves_one_step(spec):
    """As in torch, which reads it once."""
    lockstep = Lockstep(spec, dtype=torch.float64).step(1)
    for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
        optimizer.param_groups[0]["params"] = (p for p in params)
    lockstep.step(2)
    for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
        assert list(optimizer.param_groups[0]["params"]) == []
        optimizer.param_groups[0]["params"] = params
    lockstep.check()


@pytest.mark.parametrize("replace, container", OTHERS.values(), ids=OTHERS.keys())
def test_controls_reach_every_container(spec, replace, container):
    """A policy, an armed clip and an average see the same parameters as the step."""
    finals = []
    for odd in (False, True):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
        for i, p in enumerate(model.parameters()):
            p.data.copy_(torch.linspace(-1, 1, p.numel(), dtype=torch.float64).view_as(p) + i)
        averaged = AveragedModel(model)
        optimizer = spec.ours(two_groups(list(model.parameters())), **spec.typical)
        for p in model.parameters():
            p.grad = p.detach() / 2
        optimizer.step()
        if odd:
            replace(optimizer, container)
        policy = optimizer.set_grad_policy(max_norm=0.1)
        optimizer.average_into(averaged)
        optimizer.step()
        norm = optimizer.clip_grad_norm(0.2)
        optimizer.step()
        finals.append([policy.last_norm, norm, *averaged.parameters(), *model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*finals, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [None, 1.5, SimpleNamespace(grad=torch.ones(2), device=torch.device("cpu"))],
    ids=["None", "number", "object"],
)
def test_parameter_that_is_no_tensor(spec, wrong):
    params = make_params([(2,), (3,)])
    optimizer = spec.ours(params, **spec.typical)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.param_groups[0]["params"] = [params[0], wrong]
    with pytest.raises((AttributeError, TypeError), match="'grad'|expected a tensor|__torch_function__"):
        optimizer.step()
    with pytest.raises(
        (AttributeError, TypeError), match="parameter 1 of group 0 is a .*, expected a tensor|no attribute"
    ):
        optimizer.clip_grad_norm(1.0)
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("wrong", [None, "three", [1], torch.tensor([1.0, 2.0])], ids=repr)
def test_number_of_state_that_is_none(wrong):
    """SparseAdam counts in a Python number."""
    params = make_params([(4, 2), (3, 2)])
    optimizer = optim_ext.SparseAdam(params)
    for p in params:
        p.grad = torch.ones_like(p).to_sparse(1)
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.state[params[1]]["step"] = wrong
    for _ in range(2):
        with pytest.raises(RuntimeError, match="parameter 1 of group 0: its state 'step' is .*, expected a number"):
            optimizer.step()
    assert torch.equal(params[0], before)
    optimizer.state[params[1]]["step"] = 1
    optimizer.step()


@pytest.mark.parametrize("wrong", ["exp_avg", [1, 2], SimpleNamespace()], ids=["text", "list", "object"])
def test_state_of_a_parameter_that_is_no_mapping(wrong):
    params = make_params([(4,), (3,)])
    optimizer = optim_ext.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[params[1]] = wrong
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="parameter 1 of group 0: its state is .*, expected a dict"):
        optimizer.step()
    assert torch.equal(params[0], before)
