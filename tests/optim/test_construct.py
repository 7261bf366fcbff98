"""Names, signatures, validation and parameter formats are torch's own."""

import importlib
import inspect
import warnings

import pytest
import torch
from lockstep import Lockstep, copy_of, give_grads, make_params, twin, widen_hypers

import optim_ext
from optim_ext._precision.options import DEFAULTS


def test_public_names():
    for name in torch.optim.__all__:
        assert hasattr(optim_ext, name), name
    assert set(torch.optim.__all__) <= set(optim_ext.__all__)
    assert optim_ext.Optimizer is torch.optim.Optimizer
    assert optim_ext.lr_scheduler is torch.optim.lr_scheduler


def test_every_public_name_is_there_and_listed():
    assert len(set(optim_ext.__all__)) == len(optim_ext.__all__)
    for name in optim_ext.__all__:
        assert hasattr(optim_ext, name), name
    assert {"GradPolicy", "GroupNorms", "GroupReport", "NonFinite"} <= set(optim_ext.__all__)
    assert "utils" not in optim_ext.__all__  # nearly every program has one of its own


@pytest.mark.torchs
def test_modules_are_found_by_name():
    """``from optim_ext.lr_scheduler import ...`` is what replacing the package's name gives."""
    for name in ("lr_scheduler", "optimizer"):
        ours = importlib.import_module(f"optim_ext.{name}")
        assert ours is importlib.import_module(f"torch.optim.{name}")
    assert importlib.import_module("optim_ext.swa_utils") is optim_ext.swa_utils


def test_subclass_of_torchs_class(spec):
    assert issubclass(spec.ours, spec.base) and spec.ours is not spec.base
    assert spec.ours.__name__ == spec.name
    assert spec.ours.step is not spec.base.step


def test_signature(spec):
    """Torch's, which rows are stepped, how parameters and state are kept, and the policy."""
    ours, theirs = inspect.signature(spec.ours), inspect.signature(spec.torch)
    policy = {"max_norm": None, "norm_type": 2.0, "skip_nonfinite": False, "skip_above": None}
    ours_alone = {"lazy_rows": False, **DEFAULTS, **policy}
    added = [(name, inspect.Parameter.KEYWORD_ONLY, default) for name, default in ours_alone.items()]
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        *((p.name, p.kind, p.default) for p in theirs.parameters.values()),
        *added,
    ]
    assert "grad_scaler" not in inspect.signature(spec.ours.step).parameters


def test_documented(spec):
    assert spec.ours.__doc__ and spec.ours.step.__doc__


def test_defaults_groups_and_repr(case):
    ours, theirs = (make(make_params(), **copy_of(case.options)) for make in (case.spec.ours, case.spec.torch))
    assert ours.defaults == theirs.defaults
    assert repr(ours) == repr(theirs)
    assert [g.keys() for g in ours.param_groups] == [g.keys() for g in theirs.param_groups]


def outcome(build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            build()
        except Exception as error:
            return type(error), str(error)
    return None


def test_error_inputs_of_torchs_own_tests(spec):
    for entry in spec.error_inputs:
        given = entry.optimizer_error_input
        params = [torch.nn.Parameter(torch.randn(1))] if given.params is None else given.params
        if isinstance(params, list) and isinstance(params[0], torch.Tensor) and params[0].is_complex() and spec.is_real:
            continue  # refused by the step: test_adafactor.py
        expected = outcome(lambda: spec.torch(params, **given.kwargs))  # noqa: B023
        assert expected is not None and entry.error_type is expected[0], given.desc
        assert outcome(lambda: spec.ours(params, **given.kwargs)) == expected, given.desc  # noqa: B023


BAD_OPTIONS = [
    {"lr": -1.0},
    {"lr": torch.tensor([1.0, 2.0])},
    {"eps": -1e-8},
    {"weight_decay": -1.0},
    {"momentum": -0.5},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
    {"alpha": -1.0},
    {"betas": (1.0, 0.0)},
    {"betas": (0.5, -0.1)},
    {"betas": (0.5, torch.tensor(0.5))},
    {"betas": (torch.tensor(0.5), 0.5)},
    {"betas": (torch.tensor([0.5, 0.5]), torch.tensor(0.9))},
    {"betas": (torch.tensor(0.5), torch.tensor(0.9)), "foreach": True},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"lr_decay": -0.5},
    {"initial_accumulator_value": -0.5},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    {"lr": "fast"},
    {"no_such_option": 1},
]


