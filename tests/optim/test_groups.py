"""param_groups: overrides, live edits by hand and by schedulers, groups added later."""

import copy

import pytest
import torch
from lockstep import Lockstep, copy_of, give_grads, make_params, snapshot, twin
from specs import SPECS, TENSOR_LRS, VARIANTS, Tolerance, cases
from torch.optim import lr_scheduler

from optim_ext.swa_utils import AveragedModel


def test_group_options_win(case):
    def groups(params):
        return [
            {"params": params[:2], "lr": 0.3},
            {"params": params[2:4], "weight_decay": 0.2},
            {"params": params[4:], "maximize": True},
        ]

    lockstep = Lockstep(case.spec, case.options, dtype=torch.float64, groups=groups).step(4).check()
    assert [g["lr"] for g in lockstep.ours.param_groups] == [g["lr"] for g in lockstep.theirs.param_groups]


def test_every_option_set_as_a_group_of_its_own(spec):
    """One optimizer, one group per option set."""
    options = [copy_of(o) for o in spec.options]
    params = make_params([(4, 3)] * len(options), torch.float64)
    lockstep = Lockstep(
        spec, {}, params, groups=lambda ps: [{"params": [p], **copy_of(o)} for p, o in zip(ps, options, strict=True)]
    )
    lockstep.step(4).check()


EDITS = {
    "lr": [0.2, 0.0, 1e-3],
    "weight_decay": [0.3, 0.0, 0.01],
    "maximize": [True, False, True],
    "betas": [(0.5, 0.6), (0.0, 0.0), (0.95, 0.99)],
    "eps": [1e-3, 1e-1, 1e-8],
    "momentum": [0.5, 0.1, 0.95],
    "dampening": [0.5, 0.0, 0.9],
    "alpha": [0.5, 0.9, 0.1],
    "lr_decay": [0.5, 0.0, 0.1],
    "foreach": [True, False, None],
}


def can_be_edited(variant, key):
    if key == "foreach" and isinstance(variant.options.get("lr", 0), torch.Tensor):
        return False  # torch itself refuses at the step
    if key == "momentum" and variant.options.get("momentum", 0) == 0:
        return False  # torch has no buffer to go on with: test_switching_sgd_momentum_on_and_off
    return key in variant.spec.torch(make_params(((1,),))).param_groups[0]


EDITED = [
    pytest.param(variant, key, id=f"{variant.id}-{key}")
    for variant in VARIANTS
    for key in EDITS
    if can_be_edited(variant, key)
]


@pytest.mark.parametrize(("variant", "key"), EDITED)
def test_live_edits(variant, key):
    """Written by hand between steps, in the group that is there."""
    lockstep = Lockstep(variant.spec, variant.options, dtype=torch.float64)
    # torch's foreach ASGD keeps its coefficients in float32.
    tolerance = Tolerance(1e-6, 1e-7) if (variant.spec.name, key) == ("ASGD", "foreach") else None
    lockstep.step(2)
    for value in EDITS[key]:
        for optimizer in lockstep.both:
            is_pair = key == "eps" and isinstance(optimizer.param_groups[0][key], tuple)
            optimizer.param_groups[0][key] = (value, 10 * value) if is_pair else value
        lockstep.step(2).check(tolerance)


def test_switching_sgd_momentum_on_and_off():
    sgd = next(spec for spec in SPECS if spec.name == "SGD")
    lockstep = Lockstep(sgd, {"lr": 0.1}, dtype=torch.float64).step(2).check()
    for momentum in (0.9, 0.0, 0.5):
        for optimizer in lockstep.both:
            optimizer.param_groups[0]["momentum"] = momentum
        lockstep.step(2).check()


def test_replacing_the_group_and_the_list(spec):
    """param_groups is a plain list of plain dicts: both may be replaced."""
    lockstep = Lockstep(spec, dtype=torch.float64).step(1)
    for optimizer in lockstep.both:
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.3}
    lockstep.step(2).check()
    for optimizer in lockstep.both:
        group = optimizer.param_groups[0]
        optimizer.param_groups = [
            {**group, "params": group["params"][:3]},
            {**group, "params": group["params"][3:], "lr": 0.01},
        ]
    lockstep.step(2).check()


