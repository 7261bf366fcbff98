"""Steps that find everything as it was take a shorter way. Whatever changes between two steps, an optimizer that has been
stepping that way does what one does that plans every step anew: the same bits, versions and errors."""

import gc
import sys
from weakref import ref

import pytest
import torch
from device import ON_CPU
from lockstep import give_grads, make_params
from torch.utils._python_dispatch import TorchDispatchMode

import optim_ext as optim
from optim_ext import _C

SHAPES = ((6, 4), (5,), (), (3, 2, 2))
WARM_UP, STEPS = 5, 4

MAKERS = {
    "AdamW": lambda groups: optim.AdamW(groups, lr=1e-2, weight_decay=1e-2),
    "Adam amsgrad": lambda groups: optim.Adam(groups, lr=1e-2, amsgrad=True),
    "SGD momentum": lambda groups: optim.SGD(groups, lr=1e-2, momentum=0.9),
    "Adagrad": lambda groups: optim.Adagrad(groups, lr=1e-2),
}


def groups_of(params, count):
    return [{"params": params[g::count]} for g in range(count)]


def forget_plans(optimizer):
    optimizer._plan = None
    optimizer.__dict__.get("_plans", {}).clear()


def is_repeating(optimizer):
    """Whether a step as it would be taken now has taken the short way before."""
    return optimizer._plan is not None and optimizer._plan.steps_as_before > 0


class Pair:
    """Two optimizers over equal parameters, of which the second one plans every step anew."""

    def __init__(self, make, groups=1, shapes=SHAPES, dtype=torch.float32):
        params = make_params(shapes, dtype)
        self.params = params, make_params(shapes, dtype)
        self.optimizers = [make(groups_of(list(own), groups)) for own in self.params]
        self.count = 0

    def each(self, change):
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            change(params, optimizer)

    def grads(self):
        for params in self.params:
            give_grads(params, self.count)
        self.count += 1

    def step(self):
        raised = []
        for optimizer in self.optimizers:
            try:
                optimizer.step()
                raised.append(None)
            except Exception as error:  # whatever it is, both must raise it
                raised.append((type(error), str(error)))
            if optimizer is self.optimizers[1]:
                forget_plans(optimizer)
        assert raised[0] == raised[1]
        self.compare()
        return raised[0]

    def steps(self, count):
        for _ in range(count):
            self.grads()
            assert self.step() is None

    def warm_up(self):
        self.steps(WARM_UP)
        assert is_repeating(self.optimizers[0]) == ON_CPU  # elsewhere each step looks at what its tensors are

    def compare(self):
        self.compare_values(versions=True)

    def compare_values(self, versions):
        ours, other = self.optimizers
        for p, q in zip(*self.params, strict=True):
            assert_same(p, q)
            if versions and not p.is_inference():
                assert p._version == q._version
            assert (p in ours.state) == (q in other.state)
            if p not in ours.state:
                continue
            assert list(ours.state[p]) == list(other.state[q])
            for key, value in ours.state[p].items():
                if isinstance(value, torch.Tensor):
                    assert_same(value, other.state[q][key])
                    assert not versions or value._version == other.state[q][key]._version, key


def assert_same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    if a.untyped_storage().nbytes() == 0:
        return
    assert torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def make(request):
    return request.param


# What is done between two steps, after the gradients are there.
def nothing(params, optimizer):
    pass


def other_data(params, optimizer):
    params[0].data = params[0].data.clone() + 1


def data_of_another_dtype(params, optimizer):
    params[0].data = params[0].data.double()
    params[0].grad = torch.ones_like(params[0])


def data_of_another_shape(params, optimizer):
    params[0].data = params[0].data.reshape(4, 6).clone()
    params[0].grad = torch.ones_like(params[0])


def set_in_place(params, optimizer):
    with torch.no_grad():
        params[0].set_(torch.full((6, 4), 2.0))


def transposed_in_place(params, optimizer):
    with torch.no_grad():
        params[0].set_(torch.arange(24.0).reshape(4, 6).t())


def storage_taken_away(params, optimizer):
    params[1].untyped_storage().resize_(0)


def storage_made_anew(params, optimizer):
    values = params[1].detach().clone()
    size = params[1].untyped_storage().nbytes()
    params[1].untyped_storage().resize_(0)
    params[1].untyped_storage().resize_(size)
    with torch.no_grad():
        params[1].copy_(values)


def swapped(params, optimizer):
    torch.utils.swap_tensors(params[0], torch.nn.Parameter(params[0].detach() + 1))
    params[0].grad = torch.ones_like(params[0])


