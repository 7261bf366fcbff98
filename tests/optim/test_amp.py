"""GradScaler and the fused optimizers: unscaling and skipping happen inside the step."""

import pytest
import torch
from device import DEVICE
from lockstep import Lockstep, copy_of, give_grads, make_params, snapshot, twin
from specs import SPECS, VARIANTS

FUSED = [spec for spec in SPECS if spec.fused]
FUSED_VARIANTS = [variant for variant in VARIANTS if variant.spec.fused]


def set_amp(optimizer, scale, found_inf):
    optimizer.grad_scale, optimizer.found_inf = scale, found_inf


@pytest.mark.parametrize("variant_of_fused", FUSED_VARIANTS, ids=lambda c: c.id)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "one"])
def test_found_inf_skips_the_step(variant_of_fused, shape):
    params = make_params()
    optimizer = variant_of_fused.spec.ours(params, **copy_of(variant_of_fused.options), fused=True)
    give_grads(params, 0)
    kept = [p.detach().clone() for p in params]
    set_amp(optimizer, torch.full(shape, 4.0), torch.full(shape, 1.0))
    optimizer.step()
    assert all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))
    assert all(e["step"].item() == 0 for e in optimizer.state.values() if "step" in e)
    set_amp(optimizer, None, torch.full(shape, 0.0))
    optimizer.step()
    assert all(e["step"].item() == 1 for e in optimizer.state.values() if "step" in e)


