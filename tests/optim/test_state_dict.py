"""state_dict is torch's key for key, loads both ways in the middle of training, and survives copies and files."""

import copy
import io
import pickle
from itertools import cycle

import pytest
import torch
from device import DEVICE
from lockstep import (
    Lockstep,
    assert_close,
    assert_same_state,
    bits,
    copy_of,
    give_grads,
    make_params,
    random,
    twin,
    widen_hypers,
)
from specs import SPECS, Tolerance

import optim_ext

EXACT = Tolerance(0, 0)
CHECKPOINTS = {
    "as it is": lambda saved: saved,
    "deepcopy": copy.deepcopy,
    "torch.save": lambda saved: through_file(saved, weights_only=False),
    "torch.save, weights_only": lambda saved: through_file(saved, weights_only=True),
    "pickle": lambda saved: pickle.loads(pickle.dumps(saved)),
}


def through_file(saved, weights_only):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def test_keys_of_the_state(case):
    """The keys the row names, and torch's."""
    lockstep = Lockstep(case.spec, case.options).step(2).check()
    for param, entries in lockstep.ours.state.items():
        assert sorted(entries) == case.spec.keys_of(param.shape, case.options)
        if "step" in entries:
            step, place = entries["step"], DEVICE.type if case.spec.name == "ASGD" else "cpu"
            assert (step.dtype, step.shape, step.device.type, step.item()) == (torch.float32, (), place, 2.0)


