"""Values at the edge of the number line behave as in torch's for-loop."""

import math

import pytest
import torch
from lockstep import Lockstep, assert_same_state, native_ops
from specs import SPECS, Tolerance

INF, NAN = math.inf, math.nan
SPECIAL = [0.0, -0.0, INF, -INF, NAN, 1e-45, -1e-39, 1e-30, 3e38, -3e38, 1.0, -2.5]
LOOSE = Tolerance(2e-5, 1e-6)


def with_values(spec, options, values, grads, dtype=torch.float32):
    lockstep = Lockstep(spec, options, params=[torch.nn.Parameter(torch.tensor(values, dtype=dtype))])
    for own in (lockstep.params[0], lockstep.twins[0]):
        own.grad = torch.tensor(grads, dtype=dtype)
    return lockstep


def step_both(lockstep, count=1):
    for _ in range(count):
        for optimizer in lockstep.both:
            optimizer.step()
    return lockstep.check(LOOSE)


def test_special_gradients(case):
    # Centered RMSprop subtracts two averages: after equal gradients only rounding is left of them.
    count = 1 if case.options.get("centered", False) else 3
    step_both(with_values(case.spec, case.options, [0.5] * len(SPECIAL), SPECIAL), count)


def test_special_parameters(case):
    """Among them: weight decay of zero adds nothing, not zero times infinity."""
    step_both(with_values(case.spec, case.options, SPECIAL, [0.3] * len(SPECIAL)), count=2)


def test_nan_stays_in_amsgrads_maximum():
    spec = next(spec for spec in SPECS if spec.name == "Adam")
    lockstep = with_values(spec, {"amsgrad": True}, [1.0, 1.0], [NAN, 1.0])
    step_both(lockstep)
    for own in (lockstep.params[0], lockstep.twins[0]):
        own.grad = torch.ones(2)
    step_both(lockstep)
    assert lockstep.ours.state[lockstep.params[0]]["max_exp_avg_sq"].isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_sixteen_bit_value_survives_a_step_that_changes_nothing(spec, dtype):
    """All 65536 patterns are read and written back as they were; NaN stays NaN."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    param = torch.nn.Parameter(patterns.view(dtype).clone())
    still = {"AdamW": {"weight_decay": 0.0}, "Rprop": {"step_sizes": (0.0, 50.0)}, "ASGD": {"lambd": 0.0}}
    optimizer = spec.ours([param], lr=0.0, **still.get(spec.name, {}))
    param.grad = torch.ones_like(param)
    optimizer.step()
    found, expected = param.detach(), patterns.view(dtype)
    finite = ~expected.isnan()
    assert torch.equal(found[finite], expected[finite])
    assert found[~finite].isnan().all()


@pytest.mark.only_for(lambda spec: spec.name != "ASGD", reason="its lambd decays parameters without a gradient")
def test_zero_gradient_without_decay_changes_nothing(spec):
    options = {**spec.typical, "weight_decay": 0.0} if "weight_decay" in spec.typical else spec.typical
    lockstep = Lockstep(spec, options)
    before = [p.detach().clone() for p in lockstep.params]
    for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
        for param in params:
            param.grad = torch.zeros_like(param)
        for _ in range(3):
            optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(lockstep.params, before, strict=True))
    lockstep.check()


@pytest.mark.parametrize("lr", [0.0, 1e-28], ids=str)
def test_vanishing_lr(spec, lr):
    bounds = {"step_sizes": (0.0, 50.0)} if spec.name == "Rprop" else {}
    lockstep = Lockstep(spec, {**spec.typical, **bounds, "lr": lr})
    before = [p.detach().clone() for p in lockstep.params]
    lockstep.step(2).check()
    assert all(torch.equal(p, b) for p, b in zip(lockstep.params, before, strict=True))


@pytest.mark.parametrize("count", [1e3, 1e6, 2.0**24 - 2, 2.0**24, 2.0**24 + 2])
def test_late_steps(counting, count):
    """A counter near the end of float32's whole numbers, where adding one is lost, as in torch."""
    lockstep = Lockstep(counting.spec, counting.options, dtype=torch.float64).step(1)
    for optimizer in lockstep.both:
        for entries in optimizer.state.values():
            entries["step"].fill_(count)
    lockstep.step(3).check(Tolerance(1e-9, 1e-10))


def test_per_parameter_counters(counting):
    """Bias correction follows each parameter's own count."""
    lockstep = Lockstep(counting.spec, counting.options, dtype=torch.float64).step(2)
    for optimizer in lockstep.both:
        for i, entries in enumerate(optimizer.state.values()):
            entries["step"].fill_(3 * i)
    lockstep.step(3).check()


def test_double_counter(counting):
    """A counter the user keeps in float64 stays float64 and counts."""
    lockstep = Lockstep(counting.spec, counting.options).step(1)
    for optimizer in lockstep.both:
        for entries in optimizer.state.values():
            entries["step"] = entries["step"].double()
    lockstep.step(2)
    assert_same_state(*lockstep.both, lockstep.tolerance())
    assert {e["step"].dtype for e in lockstep.ours.state.values()} == {torch.float64}


@pytest.mark.only_for(lambda spec: spec.name != "Rprop", reason="has no weight decay")
def test_plain_numbers_given_as_tensors_stay_native(spec):
    """weight_decay as a tensor is what torch documents for SGD; with gradients off it is a number like another."""
    options = {**spec.typical, "weight_decay": torch.tensor(0.1)}
    lockstep = Lockstep(spec, options, dtype=torch.float64).step(3)
    for mine, other in zip(lockstep.params, lockstep.twins, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert native_ops(lockstep.ours.step)
