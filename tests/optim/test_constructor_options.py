"""Options in the constructor: set_grad_policy from the first step on, for frameworks that take a class and keywords."""

import ast
import copy
import inspect
import io
import math
import pickle
from pathlib import Path

import pytest
import torch
from device import DEVICE
from lockstep import bits, copy_of, give_grads, make_params, snapshot

import optim_ext
from optim_ext import LBFGS, swa_utils
from optim_ext._constructor import AddedOptions, PolicyOptions

POLICY = {"max_norm": 0.5, "norm_type": 1.0, "skip_nonfinite": True, "skip_above": 1e6}
NATIVE = [cls for name, cls in vars(optim_ext).items() if isinstance(cls, type) and hasattr(cls, "set_grad_policy")]


@optim_ext.rule(state=("exp_avg",), backend="interpreted")
def Momentum(param, grad, exp_avg, *, lr=0.1, beta=0.9):
    exp_avg = beta * exp_avg + grad
    return param - lr * exp_avg, exp_avg


def train(optimizer, params, bad=(2,), steps=5):
    for step in range(steps):
        give_grads(params, step)
        if step in bad:
            params[4].grad[0, 0] = math.nan
        optimizer.step()
    return [bits(p) for p in params]


@pytest.mark.parametrize("options", [POLICY, {"max_norm": 0.1}, {"skip_nonfinite": True}, {"skip_above": 0.0}], ids=str)
def test_the_same_as_set_grad_policy(spec, options):
    """Bit for bit, and nothing of it is in groups, defaults or state."""
    bad = (2,) if "skip_nonfinite" in options else ()
    params, others, plain = make_params(), make_params(), make_params()
    ours = spec.ours(params, **copy_of(spec.typical), **options)
    later = spec.ours(others, **copy_of(spec.typical))
    later.set_grad_policy(**options)
    without = spec.ours(plain, **copy_of(spec.typical))
    assert ours.grad_policy == later.grad_policy and repr(ours) == repr(later) and "grad_policy" in repr(ours)
    assert train(ours, params, bad) == train(later, others, bad)
    assert ours.grad_policy.skipped_steps == later.grad_policy.skipped_steps
    assert bits(ours.grad_policy.last_norm) == bits(later.grad_policy.last_norm)
    train(without, plain, ())
    for mine, its in ((ours.defaults, without.defaults), (ours.param_groups[0], without.param_groups[0])):
        assert mine.keys() == its.keys()
    assert [g.keys() for g in ours.state_dict()["param_groups"]] == [
        g.keys() for g in without.state_dict()["param_groups"]
    ]


FORMATS = {
    "generator": lambda params: (p for p in params),
    "named": lambda params: [(f"p{i}", p) for i, p in enumerate(params)],
    "groups": lambda params: [{"params": params[:2], "lr": 0.5}, {"params": params[2:]}],
    "a group of one": lambda params: ({"params": p} for p in params),
    "dict values": lambda params: dict(enumerate(params)).values(),
}


@pytest.mark.parametrize("build", FORMATS.values(), ids=FORMATS.keys())
def test_one_norm_over_parameters_in_any_format(build):
    params, others = make_params(), make_params()
    ours, later = optim_ext.AdamW(build(params), 0.1, **POLICY), optim_ext.AdamW(build(others), 0.1)
    later.set_grad_policy(**POLICY)
    assert ours._asked().groups == len(ours.param_groups)
    assert train(ours, params) == train(later, others)


