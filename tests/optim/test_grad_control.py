"""clip_grad_norm and set_grad_policy: torch's clipping followed by a step, without touching the gradients, and steps that
are skipped without a trace."""

import copy
import math
import pickle
import weakref

import pytest
import torch
from device import DEVICE, ON_CPU
from lockstep import SHAPES, Lockstep, assert_close, bits, copy_of, give_grads, make_params, random, snapshot
from specs import SPECS, Tolerance
from torch._subclasses.fake_tensor import FakeTensorMode

import optim_ext
from optim_ext._grad_control import StepControls
from optim_ext._step import FusedStep, planning

NORM_TYPES = (1.0, 2.0, math.inf)
FUSED = [spec for spec in SPECS if spec.fused]
COUNTING = [spec for spec in SPECS if "step" in spec.state(spec.typical)]


def norm_of(params, norm_type=2.0):
    grads = [p.grad.flatten() for p in params if p.grad is not None]
    return torch.linalg.vector_norm(
        torch.cat([g.to(torch.complex128 if g.is_complex() else torch.float64) for g in grads]), norm_type
    )


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
def test_equals_torch(spec, norm_type, dtype):
    """Norm, parameters and state as after torch.nn.utils.clip_grad_norm_ and a step, clipped or not; gradients as before."""
    for flags in ({}, {"fused": True}) if spec.fused else ({},):
        # Torch has no largest element of an empty gradient; ours is 0.
        params = make_params([shape for shape in SHAPES if 0 not in shape], dtype)
        lockstep = Lockstep(spec, {**spec.typical, **flags} if not dtype.is_complex else spec.typical, params)
        for step, max_norm in enumerate((0.5, 1e6, 0.0, 3)):
            for params in (lockstep.params, lockstep.twins):
                give_grads(params, step, frozen={1})
            before = [None if p.grad is None else bits(p.grad) for p in lockstep.params]
            norm = lockstep.ours.clip_grad_norm(max_norm, norm_type)
            expected = torch.nn.utils.clip_grad_norm_(lockstep.twins, max_norm, norm_type)
            assert norm.shape == () and norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(norm, expected, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0)
            for optimizer in lockstep.both:
                optimizer.step()
            lockstep.check()
            assert [None if p.grad is None else bits(p.grad) for p in lockstep.params] == before


def test_equals_torch_for_every_option_set(case):
    lockstep = Lockstep(case.spec, case.options, dtype=torch.float64)
    for step in range(3):
        for params in (lockstep.params, lockstep.twins):
            give_grads(params, step)
        lockstep.ours.clip_grad_norm(1.0)
        torch.nn.utils.clip_grad_norm_(lockstep.twins, 1.0)
        for optimizer in lockstep.both:
            optimizer.step()
    lockstep.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(spec, dtype):
    """Held against the same in float32: torch rounds norm and clipped gradients to half precision on the way."""
    options = {**spec.typical, **spec.half_options}
    params = make_params(dtype=dtype)
    twins = [torch.nn.Parameter(p.detach().float()) for p in params]
    ours, theirs = spec.ours(params, **copy_of(options)), spec.ours(twins, **copy_of(options))
    give_grads(params, 0)
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad.float()
    norm = ours.clip_grad_norm(1.0)
    assert norm.dtype == torch.float32 and bits(norm) == bits(theirs.clip_grad_norm(1.0))
    for optimizer in (ours, theirs):
        optimizer.step()
    for p, q in zip(params, twins, strict=True):
        assert_close(p.float(), q, spec.tolerances[dtype])


def test_the_step_uses_it_once(spec):
    clipped, plain = make_params(), make_params()
    ours, other = (spec.ours(own, **copy_of(spec.typical)) for own in (clipped, plain))
    for step in range(3):
        for params in (clipped, plain):
            give_grads(params, step)
        if step == 0:
            factor = 0.1 / (ours.clip_grad_norm(0.1).double() + 1e-6)
            for p in plain:
                p.grad = p.grad * factor.to(p.dtype)
        for optimizer in (ours, other):
            optimizer.step()
    for p, q in zip(clipped, plain, strict=True):
        assert_close(p, q, Tolerance(1e-5, 1e-6))


