"""Each op by its schema: torch.library.opcheck over sample inputs, fakes, empty, short and undefined lists."""

import pytest
import torch
from lockstep import bits, copy_of, make_params, random
from specs import SPECS, cases
from torch._subclasses.fake_tensor import FakeTensorMode

from optim_ext import _C

TABLES = _C.step_ops()
STATE_KEYS = {name: key for table in TABLES.values() for name, key, _ in table["lists"]}


def op_of(spec):
    return getattr(torch.ops.optim_ext, spec.op).default


def is_list(argument):
    """Of the lists every call gives; `averages` may be left out."""
    return isinstance(argument.type, torch.ListType) and not argument.has_default_value()


def state_key(argument):
    """momentum_buffers holds what state_dict calls momentum_buffer, and so on."""
    return STATE_KEYS[argument.name]


def positive(value):
    """State as a step would leave it; for a complex parameter in both parts."""
    return torch.view_as_complex(torch.view_as_real(value).abs()) if value.is_complex() else value.abs()


PARTS = {
    name: (option, index)
    for table in TABLES.values()
    for name, _, option, index in table["hypers"]
    if index is not None
}


def hyper(name, options):
    """The value of an op's argument under the options of a group."""
    if name in PARTS:
        key, index = PARTS[name]
        value = options[key][index]
        return torch.finfo(torch.float32).eps if value is None else value
    return False if name == "is_first_step" else options[name]


def sample(spec, options, dtype=torch.float32, shapes=((3, 4), (5,), ())):
    """Positional lists and keyword arguments of one call, as a step would make it."""
    defaults = spec.torch(make_params(((1,),)), **copy_of(options)).param_groups[0]
    keys = spec.state(options)
    lists, keywords = [], {}
    for position, argument in enumerate(op_of(spec)._schema.arguments):
        name = argument.name
        if is_list(argument):
            key = state_key(argument)
            if key in spec.numbers:
                lists.append([spec.number(key, 3.0) for _ in shapes])
            elif position < 2 or key in keys:
                own = shapes if position < 2 else [spec.state_shape(key, shape) for shape in shapes]
                values = [random(s, dtype, 10 * position + i) for i, s in enumerate(own) if s is not None]
                lists.append(values if position < 2 else [positive(value) for value in values])
            else:
                lists.append([])
        elif argument.kwarg_only and not argument.has_default_value():
            value = hyper(name, defaults)
            is_tensor = isinstance(argument.type, torch.TensorType)
            keywords[name] = torch.as_tensor(value, dtype=torch.float64) if is_tensor else value
    return lists, keywords


def everything(lists):
    return [bits(tensor) for one in lists for tensor in one if tensor.device.type == "cpu"]


def test_schema(spec):
    """Lists first, under torch.optim's plural names, then keyword-only hyper-parameters, then what all ops have."""
    schema = op_of(spec)._schema
    arguments = schema.arguments
    assert schema.name == f"optim_ext::{spec.op}" and list(schema.returns) == []
    positional = [a for a in arguments if not a.kwarg_only]
    assert all(is_list(a) for a in positional)
    assert [a.name for a in positional[:2]] == ["params", "grads"]
    assert {state_key(a) for a in positional[2:]} >= spec.state(spec.typical)
    common = [a.name for a in arguments if a.has_default_value()]
    assert common == ["grad_scale", "found_inf", "grad_factor", "averages", "average_weight", "companions"]
    assert all(a.alias_info is not None and a.alias_info.is_write for a in positional)
    group = spec.torch(make_params(((1,),))).param_groups[0]
    for argument in arguments[len(positional) : -len(common)]:
        known = {*group, *PARTS, "is_first_step"}
        assert argument.name in known


def test_registered_where_it_should_be(spec):
    for key in ("CPU",):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"optim_ext::{spec.op}", key)
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"optim_ext::{spec.op}", "CompositeImplicitAutograd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_opcheck(spec, dtype):
    lists, keywords = sample(spec, spec.typical, dtype)
    torch.library.opcheck(op_of(spec), tuple(lists), keywords)