@pytest.mark.torchs
@pytest.mark.parametrize("options", BAD_OPTIONS, ids=lambda o: ",".join(o))
def test_bad_options(spec, options):
    """Whatever torch says to these, errors word for word."""
    param = torch.nn.Parameter(torch.randn(3))
    expected = outcome(lambda: spec.torch([param], **options))
    found = outcome(lambda: spec.ours([param], **options))
    if expected is not None and expected[0] is TypeError:
        assert found is not None and found[0] is TypeError
    else:
        assert found == expected


BAD_PARAMS = {
    "none at all": lambda p: [],
    "not a tensor": lambda p: [3],
    "a tensor": lambda p: p[0],
    "not a leaf": lambda p: [p[0] * 2],
    "a set in a group": lambda p: [{"params": {p[0]}}],
    "a string": lambda p: "params",
    "twice in one group": lambda p: [p[0], p[0]],
    "in two groups": lambda p: [{"params": p}, {"params": p[:1]}],
    "names for some": lambda p: [("a", p[0]), p[1]],
    "groups that disagree on names": lambda p: [{"params": [("a", p[0])]}, {"params": [p[1]]}],
}


@pytest.mark.parametrize("build", BAD_PARAMS.values(), ids=BAD_PARAMS.keys())
def test_bad_params(spec, build):
    params = make_params(((2,), (3,)))
    expected = outcome(lambda: spec.torch(build(params)))
    assert expected is not None
    assert outcome(lambda: spec.ours(build(params))) == expected


FORMATS = {
    "list": list,
    "generator": iter,
    "tuple": tuple,
    "one group": lambda p: [{"params": p}],
    "a tensor per group": lambda p: [{"params": one} for one in p],
    "named": lambda p: [(f"p{i}", one) for i, one in enumerate(p)],
    "named groups": lambda p: [{"params": [(f"p{i}", one)]} for i, one in enumerate(p)],
    "an empty group": lambda p: [{"params": p}, {"params": []}],
    "dict values": lambda p: dict(enumerate(p)).values(),
}


@pytest.mark.parametrize("build", FORMATS.values(), ids=FORMATS.keys())
def test_parameter_formats(spec, build):
    lockstep = Lockstep(spec, groups=build, dtype=torch.float64).step(3).check()
    names = [g.get("param_names") for g in lockstep.ours.param_groups]
    assert names == [g.get("param_names") for g in lockstep.theirs.param_groups]


def test_module_parameters():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = optim_ext.AdamW(module.named_parameters(), lr=0.1)
    before = [p.detach().clone() for p in module.parameters()]
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_plain_tensors(spec):
    """Not Parameters, some that do not require grad."""
    plain = [torch.randn(4), torch.randn(3, requires_grad=True), torch.randn(6, 2)[:, 0]]
    Lockstep(spec, params=plain).step(3).check()


def test_duplicate_parameter_is_updated_twice(variant):
    """As in torch's for-loop: warned about, then each mention counts."""
    params = make_params(((3, 2), (5,)), torch.float64)
    twins = twin(params)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours = variant.spec.ours([params[0], params[1], params[0]], **copy_of(variant.options))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        theirs = variant.spec.torch([twins[0], twins[1], twins[0]], **copy_of(variant.options))
    widen_hypers(theirs)
    for step in range(4):
        give_grads(params, step)
        give_grads(twins, step)
        ours.step()
        theirs.step()
    for mine, other in zip(params, twins, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)
        for key, value in theirs.state.get(other, {}).items():
            torch.testing.assert_close(ours.state[mine][key], value, rtol=1e-11, atol=1e-12)