def test_zero_grad_disarms_and_a_second_call_replaces(spec):
    runs = []
    for arm in (
        lambda o: None,
        lambda o: (o.clip_grad_norm(0.1), o.zero_grad(set_to_none=False)),
        lambda o: (o.clip_grad_norm(0.1), o.clip_grad_norm(1e9)),
    ):
        params = make_params()
        optimizer = spec.ours(params, **copy_of(spec.typical))
        give_grads(params, 0)
        grads = [p.grad.clone() for p in params]
        arm(optimizer)
        for p, grad in zip(params, grads, strict=True):
            p.grad.copy_(grad)  # the same tensors, as backward has them: an armed clip would not take them for others
        optimizer.step()
        runs.append([bits(p) for p in params])
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("by", ["model", "replaced", "one is left"])
def test_an_armed_clip_belongs_to_the_gradients_it_saw(by):
    """Others, which a new backward pass has made, are none of its business; what is left of its own is."""
    model, twin_of = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin_of.load_state_dict(model.state_dict())
    ours, other = (optim_ext.SGD(each.parameters(), lr=0.5) for each in (model, twin_of))
    for own in (model, twin_of):
        own(torch.ones(1, 3)).sum().backward()
    norm = ours.clip_grad_norm(0.01)
    if by == "one is left":
        model.bias.grad = twin_of.bias.grad = None
        twin_of.weight.grad *= 0.01 / norm
    else:
        for own in (model, twin_of):
            if by == "model":
                own.zero_grad()
                own(torch.ones(1, 3)).sum().backward()
            else:
                own.weight.grad, own.bias.grad = own.weight.grad.clone(), own.bias.grad.clone()
    for optimizer in (ours, other):
        optimizer.step()
    for p, q in zip(model.parameters(), twin_of.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_an_armed_clip_keeps_no_gradient_alive():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim_ext.SGD([param], lr=0.5)
    param.grad = torch.ones(3)
    seen = weakref.ref(param.grad)
    optimizer.clip_grad_norm(0.1)
    param.grad = None
    assert seen() is None
    optimizer.step()
    assert optimizer._controls.armed is None


def test_gradients_written_since(spec):
    """The step takes the norm again, and corrects the tensor that was returned."""
    lockstep = Lockstep(spec, spec.typical, dtype=torch.float64)
    for params in (lockstep.params, lockstep.twins):
        give_grads(params, 0)
    norm = lockstep.ours.clip_grad_norm(0.5, 1)
    for params in (lockstep.params, lockstep.twins):
        for i, p in enumerate(params):
            p.grad.mul_(1 + i)
    expected = torch.nn.utils.clip_grad_norm_(lockstep.twins, 0.5, 1)
    for optimizer in lockstep.both:
        optimizer.step()
    lockstep.check()
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)


def test_sparse_gradients_written_since():
    table = torch.nn.Parameter(torch.zeros(10, 4))
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3, 1]]), torch.ones(3, 4), (10, 4))
    optimizer = optim_ext.SGD([table], lr=1.0)
    norm = optimizer.clip_grad_norm(0.3)
    table.grad._values().mul_(0.5)
    before = norm.clone()
    optimizer.step()
    torch.testing.assert_close((norm, table.norm().detach()), (before / 2, torch.tensor(0.3)))