def through_torch_save(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


ON_CPU_ALONE = pytest.mark.about_the_cpu("rules have kernels for it alone, and elsewhere take no policy")
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize(
    "make",
    [optim_ext.AdamW, optim_ext.LAMB, pytest.param(Momentum, marks=ON_CPU_ALONE)],
    ids=lambda made: made.__name__,
)
def test_copies_keep_it(make, copied):
    params = make_params()
    optimizer = make(params, **POLICY)
    train(optimizer, params)
    other = copied(optimizer)
    others = [p for group in other.param_groups for p in group["params"]]
    assert other.grad_policy.skipped_steps == 1 and repr(other) == repr(optimizer)
    assert train(other, others) == train(optimizer, params)


def test_set_grad_policy_replaces_it():
    params, plain = make_params(), make_params()
    optimizer, other = optim_ext.SGD(params, lr=0.1, **POLICY), optim_ext.SGD(plain, lr=0.1)
    policy = optimizer.set_grad_policy(skip_above=1e9)
    assert optimizer.grad_policy is policy and policy.max_norm is None
    optimizer.set_grad_policy()
    assert optimizer.grad_policy is None
    assert train(optimizer, params, ()) == train(other, plain, ())
    shared = optim_ext.utils.share_grad_policy([optim_ext.SGD(make_params(), **POLICY), optimizer], max_norm=2.0)
    assert optimizer.grad_policy is shared


def test_subclasses():
    class Halved(optim_ext.AdamW):
        def __init__(self, params, speed, **others):
            super().__init__(params, lr=speed / 2, **others)

    class Fixed(optim_ext.AdamW):
        def __init__(self, params):
            super().__init__(params, **POLICY)

    class Same(optim_ext.SGD):
        pass

    for made in (Halved(make_params(), 0.2, **POLICY), Fixed(make_params()), Same(make_params(), **POLICY)):
        assert made.grad_policy == optim_ext.GradPolicy(**POLICY)
    assert list(inspect.signature(Halved).parameters) == ["params", "speed", "others"]
    assert list(inspect.signature(Fixed).parameters) == ["params"]
    assert inspect.signature(Same) == inspect.signature(optim_ext.SGD)
    with pytest.raises(TypeError, match="'skip_nonfinit'; did you mean 'skip_nonfinite'?"):
        Halved(make_params(), 0.2, skip_nonfinit=True)


@ON_CPU_ALONE
def test_rules_of_a_user():
    class Slow(Momentum):
        def __init__(self, params, **others):
            super().__init__(params, lr=0.01, **others)

    params, others = make_params(), make_params()
    ours, later = Slow(params, **POLICY), Momentum(others, lr=0.01)
    later.set_grad_policy(**POLICY)
    assert train(ours, params) == train(later, others)
    assert not POLICY.keys() & ours.param_groups[0].keys() and not POLICY.keys() & ours.defaults.keys()
    assert all(name in Momentum.__doc__ for name in ("max_norm", "param_precision", "lazy_rows"))


@pytest.mark.parametrize("name", [*POLICY, "param_precision", "lazy_rows"])
def test_a_rule_has_no_option_of_such_a_name(name):
    text = f"def f(param, grad, *, {name}=1.0): return param"
    names = {}
    exec(text, names)
    with pytest.raises(optim_ext.RuleError, match=f"every rule has {name} already; give the option another name"):
        optim_ext.rule(source=text)(names["f"])


def test_lbfgs_skips_and_does_not_clip():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = LBFGS([{"params": [param]}, {"params": [torch.nn.Parameter(torch.ones(1))]}], 1, skip_nonfinite=True)

    def closure():
        optimizer.zero_grad()
        loss = (param * math.nan).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.grad_policy.skipped_steps == 1 and (param == 1).all()
    with pytest.raises(RuntimeError, match="LBFGS does not clip"):
        LBFGS([param], max_norm=1.0)
    assert LBFGS([param], max_norm=None).grad_policy is None  # as configurations have it


@pytest.mark.about_the_cpu("SparseAdam cannot skip on a GPU")
def test_sparse_adam():
    tables = [torch.nn.Parameter(torch.ones(10, 4)) for _ in range(2)]
    ours, later = optim_ext.SparseAdam(tables[:1], **POLICY), optim_ext.SparseAdam(tables[1:])
    later.set_grad_policy(**POLICY)
    for value in (1.0, math.nan, 2.0):
        for table, optimizer in zip(tables, (ours, later), strict=True):
            table.grad = torch.sparse_coo_tensor([[1, 3, 1]], torch.full((3, 4), value), (10, 4))
            optimizer.step()
    assert bits(tables[0]) == bits(tables[1]) and ours.grad_policy.skipped_steps == 1


def test_together_with_precision_averages_and_a_scaler():
    """Each as it is on its own; a step that GradScaler skips is skipped once."""
    results = []
    for given in ({**POLICY, "param_precision": "master"}, {"param_precision": "master"}):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3).bfloat16()
        optimizer = optim_ext.AdamW(model.named_parameters(), lr=0.1, fused=True, **given)
        if "max_norm" not in given:
            optimizer.set_grad_policy(**POLICY)
        ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5), dtype=torch.float32)
        optimizer.average_into(ema)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((2, 4), math.inf if step == 1 else 1.0 + step).bfloat16()).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.grad_policy.skipped_steps == 1 and ema.n_averaged == 3
        results.append([bits(t) for t in (*model.parameters(), *ema.parameters(), optimizer.grad_policy.last_norm)])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"max_norm": -1.0}, "max_norm must be at least 0, found -1.0"),
        ({"skip_above": math.nan}, "skip_above must be at least 0, found nan"),
        ({"max_norm": 1.0, "norm_type": 3}, "norm_type must be 1, 2 or inf, found 3.0"),
        ({"norm_type": 0.5}, "norm_type must be 1, 2 or inf, found 0.5"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [*NATIVE, Momentum], ids=lambda m: m.__name__)