def frozen(params, optimizer):
    params[0].requires_grad_(False)


def keys_of(optimizer, p):
    return [key for key, value in optimizer.state[p].items() if value is not None and value.dim() == p.dim() > 0]


def replaced_state(params, optimizer):
    for p in params[:2]:
        for key in keys_of(optimizer, p):
            optimizer.state[p][key] = optimizer.state[p][key] * 2


def state_at_the_same_address(params, optimizer):
    """Another tensor where the interpreter had the one that is gone: its address says nothing of it."""
    for key in keys_of(optimizer, params[0]):
        address = id(optimizer.state[params[0]][key])
        value = optimizer.state[params[0]].pop(key).cpu().numpy() * 3
        made = [torch.from_numpy(value.copy()).to(params[0].device)]
        while id(made[-1]) != address and len(made) < 1000:
            made.append(torch.from_numpy(value.copy()).to(params[0].device))
        assert id(made[-1]) == address or not ON_CPU
        optimizer.state[params[0]][key] = made[-1]


def state_of_another_shape(params, optimizer):
    for key in keys_of(optimizer, params[0]):
        optimizer.state[params[0]][key] = torch.zeros(4, 6)


def state_data_of_another_dtype(params, optimizer):
    for key in keys_of(optimizer, params[0]):
        optimizer.state[params[0]][key].data = optimizer.state[params[0]][key].double()


def state_resized_in_place(params, optimizer):
    for key in keys_of(optimizer, params[0]):
        optimizer.state[params[0]][key].resize_(3, 8)


def state_transposed_in_place(params, optimizer):
    for key in keys_of(optimizer, params[0]):
        value = optimizer.state[params[0]][key]
        value.copy_(value.clone().t().contiguous().reshape(6, 4))
        value.as_strided_((6, 4), (1, 6))


def dropped_entry(params, optimizer):
    optimizer.state.pop(params[0], None)


def cleared_entry(params, optimizer):
    optimizer.state[params[0]].clear()


def added_key(params, optimizer):
    optimizer.state[params[0]]["mine"] = torch.ones(3)


def negative_count(params, optimizer):
    if "step" in optimizer.state[params[1]]:
        optimizer.state[params[1]]["step"].fill_(-1.0)


def higher_count(params, optimizer):
    if "step" in optimizer.state[params[1]]:
        optimizer.state[params[1]]["step"].fill_(1000.0)


def shared_count(params, optimizer):
    if "step" in optimizer.state[params[1]]:
        optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]


def count_in_double(params, optimizer):
    if "step" in optimizer.state[params[1]]:
        optimizer.state[params[1]]["step"] = optimizer.state[params[1]]["step"].double()


def no_grad_of_one(params, optimizer):
    params[1].grad = None


def no_grads(params, optimizer):
    for p in params:
        p.grad = None


def transposed_grad(params, optimizer):
    params[0].grad = torch.arange(24.0).reshape(4, 6).t()


def expanded_grad(params, optimizer):
    params[1].grad = torch.ones(1).expand(5)


def sparse_grad(params, optimizer):
    params[1].grad = torch.ones(5).to_sparse()


def grad_with_an_offset(params, optimizer):
    params[1].grad = torch.arange(9.0)[4:]


def grad_is_parameter(params, optimizer):
    params[0].grad = params[0].detach()


def grad_in_state(params, optimizer):
    keys = keys_of(optimizer, params[0])
    if keys:
        params[0].grad = optimizer.state[params[0]][keys[0]]


def grad_in_earlier_parameter(params, optimizer):
    params[1].grad = params[0].detach().view(-1)[3:8]


def grad_in_later_parameter(params, optimizer):
    params[1].grad = params[3].detach().view(-1)[3:8]


def grad_of_lazy_kind(params, optimizer):
    params[1].grad = torch._neg_view(torch.ones(5))


def overlapping_members(params, optimizer):
    params[1].data = params[0].data.view(-1)[2:7]


def same_memory_twice(params, optimizer):
    params[1].data = params[0].data.view(-1)[:5]
    params[3].data = params[0].data.view(-1)[:12].view(3, 2, 2)


def copied_on_write(params, optimizer):
    optimizer.kept = torch._lazy_clone(params[0].detach()), params[0].detach().clone()


class Quiet(torch.nn.Parameter):
    """A subclass that does nothing."""