def test_opcheck_for_every_option_set(case):
    lists, keywords = sample(case.spec, case.options)
    torch.library.opcheck(op_of(case.spec), tuple(lists), keywords, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_with_grad_scale(spec):
    lists, keywords = sample(spec, spec.typical)
    torch.library.opcheck(
        op_of(spec), tuple(lists), {**keywords, "grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0)}
    )


def test_opcheck_on_mixed_dtypes_and_layouts(spec):
    lists, keywords = sample(spec, spec.typical, shapes=((4, 6), (4, 6), (8,)))
    for one in lists:
        if len(one) == 3 and one[0].dim() == 2:
            one[0] = one[0].bfloat16()
            one[1] = one[1].t().contiguous().t()
            one[2] = torch.stack([one[2], one[2]], -1)[:, 0]
    torch.library.opcheck(op_of(spec), tuple(lists), keywords)


def test_op_is_the_step(case):
    """Called by hand with the state of an optimizer, the op does what step() does."""
    params, state_params = make_params(), make_params()
    optimizers = [case.spec.ours(own, **copy_of(case.options)) for own in (params, state_params)]
    for own, optimizer in zip((params, state_params), optimizers, strict=True):
        for step in range(2):
            for i, param in enumerate(own):
                param.grad = random(param.shape, param.dtype, 10 * step + i)
            optimizer.step()
    optimizers[0].step()
    _, keywords = sample(case.spec, case.options)
    lists = []
    for position, argument in enumerate(op_of(case.spec)._schema.arguments):
        if not is_list(argument):
            continue
        if position < 2:
            lists.append([p if position == 0 else p.grad for p in state_params])
        else:
            key = state_key(argument)
            states = [optimizers[1].state.get(p, {}) for p in state_params]
            lists.append([state[key] for state in states if key in state])
    with torch.no_grad():
        op_of(case.spec)(*lists, **keywords)
    assert [bits(p) for p in params] == [bits(p) for p in state_params]


@pytest.mark.only_for(
    lambda spec: spec.name != "Rprop", reason="takes no other tensor either, so the dispatcher cannot tell a device"
)
def test_empty_lists(spec):
    lists, keywords = sample(spec, spec.typical, shapes=())
    op_of(spec)(*lists, **keywords)


def positions(spec, options):
    keys = spec.state(options)
    arguments = [a for a in op_of(spec)._schema.arguments if is_list(a)]
    return [(i, a.name) for i, a in enumerate(arguments) if i < 2 or state_key(a) in keys]


def refused(spec, lists, keywords, error, *words):
    before = everything([[t for t in one if t is not None] for one in lists])
    with pytest.raises(error) as caught:
        op_of(spec)(*lists, **keywords)
    message = str(caught.value)
    for word in (spec.op, *words):
        assert word in message, message
    assert everything([[t for t in one if t is not None] for one in lists]) == before


def test_lists_of_different_lengths(spec):
    for position, name in positions(spec, spec.typical):
        for change in (lambda one: one[:-1], lambda one: [*one, one[-1].clone()], lambda one: []):
            lists, keywords = sample(spec, spec.typical)
            lists[position] = change(lists[position])
            if position == 0 and not lists[0]:
                refused(spec, lists, keywords, ValueError, "params has 0")
            else:
                refused(spec, lists, keywords, ValueError, "equally long", name if position else "params")


def test_unused_list_given_all_the_same(spec):
    """A list the options do not use may be empty or as long as the others, nothing between; it is not touched."""
    bare = {key: value for key, value in spec.typical.items() if key in ("lr", "weight_decay")}
    used = {name for _, name in positions(spec, bare)}
    arguments = [a for a in op_of(spec)._schema.arguments if is_list(a)]
    for position, argument in enumerate(arguments):
        if argument.name in used:
            continue
        lists, keywords = sample(spec, bare)
        lists[position] = [torch.full_like(p, 7.0) for p in lists[0]]
        op_of(spec)(*lists, **keywords)
        assert all((t == 7).all() for t in lists[position])
        lists, keywords = sample(spec, bare)
        lists[position] = [torch.ones(3, 4)]
        refused(spec, lists, keywords, ValueError, argument.name)


def test_wrong_tensors_name_list_and_index(spec):
    for position, name in positions(spec, spec.typical):
        lists, keywords = sample(spec, spec.typical)
        if len(lists[position]) < len(lists[0]):
            continue  # state that only some parameters have: test_adafactor.py
        if STATE_KEYS[name] in spec.numbers:
            lists[position][1] = torch.ones(2)
            refused(spec, lists, keywords, RuntimeError, f"{name}[1]", "one element")
            continue
        for wrong, words in (
            (torch.ones(7), ("[7]", "[5]")),
            (torch.ones(5, dtype=torch.int64), ("Long",)),
            (torch.ones(5, dtype=torch.complex64), ("Complex",)),
            (torch.ones(5).to_sparse(), ("Sparse",)),
        ):
            if position == 0 and words == ("[7]", "[5]"):
                continue  # the parameter gives the shape: the others are then wrong
            if position == 0 and words == ("Complex",):
                continue  # and the same for its being complex
            if name == "grads" and words == ("Sparse",) and TABLES[spec.op]["is_element_wise"]:
                continue  # which steps the rows it holds
            lists, keywords = sample(spec, spec.typical)
            lists[position][1] = wrong
            with pytest.raises((RuntimeError, NotImplementedError)) as caught:
                op_of(spec)(*lists, **keywords)
            if words != ("Sparse",):  # which the dispatcher may refuse before the op sees it
                assert f"{name}[1]" in str(caught.value) and all(w in str(caught.value) for w in words)


def test_nan_and_shape_of_tensor_hypers(spec):
    for argument in op_of(spec)._schema.arguments:
        if not argument.kwarg_only or not isinstance(argument.type, torch.TensorType):
            continue
        for wrong in (torch.tensor(float("nan")), torch.ones(2), torch.ones(0)):
            lists, keywords = sample(spec, spec.typical)
            keywords[argument.name] = wrong
            option, index = PARTS.get(argument.name, (argument.name, None))
            refused(spec, lists, keywords, ValueError, option if index is None else f"{option}[{index}]")


def test_hypers_are_keyword_only(spec):
    lists, keywords = sample(spec, spec.typical)
    with pytest.raises(RuntimeError, match="positional argument"):
        op_of(spec)(*lists, *keywords.values())
    for name in keywords:
        with pytest.raises(RuntimeError, match=f"missing value for argument '{name}'"):
            op_of(spec)(*lists, **{key: value for key, value in keywords.items() if key != name})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("case_of_ten", cases()[::10], ids=lambda c: c.id)
def test_fake_tensors(case_of_ten, device):
    """Shapes flow through without data, for devices this machine may not have."""
    spec, options = case_of_ten.spec, case_of_ten.options
    real_lists, real_keywords = sample(spec, options)
    with FakeTensorMode() as mode:
        lists = [[torch.empty_like(mode.from_tensor(t), device=device) for t in one] for one in real_lists]
        keywords = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in real_keywords.items()}
        assert op_of(spec)(*lists, **keywords) is None
        assert all(t.device.type == device for t in (*lists[0], *lists[1]))


@pytest.mark.only_for(lambda spec: not spec.reads_numbers, reason="torch's code reads its numbers")
@pytest.mark.torchs
def test_step_on_fake_tensors(spec):
    """A whole step in FakeTensorMode, as memory planners run it, computes nothing and raises nothing."""
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(3, 4)), torch.nn.Parameter(torch.empty(5))]
        optimizer = spec.ours(params, **spec.typical)
        for param in params:
            param.grad = torch.empty_like(param)
        for _ in range(2):
            optimizer.step()
        assert {key for entries in optimizer.state.values() for key in entries} == spec.state(spec.typical)