@pytest.mark.parametrize("variant_of_fused", FUSED_VARIANTS, ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_grad_scale_equals_torchs_fused(variant_of_fused, dtype):
    """Parameters, state and the gradient written back, skipped steps among them."""
    lockstep = Lockstep(variant_of_fused.spec, {**variant_of_fused.options, "fused": True}, dtype=dtype)
    for step, skip in enumerate((False, False, True, False)):
        scale, found = torch.tensor(2.0 ** (step + 3)), torch.tensor(float(skip))
        for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
            give_grads(params, step)
            for param in params:
                param.grad = param.grad * scale.to(dtype)
            set_amp(optimizer, scale.clone(), found.clone())
            optimizer.step()
        lockstep.check()
        if skip:
            continue
        for mine, other in zip(lockstep.params, lockstep.twins, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused_spec", FUSED, ids=lambda s: s.name)
def test_first_step_skipped_then_taken(fused_spec):
    """A skipped first step must not count as the first: SGD's buffer still starts as the gradient."""
    lockstep = Lockstep(fused_spec, {**fused_spec.typical, "fused": True}, dtype=torch.float64)
    plain = Lockstep(fused_spec, fused_spec.typical, params=twin(lockstep.params))
    give_grads(lockstep.params, 9)
    set_amp(lockstep.ours, None, torch.tensor(1.0))
    lockstep.ours.step()
    set_amp(lockstep.ours, None, torch.tensor(0.0))
    for step in range(3):
        give_grads(lockstep.params, step)
        lockstep.ours.step()
    plain.step(3)
    for mine, other in zip(lockstep.params, plain.twins, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("fused_spec", FUSED, ids=lambda s: s.name)
def test_unscaling_leaves_the_version_alone(fused_spec):
    """torch writes p.grad back without raising its version; so do we."""
    params = make_params()
    optimizer = fused_spec.ours(params, **fused_spec.typical, fused=True)
    give_grads(params, 0)
    versions, expected = [p.grad._version for p in params], [p.grad / 8 for p in params]
    set_amp(optimizer, torch.tensor(8.0), torch.tensor(0.0))
    optimizer.step()
    assert [p.grad._version for p in params] == versions
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, value, rtol=0, atol=0)


@pytest.mark.parametrize("fused_spec", FUSED, ids=lambda s: s.name)
@pytest.mark.parametrize("layout", ["transposed", "strided", "half"])
def test_unscaling_other_layouts_and_dtypes(fused_spec, layout):
    grad = torch.randn(6, 4, dtype=torch.float64)
    if layout == "transposed":
        given = grad.t().contiguous().t()
    elif layout == "strided":
        given = torch.zeros(6, 4, 2, dtype=torch.float64)[..., 0].copy_(grad)
    else:
        given = grad.half()
    params = make_params(((6, 4),), given.dtype)
    optimizer = fused_spec.ours(params, **{**fused_spec.typical, **fused_spec.half_options}, fused=True)
    params[0].grad = given
    expected = given / 4
    set_amp(optimizer, torch.tensor(4.0), torch.tensor(0.0))
    optimizer.step()
    assert params[0].grad is given and torch.equal(given, expected)


BAD_AMP = {
    "found_inf of two": (None, torch.zeros(2)),
    "scale of two": (torch.ones(2), torch.zeros(())),
    "integer found_inf": (None, torch.zeros((), dtype=torch.int64)),
}


@pytest.mark.parametrize("fused_spec", FUSED, ids=lambda s: s.name)
@pytest.mark.parametrize(("scale", "found"), BAD_AMP.values(), ids=BAD_AMP.keys())
def test_bad_amp_tensors(fused_spec, scale, found):
    params = make_params()
    optimizer = fused_spec.ours(params, **fused_spec.typical, fused=True)
    give_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    set_amp(optimizer, scale, found)
    with pytest.raises((ValueError, RuntimeError), match="grad_scale|found_inf"):
        optimizer.step()
    assert snapshot(optimizer) == before
    set_amp(optimizer, None, None)
    optimizer.step()


def train(make, options, scaler, iterations=4, skip=2, clip=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    optimizer = make(model.parameters(), **options)
    data = torch.randn(iterations, 4, 8)
    for i in range(iterations):
        optimizer.zero_grad()
        loss = (model(data[i]) - data[i]).square().sum()
        if scaler is None:
            if i != skip:
                loss.backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
                optimizer.step()
            continue
        scaler.scale(loss).backward()
        if i == skip:
            model[2].weight.grad.fill_(float("inf"))
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer


@pytest.mark.parametrize("clip", [False, True], ids=["unscaled in the step", "unscaled by hand"])
def test_grad_scaler(spec, clip):
    """Four iterations, one of them skipped, equal the same without a scaler."""
    reference, _ = train(spec.torch, spec.typical, None, clip=clip)
    for flags in spec.flags:
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=128.0, growth_interval=3)
        model, optimizer = train(spec.ours, {**spec.typical, **flags}, scaler, clip=clip)
        for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
        assert scaler.get_scale() == 64.0
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@pytest.mark.only_for(
    lambda spec: spec.name not in ("Rprop", "Lion"),
    reason="moves by the sign of the gradient, which is 0 for NaN as torch.sign has it",
)
def test_inf_after_unscale_reaches_the_parameters(spec):
    """GradScaler looks once; what comes later is the user's own doing."""
    for flags in spec.flags:
        params = make_params(((3,),))
        optimizer = spec.ours(params, lr=1.0, **flags)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0)
        scaler.scale(params[0].sum()).backward()
        scaler.unscale_(optimizer)
        params[0].grad[0] = float("nan")
        scaler.step(optimizer)
        assert params[0].isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("fused_spec", FUSED, ids=lambda s: s.name)
def test_two_optimizers_one_scaler(fused_spec):
    """One skips, the other does not."""
    first, second = make_params(((4,),)), make_params(((4,),), seed=5)
    optimizers = [fused_spec.ours(p, **fused_spec.typical, fused=True) for p in (first, second)]
    kept = [p[0].detach().clone() for p in (first, second)]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    scaler.scale(first[0].sum() + second[0].sum()).backward()
    first[0].grad[1] = float("inf")
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(first[0], kept[0]) and not torch.equal(second[0], kept[1])


@pytest.mark.parametrize("fused_spec", FUSED, ids=lambda s: s.name)
def test_a_checkpoint_without_fused_leaves_unscaling_to_the_step(fused_spec):
    """The constructor told GradScaler so, whatever the groups say afterwards. (torch raises an AssertionError.)"""
    params, plain = make_params(), make_params()
    optimizer = fused_spec.ours(params, **fused_spec.typical, fused=True)
    other = fused_spec.ours(plain, **fused_spec.typical)
    optimizer.load_state_dict(fused_spec.base(make_params(), **fused_spec.typical).state_dict())
    for step, skip in enumerate((False, True, False)):
        give_grads(params, step)
        give_grads(plain, step)
        for p in params:
            p.grad = p.grad * 8
        set_amp(optimizer, torch.tensor(8.0), torch.tensor(float(skip)))
        optimizer.step()
        if not skip:
            other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