class Loud(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def of_another_class(params, optimizer):
    params[0].__class__ = Quiet


def of_a_loud_class(params, optimizer):
    params[0].__class__ = Loud


def option(name, value):
    def change(params, optimizer):
        for group in optimizer.param_groups:
            group[name] = value() if callable(value) else value

    change.__name__ = f"{name}_set"
    return change


def bad_rate(params, optimizer):
    optimizer.param_groups[-1]["lr"] = float("nan")


def rate_of_no_kind(params, optimizer):
    optimizer.param_groups[-1]["lr"] = "fast"


def no_rate(params, optimizer):
    del optimizer.param_groups[-1]["lr"]


def rate_of_one_group(params, optimizer):
    optimizer.param_groups[0]["lr"] *= 0.5


def list_of_betas(params, optimizer):
    """In one object, which is written to from step to step."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = group["betas"] if isinstance(group["betas"], list) else [0.5, 0.9]
            group["betas"][0] *= 0.9


def rate_in_a_tensor(params, optimizer):
    """In one object, which is written to from step to step."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], torch.Tensor):
            group["lr"] = torch.tensor(1e-2)
        group["lr"].mul_(0.5)


def other_parameter(params, optimizer):
    p = torch.nn.Parameter(params[0].detach() + 1)
    p.grad = torch.ones_like(p)
    params[0] = optimizer.param_groups[0]["params"][0] = p


def one_parameter_less(params, optimizer):
    if len(optimizer.param_groups[0]["params"]) > 1:
        optimizer.param_groups[0]["params"].pop()


def one_group_more(params, optimizer):
    p = torch.nn.Parameter(torch.ones(7))
    p.grad = torch.ones(7)
    params.append(p)
    optimizer.add_param_group({"params": [p]})


def loaded(params, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def clipped(params, optimizer):
    optimizer.clip_grad_norm(0.1)


def policy_set(params, optimizer):
    optimizer.set_grad_policy(max_norm=0.1, skip_above=5.0)


def scaled_by_fused(params, optimizer):
    """As GradScaler leaves word to fused optimizers."""
    for group in optimizer.param_groups:
        group["fused"] = True
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)


def skipped_by_fused(params, optimizer):
    for group in optimizer.param_groups:
        group["fused"] = True
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)


CHANGES = [
    nothing,
    other_data,
    data_of_another_dtype,
    data_of_another_shape,
    set_in_place,
    transposed_in_place,
    storage_taken_away,
    storage_made_anew,
    swapped,
    frozen,
    replaced_state,
    state_at_the_same_address,
    state_of_another_shape,
    state_data_of_another_dtype,
    state_resized_in_place,
    state_transposed_in_place,
    dropped_entry,
    cleared_entry,
    added_key,
    negative_count,
    higher_count,
    shared_count,
    count_in_double,
    no_grad_of_one,
    no_grads,
    transposed_grad,
    expanded_grad,
    sparse_grad,
    grad_with_an_offset,
    grad_is_parameter,
    grad_in_state,
    grad_in_earlier_parameter,
    grad_in_later_parameter,
    grad_of_lazy_kind,
    overlapping_members,
    same_memory_twice,
    of_another_class,
    of_a_loud_class,
    bad_rate,
    rate_of_no_kind,
    no_rate,
    rate_of_one_group,
    list_of_betas,
    rate_in_a_tensor,
    option("lr", 0.5),
    option("lr", lambda: torch.tensor(0.5, dtype=torch.float64)),
    option("betas", (0.5, 0.6)),
    option("betas", (1.0, 0.999)),
    option("weight_decay", 0.3),
    option("momentum", 0.0),
    option("nesterov", True),
    option("maximize", True),
    option("amsgrad", True),
    option("amsgrad", False),
    option("foreach", True),
    option("fused", True),
    option("capturable", True),
    option("differentiable", True),
    other_parameter,
    one_parameter_less,
    one_group_more,
    loaded,
    clipped,
    policy_set,
    scaled_by_fused,
    skipped_by_fused,
]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("again", [False, True], ids=["once", "every step"])
def test_what_changes_between_steps_is_found(make, change, groups, again):
    pair = Pair(make, groups)
    pair.warm_up()
    for i in range(STEPS):
        pair.grads()
        if again or i == 0:
            pair.each(change)
        if pair.step() is not None:
            break


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_every_storage(make, dtype):
    pair = Pair(make, 2, dtype=dtype)
    pair.warm_up()
    pair.steps(STEPS)