@pytest.mark.only_for(
    lambda spec: spec.takes_late_params, reason="this torch's class makes state in its constructor only"
)
def test_add_param_group_after_steps(variant):
    lockstep = Lockstep(variant.spec, variant.options, dtype=torch.float64).step(2)
    late = make_params(((4,), (2, 2)), torch.float64, seed=90)
    late_twins = twin(late)
    for optimizer, params in zip(lockstep.both, (late, late_twins), strict=True):
        if variant.spec.name == "Adagrad":  # torch makes Adagrad's state in the constructor only, or where it is empty
            optimizer.add_param_group({"params": params, "lr": 0.2})
        else:
            optimizer.add_param_group({"params": params, "lr": 0.2, "weight_decay": 0.05})
    lockstep.params += late
    lockstep.twins += late_twins
    lockstep.step(3).check()


def test_params_of_a_group_changed_between_steps(variant):
    """group["params"] is a plain list: parameters are replaced, removed, put in and moved between groups by hand."""
    half = lambda params: [{"params": params[:3]}, {"params": params[3:]}]  # noqa: E731
    lockstep = Lockstep(variant.spec, variant.options, dtype=torch.float64, groups=half).step(2)
    late = make_params(((4,), (2, 2)), torch.float64, seed=90)
    for optimizer, params, own in zip(
        lockstep.both, (lockstep.params, lockstep.twins), (late, twin(late)), strict=True
    ):
        if variant.spec.name == "Adagrad":  # whose state torch makes in the constructor only
            for param in own:
                optimizer.state[param] = {"step": torch.tensor(1.0), "sum": torch.ones_like(param)}
        first, second = (group["params"] for group in optimizer.param_groups)
        optimizer.state.pop(first[1], None)
        first[1] = own[0]
        params[1] = own[0]
        second.append(own[1])
        params.append(own[1])
    lockstep.step(2).check()
    for optimizer in lockstep.both:
        first, second = (group["params"] for group in optimizer.param_groups)
        second.insert(0, first.pop())
    lockstep.step(2).check()
    for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
        dropped = optimizer.param_groups[1]["params"].pop(2)
        optimizer.state.pop(dropped, None)
        params[:] = [param for param in params if param is not dropped]
    lockstep.step(2).check()


def test_a_tuple_of_parameters(spec):
    lockstep = Lockstep(spec, dtype=torch.float64).step(1)
    for optimizer in lockstep.both:
        optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])
    lockstep.ours.clip_grad_norm(1e6)
    lockstep.step(2).check()


def test_empty_groups_do_nothing(spec):
    lockstep = Lockstep(spec, groups=lambda p: [{"params": []}, {"params": p}, {"params": []}]).step(3).check()
    lockstep.step(1, frozen=range(len(lockstep.params))).check()


def step_group_by_group(optimizer):
    """As DeepSpeed's ZeRO does."""
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups


def test_group_by_group(variant):
    """Each group is stepped on its own, with a plan of its own once all state is there."""
    thirds = lambda params: [{"params": params[:2]}, {"params": params[2:5], "lr": 0.02}, {"params": params[5:]}]  # noqa: E731
    lockstep = Lockstep(variant.spec, variant.options, dtype=torch.float64, groups=thirds)
    plans = set()
    for _ in range(6):
        for params in (lockstep.params, lockstep.twins):
            give_grads(params, lockstep.taken)
        for optimizer in lockstep.both:
            step_group_by_group(optimizer)
        lockstep.taken += 1
        plans.add(tuple(map(id, lockstep.ours._plans.values())))
    lockstep.check()
    assert len(plans) <= 2 and len(lockstep.ours._plans) == 3
    lockstep.step(2).check()


def test_sets_of_groups_that_come_and_go_do_not_pile_up(spec):
    optimizer = spec.ours(make_params(((2,),)), **spec.typical)
    group = optimizer.param_groups[0]
    for seed in range(100):
        optimizer.param_groups = [{**group, "params": make_params(((2,),), seed=seed)}]
        optimizer.state.clear()
        if spec.name == "Adagrad":  # whose state torch makes in the constructor only
            optimizer.state[optimizer.param_groups[0]["params"][0]] = {"step": torch.zeros(()), "sum": torch.zeros(2)}
        give_grads(optimizer.param_groups[0]["params"], seed)
        optimizer.step()
    assert len(optimizer._plans) <= 32


ABOUT_ALL_GROUPS = {
    "set_grad_policy": lambda optimizer, averaged: optimizer.set_grad_policy(max_norm=0.1),
    "clip_grad_norm": lambda optimizer, averaged: optimizer.clip_grad_norm(0.1),
    "average_into": lambda optimizer, averaged: optimizer.average_into(averaged),
}