def test_no_gradients():
    optimizer = optim_ext.AdamW(make_params())
    assert optimizer.clip_grad_norm(1.0) == 0
    optimizer.step()
    policy = optimizer.set_grad_policy(max_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    assert policy.last_norm == 0 and not policy.last_step_skipped and optimizer.state == {}


def test_groups_dtypes_and_layouts_make_one_norm():
    params = [
        random((3, 5), torch.float32, 1),
        random((4,), torch.float64, 2),
        random((6,), torch.complex64, 3),
        random((2, 2), torch.bfloat16, 4),
        random((0,), torch.float32, 5),
        random((8, 6), torch.float32, 6),
    ]
    params = [torch.nn.Parameter(p) for p in params]
    for i, p in enumerate(params):
        p.grad = random(p.shape, p.dtype, 10 + i)
    params[0].grad = params[0].grad.t().contiguous().t()
    params[1].grad = torch.ones(1, dtype=torch.float64).expand(4)
    params[5].grad = torch.randn(8, 12)[:, ::2]
    optimizer = optim_ext.AdamW([{"params": params[:3]}, {"params": params[3:], "lr": 0.1}])
    for norm_type in NORM_TYPES:
        norm = optimizer.clip_grad_norm(1.0, norm_type)
        assert norm.dtype == torch.float64
        torch.testing.assert_close(norm, norm_of(params, norm_type).double(), rtol=1e-6, atol=0)
    optimizer.step()


def test_sparse_gradients():
    """The norm counts what is stored at the same place once, as their sum; the factor reaches the rows."""
    tables = [torch.nn.Parameter(random((10, 4), torch.float64, 1)) for _ in range(2)]
    index, values = torch.tensor([[1, 3, 1]]), random((3, 4), torch.float64, 2)
    tables[0].grad = torch.sparse_coo_tensor(index, values, (10, 4))
    tables[1].grad = tables[0].grad.to_dense()
    optimizers = [optim_ext.SGD([p], lr=0.5) for p in tables]
    norms = [optimizer.clip_grad_norm(0.3) for optimizer in optimizers]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(*tables, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_norm": -1.0},
        {"max_norm": math.nan},
        {"max_norm": 1.0, "norm_type": 3},
        {"max_norm": 1.0, "norm_type": 0.0},
        {"max_norm": 1.0, "norm_type": -math.inf},
    ],
    ids=str,
)
def test_bad_limits(wrong):
    params = make_params()
    optimizer = optim_ext.AdamW(params)
    give_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    for refuse in (optimizer.clip_grad_norm, optimizer.set_grad_policy):
        with pytest.raises(ValueError, match="max_norm must|norm_type must"):
            refuse(**wrong)
    with pytest.raises(ValueError, match="skip_above must be at least 0, found nan"):
        optimizer.set_grad_policy(skip_above=math.nan)
    assert snapshot(optimizer) == before and optimizer.grad_policy is None
    optimizer.step()


def test_error_if_nonfinite():
    params = make_params()
    optimizer = optim_ext.AdamW(params)
    give_grads(params, 0)
    params[4].grad[0, 0] = math.inf
    with pytest.raises(RuntimeError, match="non-finite, so it cannot be"):
        optimizer.clip_grad_norm(1.0, error_if_nonfinite=True)
    before = [bits(p) for p in params]
    params[4].grad[0, 0] = 0.0
    other = make_params()
    plain = optim_ext.AdamW(other)
    give_grads(other, 0)
    other[4].grad[0, 0] = 0.0
    optimizer.step(), plain.step()  # nothing was armed
    assert before != [bits(p) for p in params] == [bits(p) for p in other]