def test_every_op_has_a_row():
    """Those of SparseAdam and Muon, which take sparse gradients and matrices only, have test files of their own."""
    assert sorted(_C.step_ops()) == sorted([*(spec.op for spec in SPECS), "muon_", "sparse_adam_"])


GRADIENT_OPS = {
    "grad_norm": {"norm_type": 1.0, "max_norm": 0.5, "skip_above": 1.0},
    "norms": {"norm_type": 2.0},
    "count_nonfinite": {},
    "clip_": {"limit": 0.5, "factor": torch.tensor(0.5)},
}


@pytest.mark.parametrize("name", GRADIENT_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_gradient_ops(name, dtype):
    tensors = [random(shape, dtype, i) for i, shape in enumerate(((3, 4), (5,), (), (0,), (6, 2)))]
    tensors[4] = tensors[4].t()
    torch.library.opcheck(getattr(torch.ops.optim_ext, name).default, (tensors,), GRADIENT_OPS[name])


def test_grad_norm_with_all_it_can_be_given():
    given = {
        "grad_scale": torch.tensor(4.0),
        "found_inf": torch.ones(1),
        "skips": torch.tensor(2),
        "skip_nonfinite": True,
    }
    op = torch.ops.optim_ext.grad_norm.default
    torch.library.opcheck(op, ([random((3, 4), torch.float32, 1)],), given)
    given["skips"].fill_(2)
    norm, factor, skip = op([torch.full((4,), 8.0)], max_norm=2.0, **given)
    assert (norm.item(), factor.item(), skip.item(), given["skips"].item()) == (4.0, 2.0 / (4.0 + 1e-6), 1.0, 3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"norm_type": 3.0}, "norm_type must be 1, 2 or inf, found 3"),
        ({"max_norm": -1.0}, "max_norm must be at least 0, found -1"),
        ({"skip_above": float("nan")}, "skip_above must be at least 0, found nan"),
        ({"grad_scale": torch.ones(2)}, "grad_scale must be one Float element"),
        ({"skips": torch.tensor(0.0)}, "skips must be one Long element"),
    ],
)
def test_grad_norm_refuses(wrong, words):
    with pytest.raises(ValueError, match=words):
        torch.ops.optim_ext.grad_norm([torch.ones(3)], **wrong)


def test_gradient_ops_name_the_tensor_they_refuse():
    for name, argument in (
        ("grad_norm", "grads"),
        ("norms", "tensors"),
        ("count_nonfinite", "tensors"),
        ("clip_", "tensors"),
    ):
        with pytest.raises(RuntimeError, match=rf"optim_ext::{name}: {argument}\[1\] has dtype Long"):
            getattr(torch.ops.optim_ext, name)([torch.ones(3), torch.ones(3, dtype=torch.int64)])