@pytest.mark.about_the_cpu("elsewhere there is no shorter way to end")
def test_rates_alone_do_not_end_it(make):
    pair = Pair(make, 2)
    pair.warm_up()
    before = pair.optimizers[0]._plan.steps_as_before
    for i in range(6):
        pair.each(option("lr", 0.1 / (i + 1)))
        pair.steps(1)
    assert pair.optimizers[0]._plan.steps_as_before == before + 6


def test_a_bad_rate_of_the_last_group_leaves_the_first_as_it_was(make):
    pair = Pair(make, 2)
    pair.warm_up()
    before = [p.detach().clone() for p in pair.params[0]]
    pair.grads()
    pair.each(bad_rate)
    raised, _ = pair.step()
    assert raised is ValueError
    assert all(torch.equal(p, q) for p, q in zip(pair.params[0], before, strict=True))


def test_copies_on_write_keep_their_values(make):
    pair = Pair(make)
    pair.warm_up()
    pair.grads()
    pair.each(copied_on_write)
    assert pair.step() is None
    pair.steps(2)
    for optimizer in pair.optimizers:
        lazy, eager = optimizer.kept
        assert torch.equal(lazy, eager)


def test_a_step_in_inference_mode(make):
    pair = Pair(make)
    pair.warm_up()
    with torch.inference_mode():
        pair.grads()
        pair.step()
    pair.steps(1)


def test_hooks_around_the_step(make):
    pair = Pair(make)
    pair.warm_up()
    seen = []

    def double(optimizer, args, kwargs):
        seen.append("before")
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.grad * 2

    for optimizer in pair.optimizers:
        optimizer.register_step_pre_hook(double)
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    pair.steps(2)
    assert seen == ["before", "after"] * 4


def test_profilers_see_the_op(make):
    pair = Pair(make)
    pair.warm_up()
    pair.grads()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pair.step()
    names = [event.name for event in profile.events()]
    op = pair.optimizers[0]._op
    assert names.count(f"optim_ext::{op}") == 2  # one of each optimizer
    pair.steps(1)


def test_modes_see_the_op(make):
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    pair = Pair(make)
    pair.warm_up()
    pair.grads()
    with Log():
        pair.step()
    assert seen.count(f"optim_ext.{pair.optimizers[0]._op}.default") == 2


def test_a_rate_that_runs_python(make):
    """Code that replaces state while the step reads its options."""

    class Rate:
        def __init__(self, params, optimizer):
            self.params, self.optimizer = params, optimizer

        def __float__(self):
            for p in self.params:
                self.optimizer.state[p].update(
                    {k: v.clone() for k, v in self.optimizer.state[p].items() if v is not None}
                )
            no_grad_of_one(self.params, self.optimizer)
            return 0.1

    pair = Pair(make)
    pair.warm_up()
    pair.grads()
    pair.each(lambda params, optimizer: option("lr", lambda: Rate(params, optimizer))(params, optimizer))
    for optimizer in pair.optimizers:
        with pytest.raises(RuntimeError, match="replaced during its step"):
            optimizer.step()
    pair.compare_values(versions=False)


def test_dropped_tensors_are_freed_between_steps(make):
    """What is remembered keeps nothing alive."""
    params = make_params(SHAPES)
    optimizer = make(groups_of(params, 2))
    for i in range(WARM_UP):
        give_grads(params, i)
        optimizer.step()
    assert is_repeating(optimizer) == ON_CPU
    kept = [ref(p) for p in params] + [ref(p.grad) for p in params]
    kept += [ref(value) for entry in optimizer.state.values() for value in entry.values() if value is not None]
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"].clear()
    del params, group
    gc.collect()
    assert [each() for each in kept] == [None] * len(kept)
    optimizer.step()


def test_memory_that_two_groups_share_is_written_in_turn(make):
    pair = Pair(make, 2)
    pair.each(lambda params, _: overlapping_members(params, _))  # parameters 0 and 1 are of different groups
    for _ in range(WARM_UP + STEPS):
        pair.grads()
        pair.step()


def test_dicts_are_read_as_they_are_laid_out():
    """In place of PyDict_Next, where the interpreter is one whose dicts are known."""
    known = sys.implementation.name == "cpython" and (3, 11) <= sys.version_info < (3, 15)
    assert _C.reads_dicts_directly() == known


def test_versions_are_counted_where_torch_keeps_them():
    assert _C.counts_versions_directly()


def test_parts_of_dtensors_are_read_where_they_lie():
    from torch.distributed.tensor import DTensor

    assert _C.reads_dtensors_directly(DTensor)
