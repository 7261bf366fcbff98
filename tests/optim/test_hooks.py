"""Hooks, subclasses, overrides, and the life of the object itself."""

import copy
import gc
import pickle
import types
import weakref

import pytest
import torch
from lockstep import Lockstep, give_grads, make_params, native_ops, twin
from specs import SPECS
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import optim_ext


def watch(optimizer, calls):
    """Registers one hook of each kind that notes itself; returns their handles."""

    def note(what):
        return lambda opt, args, kwargs: calls.append(what) if opt is optimizer else None

    return [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]


def subclass(base):
    return type("Sub", (base,), {})


def overriding(base):
    class Overriding(base):
        def step(self, closure=None):
            return super().step(closure)

    return Overriding


PATHS = {
    "native": (lambda base: base, {}),
    "torch's path": (lambda base: base, {"differentiable": True}),
    "subclass": (subclass, {}),
    "subclass on torch's path": (subclass, {"differentiable": True}),
    "overriding subclass": (overriding, {}),
}


HOOKED = [
    pytest.param(spec, build, flags, id=f"{spec.name}-{name}")
    for spec in SPECS
    for name, (build, flags) in PATHS.items()
    if spec.in_torch and all(map(spec.accepts, flags))
]


@pytest.mark.parametrize(("spec", "build", "flags"), HOOKED)
def test_step_hooks_fire_once_in_order(spec, build, flags):
    params = [p.detach() for p in make_params()]
    give_grads(params, 0)
    seen = []
    for base in (spec.torch, spec.ours):
        optimizer, calls = build(base)(params, **spec.typical, **flags), []
        handles = watch(optimizer, calls)
        try:
            optimizer.step()
            optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        seen.append(calls.copy())
        optimizer.step()
        assert calls == seen[-1]
    assert seen[0] == seen[1]
    if build is not overriding:  # torch itself wraps both steps of a class that calls super().step()
        assert seen[1] == ["global pre", "pre", "post", "global post"] * 2


def test_pre_hook_that_changes_arguments_and_gradients(spec):
    """What a hook returns is what step() is given, and gradients it edits or replaces are those of the step."""
    lockstep = Lockstep(spec, dtype=torch.float64)
    returned = []
    for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):

        def hook(opt, args, kwargs, params=params):
            params[0].grad = params[0].grad * 2
            params[4].grad.mul_(0.5)
            params[5].grad = None
            return (opt, lambda: 42.0), {}

        optimizer.register_step_pre_hook(hook)
    for step in range(3):
        for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
            give_grads(params, step)
            returned.append(optimizer.step())
        lockstep.check()
    assert returned == [42.0] * 6


def test_pre_hook_that_returns_nonsense(spec):
    for optimizer in Lockstep(spec).both:
        optimizer.register_step_pre_hook(lambda *_: 3)
        with pytest.raises(RuntimeError, match="None or a tuple of"):
            optimizer.step()


@pytest.mark.only_for(
    lambda spec: spec.takes_late_params, reason="this torch's class makes state in its constructor only"
)
def test_pre_hook_that_adds_a_group(spec):
    lockstep = Lockstep(spec, dtype=torch.float64)
    late = make_params(((4,),), torch.float64, seed=80)
    late_twins = twin(late)
    for optimizer, params in zip(lockstep.both, (late, late_twins), strict=True):
        give_grads(params, 0)

        def hook(optimizer, args, kwargs, params=params):
            if len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": params})

        optimizer.register_step_pre_hook(hook)
    lockstep.params += late
    lockstep.twins += late_twins
    lockstep.step(2).check()


def test_state_dict_hooks(spec):
    params = make_params()
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    optimizer.step()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: opt.state.__setitem__("test", 1))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "extra": seen.append("post")})
    saved = optimizer.state_dict()
    assert saved["state"]["test"] == 1 and "extra" in saved and seen == ["post"]

    target = spec.ours(twin(params), **spec.typical)

    def edit(opt, loaded):
        seen.append("load pre")
        loaded["param_groups"][0]["lr"] = 0.125

    target.register_load_state_dict_pre_hook(edit)
    target.register_load_state_dict_pre_hook(lambda opt, loaded: seen.append("first"), prepend=True)
    target.register_load_state_dict_post_hook(lambda opt: seen.append("load post"))
    target.load_state_dict(saved)
    assert seen == ["post", "first", "load pre", "load post"]
    assert target.param_groups[0]["lr"] == 0.125 and optimizer.param_groups[0]["lr"] != 0.125


def test_profiler_names(spec):
    params = make_params()
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.events()]
    assert names.count(f"Optimizer.step#{spec.name}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{spec.name}.zero_grad") == 1
    step = next(event for event in profile.events() if event.name == f"Optimizer.step#{spec.name}.step")
    op = next(event for event in profile.events() if event.name == f"optim_ext::{spec.op}")
    assert step.time_range.start <= op.time_range.start and op.time_range.end <= step.time_range.end