@pytest.mark.parametrize("ask", ABOUT_ALL_GROUPS.values(), ids=ABOUT_ALL_GROUPS.keys())
@pytest.mark.parametrize("steps", [0, 1], ids=["first step", "second step"])
def test_what_concerns_all_groups_is_refused_group_by_group(spec, ask, steps):
    """A norm of one group is not the model's, and an average would move once for each group."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    averaged = AveragedModel(model)
    optimizer = spec.ours([{"params": list(layer.parameters())} for layer in model], **spec.typical)
    for step in range(steps):
        give_grads(model.parameters(), step)
        step_group_by_group(optimizer)
    give_grads(model.parameters(), steps)
    ask(optimizer, averaged)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="this step has 1 of 2 parameter groups"):
        step_group_by_group(optimizer)
    assert snapshot(optimizer) == before
    optimizer.step()
    optimizer.param_groups = optimizer.param_groups[:1]
    ask(optimizer, averaged)  # said again: these are all
    optimizer.step()


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_groups_added_after_a_policy_are_part_of_it(spec, copied):
    optimizer = spec.ours(make_params(((3,),)), **spec.typical)
    optimizer.set_grad_policy(max_norm=0.1)
    optimizer.add_param_group({"params": make_params(((4,),))})
    optimizer = copy.deepcopy(optimizer) if copied else optimizer
    give_grads((p for group in optimizer.param_groups for p in group["params"]), 0)
    with pytest.raises(RuntimeError, match="this step has 1 of 2 parameter groups"):
        step_group_by_group(optimizer)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, gamma=0.5, step_size=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=6),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, power=0.9, total_iters=4),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, factor=0.2, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.7)], [3]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.3, anneal_epochs=4),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
def test_schedulers(spec, make, tensor_lr):
    options = {**spec.typical, **(TENSOR_LRS[1] if tensor_lr else {})}
    lockstep = Lockstep(spec, options, dtype=torch.float64)
    schedulers = [make(optimizer) for optimizer in lockstep.both]
    for _ in range(8):
        lockstep.step()
        for scheduler in schedulers:
            scheduler.step()
        lockstep.check()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    if tensor_lr:
        assert isinstance(lockstep.ours.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=10),
        lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=3),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_schedulers_that_cycle_momentum(spec, make):
    lockstep = Lockstep(spec, dtype=torch.float64)
    if not {"momentum", "betas"} & lockstep.theirs.defaults.keys():
        for optimizer in lockstep.both:
            with pytest.raises(ValueError, match="momentum"):
                make(optimizer)
        return
    schedulers = [make(optimizer) for optimizer in lockstep.both]
    for _ in range(8):
        lockstep.step()
        for scheduler in schedulers:
            scheduler.step()
        lockstep.check()


def test_reduce_on_plateau(spec):
    lockstep = Lockstep(spec, dtype=torch.float64)
    schedulers = [lr_scheduler.ReduceLROnPlateau(optimizer, patience=1) for optimizer in lockstep.both]
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        lockstep.step()
        for scheduler in schedulers:
            scheduler.step(loss)
        lockstep.check()
    assert lockstep.ours.param_groups[0]["lr"] < spec.typical["lr"]


def test_warning_when_the_scheduler_steps_first(spec):
    optimizer = spec.ours(make_params())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.warns(UserWarning, match="before `optimizer.step\\(\\)`"):
        scheduler.step()


MOVING = [case for case in cases() if case.options.get("lr", 1) != 0.0]


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("case", MOVING, ids=[case.id for case in MOVING])
def test_descends(case, contiguous):
    """Twenty steps lower a quadratic loss; with maximize they raise it."""
    options = {key: value for key, value in case.options.items() if key != "weight_decay"}
    source = torch.randn(10, 5, 2)
    weight = torch.nn.Parameter(source[..., 0].contiguous() if contiguous else source[..., 0])
    bias, data = torch.nn.Parameter(torch.randn(10)), torch.randn(5)
    optimizer = case.spec.ours([weight, bias], **copy_of(options))
    scheduler = lr_scheduler.StepLR(optimizer, gamma=0.95, step_size=10)

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(data) + bias).pow(2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
        scheduler.step()
    last = closure().item()
    assert last > first if options.get("maximize") else last < first