def test_step_follows_the_default_dtype(counting):
    spec = counting.spec
    try:
        torch.set_default_dtype(torch.float64)
        lockstep = Lockstep(spec, counting.options, dtype=torch.float64).step(2)
        assert_same_state(*lockstep.both, lockstep.tolerance())
        assert {e["step"].dtype for e in lockstep.ours.state.values()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("through", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
@pytest.mark.parametrize("direction", ["to ours", "to torch", "ours to ours"])
def test_checkpoint_in_the_middle_of_training(spec, direction, through):
    """One side's state continues on the other, in lockstep with who never stopped."""
    for options in (spec.typical, {}):
        lockstep = Lockstep(spec, options, dtype=spec.checkpoint_dtype).step(4)
        source = lockstep.theirs if direction == "to ours" else lockstep.ours
        target_class = spec.torch if direction == "to torch" else spec.ours
        saved = through(source.state_dict())
        params = twin(lockstep.twins if direction == "to ours" else lockstep.params)
        target = target_class(params)
        target.load_state_dict(copy.deepcopy(saved))
        assert target.state_dict()["param_groups"] == saved["param_groups"]
        for _ in range(6):
            lockstep.step()
            give_grads(params, lockstep.taken - 1)
            target.step()
            for mine, other in zip(params, lockstep.twins, strict=True):
                assert_close(mine, other, lockstep.tolerance())
            assert_same_state(target, lockstep.theirs, lockstep.tolerance(), one_was_loaded=True)


def test_checkpoint_for_every_option_set(case):
    lockstep = Lockstep(case.spec, case.options, dtype=case.spec.checkpoint_dtype).step(3)
    params, twins = twin(lockstep.params), twin(lockstep.twins)
    crossed = case.spec.ours(params), case.spec.torch(twins)
    crossed[0].load_state_dict(copy.deepcopy(lockstep.theirs.state_dict()))
    crossed[1].load_state_dict(copy.deepcopy(lockstep.ours.state_dict()))
    widen_hypers(crossed[1])
    assert_same_state(*crossed, lockstep.tolerance())
    for step in range(3):
        for own, optimizer in zip((params, twins), crossed, strict=True):
            give_grads(own, 10 + step)
            optimizer.step()
    for mine, other in zip(params, twins, strict=True):
        assert_close(mine, other, lockstep.tolerance())
    assert_same_state(*crossed, lockstep.tolerance())


def test_loading_back_into_a_stepped_optimizer(variant):
    """What was derived from the state before the load is dropped: going back and on again gives the same bytes."""
    params = make_params(dtype=variant.spec.checkpoint_dtype)
    optimizer = variant.spec.ours(params, **copy_of(variant.options))

    def advance(first):
        for step in range(first, first + 3):
            give_grads(params, step)
            optimizer.step()

    advance(0)
    saved = copy.deepcopy(optimizer.state_dict())
    at_save = [p.detach().clone() for p in params]
    advance(3)
    first_time = [p.detach().clone() for p in params]
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for param, value in zip(params, at_save, strict=True):
            param.copy_(value)
    advance(3)
    assert all(torch.equal(p, f) for p, f in zip(params, first_time, strict=True))


def test_loading_leaves_the_dict_alone(spec):
    lockstep = Lockstep(spec).step(2)
    saved = copy.deepcopy(lockstep.theirs.state_dict())
    kept = copy.deepcopy(saved)
    target = spec.ours(twin(lockstep.params))
    target.load_state_dict(saved)
    assert saved["param_groups"] == kept["param_groups"]
    for index, entries in kept["state"].items():
        assert saved["state"][index].keys() == entries.keys()
        assert all(torch.equal(saved["state"][index][key], value) for key, value in entries.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_casts_state_to_the_parameter(spec, dtype):
    """Float state takes the parameter's dtype, numbers keep their own."""
    lockstep = Lockstep(spec, dtype=torch.float64).step(2)
    saved = lockstep.theirs.state_dict()
    pair = Lockstep(spec, params=make_params(dtype=dtype))
    for optimizer in pair.both:
        optimizer.load_state_dict(copy.deepcopy(saved))
    assert_same_state(*pair.both, EXACT)
    pair.step(2)
    if dtype == torch.float32:  # in bfloat16 torch's rounding after each operation hides the rest
        pair.check()
    for entries in pair.ours.state.values():
        for key, value in entries.items():
            assert value.dtype == (torch.float32 if key in spec.numbers else dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_was_loaded_is_what_is_saved(variant, dtype):
    """Every key, to the bit and in its dtype: by the same optimizer, by another one, and through copies of either."""
    params = make_params(dtype=dtype)
    optimizer = variant.spec.ours(params, **copy_of(variant.options))
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    before = {index: bits_of(entries) for index, entries in optimizer.state_dict()["state"].items()}
    other = variant.spec.ours(twin(params), **copy_of(variant.options))
    other.load_state_dict(through_file(optimizer.state_dict(), weights_only=True))
    optimizer.load_state_dict(optimizer.state_dict())
    for one in (optimizer, other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert {index: bits_of(entries) for index, entries in one.state_dict()["state"].items()} == before


def bits_of(entries):
    return {key: bits(value) if isinstance(value, torch.Tensor) else value for key, value in entries.items()}


@pytest.mark.parametrize("number", [3, 3.0], ids=["int", "float"])
def test_step_saved_as_a_number(counting, number):
    lockstep = Lockstep(counting.spec, counting.options, dtype=counting.spec.checkpoint_dtype).step(3)
    saved = lockstep.theirs.state_dict()
    for entries in saved["state"].values():
        entries["step"] = number
    for optimizer in lockstep.both:
        optimizer.load_state_dict(copy.deepcopy(saved))
        assert all(isinstance(e["step"], torch.Tensor) and e["step"].item() == 3 for e in optimizer.state.values())
    lockstep.step(3).check()


COUNTING = [s for s in SPECS if s.in_torch and "step" in s.state(s.typical) and "step" not in s.ours._number_state]


@pytest.mark.parametrize("row", COUNTING, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float16], ids=str)
def test_step_of_another_dtype_takes_torchs_code(row, dtype):
    """Which counts in any, or refuses it in its own words."""
    lockstep = Lockstep(row, row.typical, params=make_params(((3, 4), (5, 2)), torch.float64)).step(2)
    for optimizer in lockstep.both:
        for entry in optimizer.state.values():
            entry["step"] = entry["step"].to(dtype)
    assert "step counter" in optim_ext.explain(lockstep.ours)[0].reason
    raised = []
    for optimizer in lockstep.both:
        try:
            optimizer.step()
        except Exception as error:
            raised.append((type(error), str(error)))
    assert len(set(raised)) <= 1 and len(raised) in (0, 2)
    if not raised:
        lockstep.check()


@pytest.mark.torchs
def test_saved_as_fused(spec):
    """Fused checkpoints load into plain optimizers and the other way round, with the saved flags."""
    for flags, others in (({"fused": True}, {}), ({}, {"fused": True}), ({"foreach": True}, {})):
        if not spec.fused and "fused" in {**flags, **others}:
            continue
        lockstep = Lockstep(spec, {**spec.typical, **flags}, dtype=spec.checkpoint_dtype).step(2)
        pair = Lockstep(spec, {**spec.typical, **others}, params=twin(lockstep.params))
        pair.ours.load_state_dict(copy.deepcopy(lockstep.ours.state_dict()))
        pair.theirs.load_state_dict(copy.deepcopy(lockstep.theirs.state_dict()))
        pair.step(3).check()


def test_older_dicts_without_flags(spec):
    """Flags younger than the class are filled in with their defaults."""
    lockstep = Lockstep(spec, dtype=spec.checkpoint_dtype).step(2)
    saved = lockstep.ours.state_dict()
    for flag in ("foreach", "differentiable", "maximize", "capturable", "fused", "decoupled_weight_decay"):
        if (flag, spec.name) != ("maximize", "Adafactor"):  # which has had it from the start
            saved["param_groups"][0].pop(flag, None)
    for optimizer in lockstep.both:
        optimizer.load_state_dict(copy.deepcopy(saved))
    lockstep.step(3).check()
    assert lockstep.ours.param_groups[0].keys() == lockstep.theirs.param_groups[0].keys()


def test_older_objects_without_groups_flags_unpickle(spec):
    """__setstate__ alone, as an old pickle of the whole optimizer goes through it."""
    lockstep = Lockstep(spec, dtype=torch.float64).step(2)
    for optimizer in lockstep.both:
        state = optimizer.__getstate__()
        for flag in ("foreach", "differentiable", "maximize", "capturable", "fused"):
            if (flag, spec.name) != ("maximize", "Adafactor"):
                state["param_groups"][0].pop(flag, None)
        optimizer.__setstate__(state)
    lockstep.step(3).check()


def test_adam_and_adamw_exchange_checkpoints():
    """AdamW stays decoupled whatever it loads; Adam takes the flag of what it loads."""
    by_name = {spec.name: spec for spec in SPECS}
    for source, target in (("Adam", "AdamW"), ("AdamW", "Adam")):
        saved = Lockstep(by_name[source], {"weight_decay": 0.1}, dtype=torch.float64).step(2)
        pair = Lockstep(by_name[target], {"weight_decay": 0.1}, params=twin(saved.params))
        for optimizer in pair.both:
            optimizer.load_state_dict(copy.deepcopy(saved.theirs.state_dict()))
        assert pair.ours.param_groups[0]["decoupled_weight_decay"] is True
        pair.step(3).check()
    plain = Lockstep(by_name["AdamW"], {"weight_decay": 0.1}, dtype=torch.float64).step(1)
    old = plain.ours.state_dict()
    del old["param_groups"][0]["decoupled_weight_decay"]
    for optimizer in plain.both:
        optimizer.load_state_dict(copy.deepcopy(old))
    assert plain.ours.param_groups[0]["decoupled_weight_decay"] is True
    plain.step(2).check()


@pytest.mark.parametrize("saved_named", [False, True], ids=["saved plain", "saved named"])
@pytest.mark.parametrize("loaded_named", [False, True], ids=["loaded plain", "loaded named"])
def test_named_and_unnamed(spec, saved_named, loaded_named):
    def named(prefix):
        return lambda params: [(f"{prefix}{i}", p) for i, p in enumerate(params)]

    source = Lockstep(spec, dtype=spec.checkpoint_dtype, groups=named("a") if saved_named else list).step(2).check()
    target = Lockstep(spec, params=twin(source.params), groups=named("b") if loaded_named else list)
    target.ours.load_state_dict(copy.deepcopy(source.ours.state_dict()))
    target.theirs.load_state_dict(copy.deepcopy(source.theirs.state_dict()))
    target.step(2).check()
    found = [optimizer.param_groups[0].get("param_names") for optimizer in target.both]
    assert found[0] == found[1]
    assert ("param_names" in target.ours.state_dict()["param_groups"][0]) == (saved_named or loaded_named)


def test_mismatched_dicts_are_torchs_errors(spec):
    params = make_params(((2,), (3,)))
    saved = spec.torch(params).state_dict()
    for groups in ([{"params": params[:1]}, {"params": params[1:]}], params[:1]):
        messages = []
        for make in (spec.torch, spec.ours):
            with pytest.raises(ValueError, match="loaded state dict") as caught:
                make(groups).load_state_dict(saved)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_only_plain_values_are_saved(spec):
    """Tensors and plain Python values: nothing weights_only would refuse."""
    lockstep = Lockstep(spec).step(2)

    def plain(value):
        if isinstance(value, dict):
            return all(plain(k) and plain(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return type(value) in (int, float, bool, str, type(None), torch.Tensor)

    assert plain(lockstep.ours.state_dict())
    loaded = through_file(lockstep.ours.state_dict(), weights_only=True)
    assert loaded["param_groups"] == lockstep.ours.state_dict()["param_groups"]


def test_other_keys_of_the_state_pass_through(spec):
    lockstep = Lockstep(spec).step(1)
    for optimizer in lockstep.both:
        optimizer.state["epoch"] = 7
        optimizer.state["notes"] = {"seed": 3}
    lockstep.step(2)
    saved = lockstep.ours.state_dict()
    assert saved["state"]["epoch"] == 7 and saved["state"]["notes"] == {"seed": 3}
    restored = spec.ours(twin(lockstep.params))
    restored.load_state_dict(saved)
    assert restored.state["epoch"] == 7


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": lambda pair: through_file(pair, weights_only=False),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_copies_go_on_alone(variant, make_copy):
    """A copied optimizer, taken before the first step or after some, works on the copied parameters only."""
    for steps_before in (0, 2):
        params = make_params(dtype=torch.float64)
        optimizer = variant.spec.ours(params, **copy_of(variant.options))
        for step in range(steps_before):
            give_grads(params, step)
            optimizer.step()
        public = {key for key in vars(optimizer) if not key.startswith("_")}
        copied_params, copied = make_copy((params, optimizer))
        assert {key for key in vars(copied) if not key.startswith("_")} == public
        assert type(copied) is type(optimizer)
        kept = [p.detach().clone() for p in params]
        for own, one in ((copied_params, copied), (params, optimizer)):
            for step in range(2):
                give_grads(own, 20 + step)
                one.step()
            if one is copied:
                assert all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))
        assert all(torch.equal(p, q) for p, q in zip(params, copied_params, strict=True))


def test_pickled_optimizer_loads_as_torchs_attributes(spec):
    """Nothing native is in what is pickled."""
    params = make_params()
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    optimizer.step()
    assert optimizer.__getstate__().keys() == spec.torch(twin(params)).__getstate__().keys()
    assert b"optim_ext._C" not in pickle.dumps(optimizer)


def test_foreign_state_dtypes_are_kept(spec):
    """Low-precision state put there by the user, as some frameworks do through a step pre-hook."""
    shapes = ((40, 30), (100,))
    params, exact = make_params(shapes), make_params(shapes, torch.float32)
    optimizer, reference = spec.ours(params, **spec.typical), spec.torch(exact, **spec.typical)

    def narrow(optimizer, *_):
        for entries in optimizer.state.values():
            for key, value in entries.items():
                if key not in spec.numbers:
                    entries[key] = value.bfloat16()

    def rounded(optimizer, *_):
        for entries in optimizer.state.values():
            for key, value in entries.items():
                if key not in spec.numbers:
                    value.copy_(value.bfloat16())

    optimizer.register_step_pre_hook(narrow)
    reference.register_step_pre_hook(rounded)
    reference.register_step_post_hook(rounded)
    for step in range(4):
        give_grads(params, step)
        give_grads(exact, step)
        optimizer.step()
        reference.step()
    dtypes = {
        value.dtype for entries in optimizer.state.values() for k, value in entries.items() if k not in spec.numbers
    }
    assert dtypes == {torch.bfloat16}
    for mine, other in zip(params, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-3)


def test_foreign_state_before_the_first_step(spec):
    """bfloat16 state on float32 parameters, float64 on bfloat16, one dtype per key: used as it is and kept."""
    for dtype, state_dtypes in (
        (torch.float32, [torch.bfloat16, torch.float16, torch.float64]),
        (torch.bfloat16, [torch.float32, torch.float64, torch.bfloat16]),
    ):
        params, wide = make_params(((50,), (6, 7)), dtype), make_params(((50,), (6, 7)), torch.float64)
        with torch.no_grad():
            for narrow, exact in zip(params, wide, strict=True):
                exact.copy_(narrow)
        options = {**spec.typical, **spec.half_options}
        optimizer, reference = spec.ours(params, **options), spec.torch(wide, **options)
        for i, (narrow, exact) in enumerate(zip(params, wide, strict=True)):
            keys = spec.keys_of(narrow.shape, spec.typical)
            for k, (key, state_dtype) in enumerate(zip(keys, cycle(state_dtypes), strict=False)):
                if key in spec.numbers:
                    value = spec.number(key, 2.0)
                else:
                    shape = spec.state_shape(key, tuple(narrow.shape))
                    value = random(shape, torch.float64, 10 * i + k).abs().add(1).to(state_dtype)
                    # The square of grad_avg is subtracted from square_avg; the others are lengths of steps.
                    value *= {"grad_avg": 0.125, "step_size": 0.003, "acc_delta": 0.01}.get(key, 1)
                optimizer.state[narrow][key] = value
                reference.state[exact][key] = value.clone() if key in spec.numbers else value.double()
        kept = {id(p): {k: v.dtype for k, v in optimizer.state[p].items()} for p in params}
        for step in range(3):
            for i, (narrow, exact) in enumerate(zip(params, wide, strict=True)):
                narrow.grad = random(narrow.shape, dtype, 7 * step + i)
                exact.grad = narrow.grad.double()
            optimizer.step()
            reference.step()
        for narrow, exact in zip(params, wide, strict=True):
            assert {k: v.dtype for k, v in optimizer.state[narrow].items()} == kept[id(narrow)]
            torch.testing.assert_close(narrow.double(), exact, rtol=3e-2, atol=3e-2)