@pytest.mark.torchs
def test_users_subclass(spec):
    """Own constructor, own attribute, own step around ours."""

    class Mine(spec.ours):
        def __init__(self, params, factor, **options):
            super().__init__(params, **options)
            self.factor, self.steps = factor, 0

        def step(self, closure=None):
            self.steps += 1
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad = param.grad * self.factor
            return super().step(closure)

    lockstep = Lockstep(spec, dtype=torch.float64)
    lockstep.ours = Mine(lockstep.params, 1.0, **spec.typical)
    lockstep.step(3).check()
    assert lockstep.ours.steps == 3
    assert isinstance(lockstep.ours, spec.base)
    assert native_ops(lockstep.ours.step) == [f"optim_ext::{spec.op}"]


def test_users_subclass_with_its_own_state(spec):
    """A subclass may keep more in state and in the groups; ours reads what it knows."""

    class Counting(spec.ours):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            for group in self.param_groups:
                group["colour"] = "blue"

        def step(self, closure=None):
            loss = super().step(closure)
            for param in self.param_groups[0]["params"]:
                self.state[param]["seen"] = self.state[param].get("seen", 0) + 1
            return loss

    params = make_params(dtype=torch.float64)
    twins = twin(params)
    ours, theirs = Counting(params, **spec.typical), spec.torch(twins, **spec.typical)
    for step in range(4):
        for own, optimizer in ((params, ours), (twins, theirs)):
            give_grads(own, step)
            optimizer.step()
    for mine, other in zip(params, twins, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)
        assert ours.state[mine]["seen"] == 4
    assert ours.state_dict()["param_groups"][0]["colour"] == "blue"


@pytest.mark.torchs
def test_users_subclass_that_makes_its_own_state(spec):
    """An overridden _init_group, as torch's own code calls it, is honoured: its state is what the step works on."""

    def warm(base):
        class Warm(base):
            def _init_group(self, group, *lists):
                for param in group["params"]:
                    if param.grad is not None and len(self.state[param]) == 0:
                        for key in spec.keys_of(param.shape, spec.typical):
                            shape = spec.state_shape(key, tuple(param.shape))
                            value = param.new_full(shape, 0.5)
                            self.state[param][key] = spec.number(key, 5.0) if key in spec.numbers else value
                return super()._init_group(group, *lists)

        return Warm

    params = make_params(dtype=torch.float64)
    twins = twin(params)
    ours, theirs = warm(spec.ours)(params, **spec.typical), warm(spec.torch)(twins, **spec.typical)
    for step in range(3):
        for own, optimizer in ((params, ours), (twins, theirs)):
            give_grads(own, step)
            optimizer.step()
    for mine, other in zip(params, twins, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_users_own_optimizer():
    """A subclass of the re-exported base works as one of torch's."""

    class Plain(optim_ext.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    param.add_(param.grad, alpha=-group["lr"])

    params = make_params(dtype=torch.float64)
    lockstep = Lockstep(next(spec for spec in SPECS if spec.name == "SGD"), {"lr": 0.1}, params=params)
    lockstep.ours = Plain(params, 0.1)
    for step in range(3):
        for own, optimizer in zip((lockstep.params, lockstep.twins), lockstep.both, strict=True):
            give_grads(own, step)
            optimizer.step()
    for mine, other in zip(lockstep.params, lockstep.twins, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_override_on_the_instance(spec):
    params = make_params()
    optimizer = spec.ours(params, **spec.typical)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    seen = []
    optimizer.step = types.MethodType(lambda self, closure=None: seen.append(self), optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match="`optimizer.step\\(\\)` has been overridden"):
        scheduler.step()
    assert seen == [optimizer]


@pytest.mark.torchs
def test_dynamic_subclass_over_a_copied_dict(spec):
    """Lightning wraps an optimizer in a class made on the fly that shares the original's __dict__."""
    lockstep = Lockstep(spec, dtype=torch.float64).step(2)
    original = lockstep.ours

    class Base:
        def __init__(self, optimizer):
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("step", "__del__")}
            self.__class__ = type("Wrapped" + type(optimizer).__name__, (Base, type(optimizer)), {})
            self._optimizer = optimizer

        def step(self, closure=None):
            return self._optimizer.step(closure)

    wrapped = Base(original)
    assert isinstance(wrapped, spec.base)
    lockstep.ours = wrapped
    lockstep.step(2).check()
    wrapped.add_param_group({"params": make_params(((3,),), torch.float64, seed=60)})
    assert len(original.param_groups) == 2
    original.step()  # the new group has no gradients yet
    wrapped.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    wrapped.step()


@pytest.mark.parametrize("copies", [True, False], ids=["a copied dict", "attributes asked for"])
@pytest.mark.parametrize(
    "again",
    [lambda both: both, copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))],
    ids=["new", "deepcopy", "pickle"],
)
def test_what_a_wrapper_is_told_reaches_the_optimizer(copies, again):
    """Lightning's and Fabric's wrappers inherit our methods and step the optimizer they hold, whatever that has been
    through."""

    class Wrapper:
        def __init__(self, optimizer):
            if copies:
                self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("step", "__del__")}
            self.__class__ = type("Wrapped" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})
            self._optimizer = optimizer

        def __getattr__(self, name):
            return getattr(self.__dict__["_optimizer"], name)

        def step(self, closure=None):
            return self._optimizer.step(closure)

    def moved(ask):
        model = torch.nn.Linear(1, 1, bias=False)
        model, inner = again((model, optim_ext.SGD(model.parameters(), lr=1.0)))
        before = model.weight.detach().clone()
        model.weight.grad = torch.ones(1, 1)
        wrapper = Wrapper(inner)
        ask(wrapper, inner, model)
        if model.weight.grad is None:
            model.weight.grad = torch.ones(1, 1)
        wrapper.step()
        return (before - model.weight.detach()).item()

    assert moved(lambda wrapper, inner, model: wrapper.clip_grad_norm(0.1)) == pytest.approx(0.1, rel=1e-4)
    assert moved(lambda wrapper, inner, model: wrapper.set_grad_policy(max_norm=0.2)) == pytest.approx(0.2, rel=1e-4)
    average = None

    def average_into(wrapper, inner, model):
        nonlocal average
        average = optim_ext.swa_utils.AveragedModel(model)
        wrapper.average_into(average)
        inner.average_into(average)  # the same optimizer

    assert moved(average_into) == 1.0 and average.n_averaged == 1

    def disarm(wrapper, inner, model):
        inner.clip_grad_norm(0.1)
        wrapper.zero_grad()

    assert moved(disarm) == 1.0