def test_bad_values(make, wrong, words):
    if make is LBFGS and "max_norm" in wrong:
        return
    with pytest.raises(ValueError, match=words):
        make(make_params(((3, 3),)), **wrong)


def test_a_policy_of_nothing_is_none():
    params = make_params()
    assert (
        optim_ext.AdamW(params, max_norm=None, norm_type=1, skip_nonfinite=False, skip_above=None).grad_policy is None
    )


MISSPELT = [
    (optim_ext.AdamW, "wieght_decay", "weight_decay"),
    (optim_ext.AdamW, "maxnorm", "max_norm"),
    (optim_ext.SGD, "nestrov", "nesterov"),
    (optim_ext.LAMB, "beta", "betas"),
    (optim_ext.Adafactor, "param_precison", "param_precision"),
    (LBFGS, "line_search", "line_search_fn"),
    (LBFGS, "strict_maxeval", "strict_max_eval"),
    (Momentum, "skip_nonfinte", "skip_nonfinite"),
    (Momentum, "beta1", "beta"),
]


@pytest.mark.parametrize("make, given, meant", MISSPELT, ids=lambda v: getattr(v, "__name__", v))
def test_an_unknown_option_names_the_nearest_one(make, given, meant):
    with pytest.raises(
        TypeError, match=rf"{make.__name__}\(\) got an unexpected .* '{given}'; did you mean '{meant}'\?"
    ):
        make(make_params(((3, 3),)), **{given: 1.0})


def test_an_unknown_option_without_a_near_one_lists_them():
    with pytest.raises(
        TypeError, match=r"AdamW\(\) got an unexpected keyword argument 'zzz'; it takes lr, betas, .*max_norm"
    ):
        optim_ext.AdamW(make_params(), zzz=1)
    with pytest.raises(TypeError, match="multiple values"):  # what is wrong otherwise is torch's to say
        optim_ext.AdamW(make_params(), 0.1, lr=0.1)


def test_the_signature_has_them_last_and_help_tells_of_them():
    for cls in NATIVE:
        assert list(inspect.signature(cls).parameters)[-4:] == list(POLICY)
        assert "``max_norm``, ``norm_type``, ``skip_nonfinite``, ``skip_above``" in cls.__doc__
    assert "``param_precision``" in optim_ext.AdamW.__doc__ and "``param_precision``" not in LBFGS.__doc__


def constructor_for_type_checkers(cls):
    """The one that is there for them alone, if there is one, else the constructor itself."""
    tree = ast.parse(Path(inspect.getfile(cls)).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__).body
    found = [node for node in body for node in ast.walk(node) if getattr(node, "name", None) == "__init__"]
    return found[0].args


@pytest.mark.parametrize("cls", NATIVE, ids=lambda cls: cls.__name__)
def test_type_checkers_see_the_arguments_there_are(cls):
    """What a version of torch does not have yet may be among them, and what it has more of may be missing."""
    typed, signature = constructor_for_type_checkers(cls), inspect.signature(cls)
    added = PolicyOptions if cls is LBFGS else AddedOptions
    assert typed.kwarg.annotation.slice.id == added.__name__
    assert all(name in signature.parameters for name in added.__annotations__)
    by_place = [arg.arg for arg in typed.args[1:]]
    of_ours = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert of_ours[: len(by_place)] == by_place
    by_name = {arg.arg for arg in typed.kwonlyargs} | added.__annotations__.keys()
    assert by_name - {"maximize", "decoupled_weight_decay"} <= signature.parameters.keys()


def test_nothing_is_written_by_a_refused_constructor():
    params = make_params()
    kept = optim_ext.AdamW(params)
    train(kept, params, ())
    before = snapshot(kept)
    with pytest.raises(TypeError):
        optim_ext.AdamW(params, max_nrm=1.0)
    assert snapshot(kept) == before