class Sharded(torch.Tensor):
    """A stand-in for DTensor: whoever computes with it must go through its __torch_dispatch__."""

    @staticmethod
    def __new__(cls, local):
        return torch.Tensor._make_wrapper_subclass(cls, local.shape, dtype=local.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


def test_sharded_gradients_are_refused():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim_ext.AdamW([("w", param)])
    param.grad = torch.ones(3)
    optimizer.step()
    shard = Sharded(torch.ones(3))
    optimizer.add_param_group({"params": [("v", shard)]})
    shard.grad = Sharded(torch.ones(3))
    with pytest.raises(RuntimeError, match="parameter 'v': no native norm of its gradient: it is a tensor subclass"):
        optimizer.clip_grad_norm(1.0)


def test_torchs_own_path_is_refused():
    params = make_params()
    give_grads(params, 0)
    optimizer = optim_ext.AdamW(params, differentiable=True)
    policy = optimizer.set_grad_policy(max_norm=1.0, skip_above=0.0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"need a native step, but torch's own code would run \(differentiable=True"):
        with torch.no_grad():
            optimizer.step()
    assert snapshot(optimizer) == before and policy.skipped_steps == 0 and policy.last_norm is None


POLICIES = [{"skip_nonfinite": True}, {"skip_above": 1e3}, {"max_norm": 1.0, "skip_nonfinite": True, "skip_above": 1e3}]


@pytest.mark.parametrize(
    "asked, bad",
    [  # a finite norm is no reason to skip without skip_above
        (asked, bad) for asked in POLICIES for bad in (math.nan, math.inf, 1e4) if bad != 1e4 or "skip_above" in asked
    ],
    ids=str,
)
def test_a_skipped_step_writes_nothing(variant, asked, bad):
    params, twins = make_params(), make_params()
    ours, other = (variant.spec.ours(own, **copy_of(variant.options)) for own in (params, twins))
    policy = ours.set_grad_policy(**asked)
    assert ours.grad_policy is policy
    skipped = 0
    # A GPU may skip the very first step, too, but what this makes, zeros, is there then.
    for step, skip in enumerate((ON_CPU, False, False, True, True, False)):
        for own in (params, twins):
            give_grads(own, step)
        if skip:
            params[4].grad[1, 2] = bad
        before = snapshot(ours)
        ours.step()
        skipped += skip
        assert policy.last_step_skipped.dtype == torch.bool and bool(policy.last_step_skipped) == skip
        assert policy.skipped_steps == skipped and policy.skipped_steps.dtype == torch.int64
        torch.testing.assert_close(policy.last_norm.double(), norm_of(params), rtol=1e-6, atol=0, equal_nan=True)
        if skip:
            assert snapshot(ours) == before
        else:
            if "max_norm" in asked:
                torch.nn.utils.clip_grad_norm_(twins, asked["max_norm"])
            other.step()
    for p, q in zip(params, twins, strict=True):
        assert_close(p, q, Tolerance(1e-5, 1e-6))
    if "max_norm" not in asked:
        assert [bits(p) for p in params] == [bits(p) for p in twins]


def test_policy_clips_like_torch(spec):
    lockstep = Lockstep(spec, spec.typical, dtype=torch.float64)
    policy = lockstep.ours.set_grad_policy(max_norm=0.7, norm_type=1)
    for step in range(4):
        for params in (lockstep.params, lockstep.twins):
            give_grads(params, step)
        if step == 2:  # this one step by another norm and limit
            lockstep.ours.clip_grad_norm(0.1)
        expected = torch.nn.utils.clip_grad_norm_(lockstep.twins, *((0.1, 2.0) if step == 2 else (0.7, 1.0)))
        for optimizer in lockstep.both:
            optimizer.step()
        torch.testing.assert_close(policy.last_norm, expected, rtol=1e-12, atol=0)
    lockstep.check()
    assert lockstep.ours.set_grad_policy() is None and lockstep.ours.grad_policy is None
    lockstep.step(1).check()


@pytest.mark.about_the_cpu("a very first step that a GPU skips leaves the zeros that it made")
def test_skips_by_an_armed_norm():
    params = make_params()
    optimizer = optim_ext.AdamW(params)
    policy = optimizer.set_grad_policy(skip_above=1.0)
    give_grads(params, 0)
    before = snapshot(optimizer)
    norm = optimizer.clip_grad_norm(0.5)
    optimizer.step()
    assert norm > 1 and policy.skipped_steps == 1 and policy.last_norm == norm and snapshot(optimizer) == before


def test_no_trace_in_checkpoints(spec):
    params = make_params()
    optimizer = spec.ours(params, **copy_of(spec.typical))
    give_grads(params, 0)
    optimizer.step()
    keys = [group.keys() for group in optimizer.param_groups], optimizer.state_dict().keys()
    optimizer.set_grad_policy(max_norm=1.0, skip_nonfinite=True)
    optimizer.clip_grad_norm(1.0)
    optimizer.step()
    assert keys == ([group.keys() for group in optimizer.param_groups], optimizer.state_dict().keys())
    assert not any(key.startswith("grad") for key in vars(optimizer))


def test_repr_shows_the_policy(spec):
    optimizer = spec.ours(make_params(), **spec.typical)
    plain = repr(optimizer)
    policy = optimizer.set_grad_policy(max_norm=1.0)
    assert repr(optimizer) == plain[:-1] + f"grad_policy: {policy}\n)" and "max_norm=1.0" in repr(policy)
    optimizer.set_grad_policy()
    assert repr(optimizer) == plain


def test_help_tells_of_the_controls(spec):
    for name in ("clip_grad_norm", "set_grad_policy", "average_into", "find_nonfinite", "measure_step", "explain"):
        assert spec.ours.__doc__.count(f"{name}(") + spec.ours.__doc__.count(f".{name}`") == 1
    assert type("Own", (spec.ours,), {"__doc__": "A user's."}).__doc__ == "A user's."


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_keeps_the_policy(again):
    params = make_params()
    optimizer = optim_ext.AdamW(params)
    policy = optimizer.set_grad_policy(max_norm=1.0, skip_above=2.0)
    give_grads(params, 0)
    optimizer.step()
    twin_of = again(optimizer)
    assert twin_of.grad_policy == policy and twin_of.grad_policy is not policy and policy.skipped_steps == 1
    assert twin_of.grad_policy.skipped_steps == 1
    optimizer.step()
    assert twin_of.grad_policy.skipped_steps == 1


def test_a_failing_step_counts_nothing():
    params = make_params()
    optimizer = optim_ext.AdamW(params)
    give_grads(params, 0)
    optimizer.step()
    policy = optimizer.set_grad_policy(skip_above=1.0, max_norm=1.0)
    optimizer.step()
    kept = policy.last_norm
    good = optimizer.state[params[4]]["exp_avg"]
    optimizer.state[params[4]]["exp_avg"] = torch.zeros(2)
    give_grads(params, 1)
    before = snapshot(optimizer)
    optimizer.clip_grad_norm(0.5)
    with pytest.raises(RuntimeError, match="exp_avg"):
        optimizer.step()
    assert policy.skipped_steps == 1 and policy.last_norm is kept and snapshot(optimizer) == before
    optimizer.state[params[4]]["exp_avg"] = good
    policy.skip_above = None
    optimizer.step()  # still armed
    assert policy.skipped_steps == 1 and optimizer.state[params[4]]["step"] == 2


def test_a_failing_step_leaves_the_armed_norm():
    """It was that of scaled gradients, and is turned into that of unscaled ones once."""
    params = make_params()
    optimizer = optim_ext.AdamW(params, fused=True)
    give_grads(params, 0)
    optimizer.step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    norm = optimizer.clip_grad_norm(0.5)
    scaled = norm.clone()
    good = optimizer.state[params[4]].pop("exp_avg")
    optimizer.state[params[4]]["exp_avg"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match="exp_avg"):
        optimizer.step()
    assert norm == scaled
    optimizer.state[params[4]]["exp_avg"] = good
    optimizer.step()
    assert norm == scaled / 4


def test_closure(spec):
    """Gradients made by the closure count; what it arms serves this step."""
    params, twins = make_params(), make_params()
    ours, theirs = spec.ours(params, **spec.typical), spec.torch(twins, **spec.typical)

    def closure(own, clip):
        give_grads(own, 0)
        clip()
        return 1.5

    assert ours.step(lambda: closure(params, lambda: ours.clip_grad_norm(0.5))) == 1.5
    theirs.step(lambda: closure(twins, lambda: torch.nn.utils.clip_grad_norm_(twins, 0.5)))
    for p, q in zip(params, twins, strict=True):
        assert_close(p, q, Tolerance(1e-5, 1e-6))


def fused_step_of(optimizer, scale, found):
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("by", ["call", "policy"])
@pytest.mark.parametrize("fused_spec", FUSED, ids=lambda s: s.name)
def test_fused_scaler_and_clipping(fused_spec, by):
    """The norm is that of unscaled gradients, and p.grad is left unscaled and unclipped."""
    lockstep = Lockstep(fused_spec, {**fused_spec.typical, "fused": True}, dtype=torch.float64)
    if by == "policy":
        policy = lockstep.ours.set_grad_policy(max_norm=0.5)
    for step, found in enumerate((0.0, 1.0, 0.0)):
        scale = 2.0 ** (3 + step)
        for params in (lockstep.params, lockstep.twins):
            give_grads(params, step)
        unscaled = [bits(p.grad) for p in lockstep.params]
        for p in lockstep.params:
            p.grad = p.grad * scale
        norm = lockstep.ours.clip_grad_norm(0.5) if by == "call" else None
        fused_step_of(lockstep.ours, scale, found)
        expected = torch.nn.utils.clip_grad_norm_(lockstep.twins, 0.5)
        torch.testing.assert_close(norm if by == "call" else policy.last_norm, expected, rtol=1e-12, atol=0)
        if not found:
            lockstep.theirs.step()
            assert [bits(p.grad) for p in lockstep.params] == unscaled
    lockstep.check()
    if by == "policy":
        assert policy.skipped_steps == 1


def mixed_precision_run(spec, options, control, iterations=6, overflow=3):
    """A small network under fp16 autocast, with one overflow; `control` clips between backward and step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    optimizer = spec.ours(model.parameters(), **options)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=128.0)
    data = torch.randn(iterations, 4, 8)
    norms = []
    for i in range(iterations):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = (model(data[i]).float() - data[i]).square().mean()
        scaler.scale(loss).backward()
        if i == overflow:
            model[0].weight.grad[0, 0] = math.inf
        norm = control(scaler, optimizer, model)
        scaler.step(optimizer)
        scaler.update()
        norms.append(norm if isinstance(norm, torch.Tensor) else optimizer.grad_policy.last_norm)
    return model, [n.item() for i, n in enumerate(norms) if i != overflow], scaler.get_scale()


def test_every_way_to_clip_under_a_scaler(spec):
    def by_torch(scaler, optimizer, model):
        scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    def by_call(scaler, optimizer, model):
        scaler.unscale_(optimizer)
        return optimizer.clip_grad_norm(0.1)

    def by_call_of_scaled(scaler, optimizer, model):
        return optimizer.clip_grad_norm(0.1)

    def by_policy(scaler, optimizer, model):
        if optimizer.grad_policy is None:
            optimizer.set_grad_policy(max_norm=0.1, skip_nonfinite=True)

    options = {**spec.typical, **({"lr": 0.01} if "lr" in spec.typical else {})}
    reference, norms, scale = mixed_precision_run(spec, options, by_torch)
    assert scale == 64.0 and max(norms) > 0.1
    runs = [(options, by_call), (options, by_call_of_scaled), (options, by_policy)]
    if spec.scales_in_step:
        fused = {**options, "fused": True}
        runs += [(fused, by_torch), (fused, by_call), (fused, by_call_of_scaled), (fused, by_policy)]
    for given, control in runs:
        model, found, found_scale = mixed_precision_run(spec, given, control)
        assert found_scale == scale
        torch.testing.assert_close(torch.tensor(found), torch.tensor(norms), rtol=1e-4, atol=1e-6)
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


def test_averages_follow_skips():
    """A skipped step leaves the average and its count alone."""
    from optim_ext.swa_utils import AveragedModel, get_ema_multi_avg_fn

    results = []
    for in_step in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = optim_ext.AdamW(model.parameters(), lr=0.1)
        policy = optimizer.set_grad_policy(max_norm=0.5, skip_above=100.0)
        if in_step:
            optimizer.average_into(averaged, model)
        for step in range(5):
            for i, p in enumerate(model.parameters()):
                p.grad = random(p.shape, p.dtype, 10 * step + i) * (1000 if step in (0, 3) else 1)
            optimizer.step()
            if not in_step and not policy.last_step_skipped:
                averaged.update_parameters(model)
        assert policy.skipped_steps == 2 and averaged.n_averaged == 3
        results.append([bits(p) for p in averaged.parameters()])
    assert results[0] == results[1]


def test_compiled_steps_follow_the_policy():
    params, twins = (make_params(((3, 5), (7,))) for _ in range(2))
    ours, eager = (optim_ext.AdamW(own, lr=torch.tensor(0.1)) for own in (params, twins))
    policies = [optimizer.set_grad_policy(max_norm=1.0, skip_above=50.0) for optimizer in (ours, eager)]
    compiled = torch.compile(lambda: ours.step(), fullgraph=True, backend="aot_eager")
    for step in range(4):
        for own in (params, twins):
            give_grads(own, step)
            if step == 2:
                own[0].grad = own[0].grad * 1000
        compiled()
        eager.step()
        assert bits(policies[0].last_norm) == bits(policies[1].last_norm)
        assert policies[0].skipped_steps == policies[1].skipped_steps == int(step >= 2)
    assert [bits(p) for p in params] == [bits(p) for p in twins]


def test_arming_inside_a_compiled_function_is_refused():
    params = make_params(((3, 5),))
    optimizer = optim_ext.AdamW(params, lr=torch.tensor(0.1))
    give_grads(params, 0)
    with pytest.raises(Exception, match="clip_grad_norm|exception|raise"):
        torch.compile(lambda: optimizer.clip_grad_norm(1.0), fullgraph=True, backend="aot_eager")()


def test_find_nonfinite():
    params = make_params(((3, 4), (5,), (2,), ()))
    optimizer = optim_ext.SGD([{"params": params[:2]}, {"params": params[2:]}])
    give_grads(params, 0, frozen={3})
    assert optimizer.find_nonfinite() == []
    params[1].grad[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    params[2].data[0] = math.nan
    params[3].data.fill_(math.inf)
    found = optimizer.find_nonfinite()
    assert [tuple(entry) for entry in found] == [
        ("parameter 1 of group 0", 3, 0),
        ("parameter 0 of group 1", 0, 1),
        ("parameter 1 of group 1", 0, 1),
    ]
    assert str(found[0]) == "parameter 1 of group 0: 3 non-finite in the gradient, 0 in the value"
    named = optim_ext.SGD(zip("abcd", params, strict=True))
    assert [entry.parameter for entry in named.find_nonfinite()] == ["b", "c", "d"]


def test_measure_step():
    params = make_params(dtype=torch.float64)
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 1.0}]
    optimizer = optim_ext.SGD(groups, lr=0.5)
    give_grads(params, 0)
    with optimizer.measure_step() as norms:
        assert norms == []
        optimizer.step()
    for (grad, param, update), group in zip(norms, optimizer.param_groups, strict=True):
        torch.testing.assert_close(grad, norm_of(group["params"]), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            param, torch.cat([p.detach().flatten() for p in group["params"]]).norm(), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(update, grad * group["lr"], rtol=1e-12, atol=1e-14)


# Where steps are counted that a GPU may skip. No GPU is needed to see that: the tensors are fake and the plan is a stub.


class PlanStub:
    """In place of the native plan: notes the steps it is asked to take, or fails."""

    made, fails = 0, False

    def __init__(self, *_):
        type(self).made += 1

    def remember_options(self, *_):
        pass

    def repeat(self, *_):
        return False

    def step(self, *_, **__):
        if self.fails:
            raise RuntimeError("no such step")
        return True


@pytest.fixture
def fake_gpu(monkeypatch):
    stub = type("Plan", (PlanStub,), {})
    monkeypatch.setattr(planning._C, "Plan", stub)
    monkeypatch.setattr(FusedStep, "_torch_reason", lambda *_: None)
    with FakeTensorMode():
        yield stub


def on_fake_gpu(make, options):
    params = [torch.nn.Parameter(torch.zeros(shape, device="cuda")) for shape in ((3, 4), (5,))]
    optimizer = make(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    return optimizer, StepControls(found_inf=torch.zeros((), device="cuda"))


def devices_of_numbers(optimizer, spec):
    return {
        value.device.type for entry in optimizer.state.values() for key, value in entry.items() if key in spec.numbers
    }


@pytest.mark.parametrize("counting_spec", COUNTING, ids=lambda s: s.name)
def test_a_step_that_a_gpu_may_skip_is_counted_there(counting_spec, fake_gpu):
    spec = counting_spec
    optimizer, may_skip = on_fake_gpu(spec.ours, spec.typical)
    optimizer._step_as_told(StepControls())
    before = devices_of_numbers(optimizer, spec)
    assert before == ({"cuda"} if spec.name == "ASGD" else {"cpu"}) and fake_gpu.made == 1  # as torch has it
    for _ in range(2):  # one more plan: the first one has the counters that were left behind
        optimizer._step_as_told(may_skip)
        assert devices_of_numbers(optimizer, spec) == {"cuda"} and fake_gpu.made == 2
    optimizer._step_as_told(StepControls())
    assert devices_of_numbers(optimizer, spec) == {"cuda"} and fake_gpu.made == 2


@pytest.mark.parametrize("fused_spec", [spec for spec in COUNTING if spec.fused], ids=lambda s: s.name)
def test_a_fused_optimizer_with_the_counters_of_another_checkpoint(fused_spec, fake_gpu):
    """Saved without `fused`, a checkpoint brings that option and counters on the CPU along; GradScaler goes on asking."""
    saved, _ = on_fake_gpu(fused_spec.ours, fused_spec.typical)
    saved._step_as_told(StepControls())
    loaded, may_skip = on_fake_gpu(fused_spec.ours, {**fused_spec.typical, "fused": True})
    loaded.load_state_dict(saved.state_dict())
    assert loaded._step_supports_amp_scaling and devices_of_numbers(loaded, fused_spec) == {"cpu"}
    loaded._step_as_told(may_skip)
    assert devices_of_numbers(loaded, fused_spec) == {"cuda"}


@pytest.mark.parametrize("counting_spec", COUNTING, ids=lambda s: s.name)
def test_a_step_that_fails_leaves_counters_where_they_were(counting_spec, fake_gpu):
    optimizer, may_skip = on_fake_gpu(counting_spec.ours, counting_spec.typical)
    optimizer._step_as_told(StepControls())
    before = [dict(entry) for entry in optimizer.state.values()]
    fake_gpu.fails = True
    with pytest.raises(RuntimeError, match="no such step"):
        optimizer._step_as_told(may_skip)
    for entry, kept in zip(optimizer.state.values(), before, strict=True):
        assert entry.keys() == kept.keys() and all(entry[key] is value for key, value in kept.items())


def test_counts_in_python_numbers_cannot_skip_on_a_gpu(fake_gpu):
    optimizer, _ = on_fake_gpu(optim_ext.SparseAdam, {})
    group = optimizer.param_groups[0]
    optimizer._count_on_device(group)  # there is nothing to be counted yet
    optimizer.state[group["params"][1]] = {"step": 3}
    with pytest.raises(RuntimeError, match="parameter 1 of group 0: SparseAdam counts steps in Python numbers"):
        optimizer._count_on_device(group)