def test_share_of_the_dict_without_wrapping(spec):
    """Two objects with copies of one __dict__ step the same parameters and state by turns."""
    lockstep = Lockstep(spec, dtype=torch.float64).step(2)
    original = lockstep.ours
    other = spec.ours.__new__(spec.ours)
    other.__dict__.update(original.__dict__)
    for optimizer in (other, original, other):
        lockstep.ours = optimizer
        lockstep.step(1).check()


def test_no_reference_cycles(spec):
    gc.collect()
    gc.freeze()  # Dynamo lets go of the optimizers of earlier tests in cycles: only what is made here counts
    gc.disable()
    try:
        params = make_params()
        optimizer = spec.ours(params, **spec.typical)
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
        optim_ext.explain(optimizer)
        held = [r for r in gc.get_referrers(optimizer) if r is not locals() and not isinstance(r, types.FrameType)]
        assert held == []
        watcher, watched = weakref.ref(optimizer), [weakref.ref(p) for p in params]
        state = [weakref.ref(v) for entries in optimizer.state.values() for v in entries.values()]
        del optimizer
        assert watcher() is None
        assert [ref for ref in state if ref() is not None] == []
        del params
        assert [ref for ref in watched if ref() is not None] == []
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_dropped_state_is_freed(spec):
    """Nothing is kept alive that its optimizer has let go of: state that is moved to the CPU leaves the GPU at once."""
    params = make_params()
    optimizer = spec.ours(params, **spec.typical)
    for _ in range(2):
        give_grads(params, 0)
        optimizer.step()
    watched = [weakref.ref(v) for entries in optimizer.state.values() for v in entries.values() if torch.is_tensor(v)]
    assert watched or not spec.state(spec.typical)
    for entries in optimizer.state.values():
        for key, value in entries.items():
            entries[key] = value.clone() if torch.is_tensor(value) else value
    del entries, value
    assert [ref for ref in watched if ref() is not None] == []
    optimizer.step()
    watched = [weakref.ref(v) for entries in optimizer.state.values() for v in entries.values() if torch.is_tensor(v)]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [ref for ref in watched if ref() is not None] == []
    dropped = weakref.ref(params[-1])
    optimizer.state.pop(params[-1], None)
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:-1]
    params.pop()
    assert dropped() is None
    optimizer.step()


def test_parameters_swapped_in_place(spec):
    """torch.utils.swap_tensors, which modules use to change the type of their parameters, refuses shared tensors."""
    params = make_params(((3, 4), (5,)))
    optimizer = spec.ours(params, **spec.typical)
    for _ in range(2):
        give_grads(params, 0)
        optimizer.step()
        optimizer.zero_grad()
    others = [torch.nn.Parameter(p.detach().clone() * 2) for p in params]
    expected = [torch.nn.Parameter(p.detach().clone()) for p in others]
    reference = spec.ours(expected, **spec.typical)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, other in zip(params, others, strict=True):
        torch.utils.swap_tensors(p, other)
    for own, stepped in ((params, optimizer), (expected, reference)):
        give_grads(own, 3)
        stepped.step()
    assert all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))


def test_scheduler_dies_with_its_scope(spec):
    gc.collect()
    gc.disable()
    try:
        params = make_params()
        optimizer = spec.ours(params, **spec.typical)

        def scope():
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            give_grads(params, 0)
            optimizer.step()
            scheduler.step()
            return weakref.ref(scheduler)

        assert scope()() is None
    finally:
        gc.enable()
