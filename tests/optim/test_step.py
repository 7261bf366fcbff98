"""What one step does and does not touch: closures, absent gradients, layouts, versions, state put there by the user."""

import copy

import pytest
import torch
from lockstep import Lockstep, assert_close, copy_of, give_grads, make_params, native_ops, random, snapshot, twin
from specs import SPECS, Tolerance

ADAMW = next(spec for spec in SPECS if spec.name == "AdamW")


@pytest.mark.parametrize("loss", [torch.tensor(1.5), torch.tensor([1.5]), 3, 1.5, None], ids=repr)
def test_closure_value_is_returned(spec, loss):
    params = make_params()
    optimizer = spec.ours(params, **spec.typical)
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        give_grads(params, 0)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is loss
    assert seen == [True]
    assert optimizer.step() is None
    assert optimizer.step(closure=closure) is loss


def test_closure_runs_before_gradients_are_read(spec):
    """Gradients the closure makes or drops count in the same step."""
    lockstep = Lockstep(spec, dtype=torch.float64)
    for step in range(4):
        for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
            optimizer.step(lambda params=params, step=step: give_grads(params, step, frozen={step}))
        lockstep.check()


def test_backward_inside_the_closure(spec):
    weight, other = torch.nn.Parameter(random((4, 3), torch.float64, 1)), random((3,), torch.float64, 2)
    copied = torch.nn.Parameter(weight.detach().clone())
    for param, make in ((weight, spec.ours), (copied, spec.torch)):
        optimizer = make([param], **spec.typical)

        def closure(param=param, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (param @ other).square().sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(5)]
        assert losses[-1] < losses[0]
    torch.testing.assert_close(weight, copied, rtol=1e-11, atol=1e-12)


def test_autograd_stays_out_of_it(spec):
    """No graph is built, whatever mode the caller is in; gradients that require grad are fine."""
    params = make_params()
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    for param in params:
        param.grad = param.grad.requires_grad_()
    optimizer.step()
    assert torch.is_grad_enabled()
    for param in params:
        assert param.is_leaf and param.grad_fn is None and param.requires_grad
        assert not any(v.requires_grad for v in optimizer.state.get(param, {}).values())
    with torch.no_grad():
        optimizer.step()
        assert not torch.is_grad_enabled()


def test_absent_gradients_are_skipped(variant):
    lockstep = Lockstep(variant.spec, variant.options).step(2, frozen={1, 4}).check()
    if variant.spec.name != "Adagrad":  # which makes its state in the constructor
        assert lockstep.params[1] not in lockstep.ours.state
    untouched = lockstep.params[4]
    before = untouched.detach().clone()
    lockstep.step(1, frozen={4})
    assert torch.equal(untouched, before)


def test_all_gradients_absent_is_a_no_op(spec):
    lockstep = Lockstep(spec).step(1)
    before = snapshot(lockstep.ours)["params"]
    lockstep.step(2, frozen=range(len(lockstep.params))).check()
    assert snapshot(lockstep.ours)["params"] == before


def test_no_state_without_a_gradient(spec):
    optimizer = spec.ours(make_params(), **spec.typical)
    keys = len(optimizer.state)
    optimizer.step()
    assert len(optimizer.state) == keys


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_frozen_and_thawed(variant, dtype):
    lockstep = Lockstep(variant.spec, variant.options, dtype=dtype)
    for frozen in ({0}, {0, 3}, {0, 3}, set(), {1, 2, 3, 4, 5, 6}, {5}, set(), set(range(7)), {2}):
        lockstep.step(frozen=frozen).check()


def test_zero_grad(spec):
    params = make_params()
    optimizer = spec.ours(params)
    give_grads(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_gradients_are_never_written(variant):
    params = make_params()
    for flags in variant.spec.flags:
        if flags.get("foreach") and any(isinstance(v, torch.Tensor | tuple) for v in variant.options.values()):
            continue  # refused by the constructor
        optimizer = variant.spec.ours(params, **copy_of(variant.options), **flags)
        give_grads(params, 0)
        grads = [p.grad for p in params]
        kept = [(g.clone(), g._version, g.data_ptr()) for g in grads]
        for _ in range(5):
            optimizer.step()
        for param, grad, (value, version, address) in zip(params, grads, kept, strict=True):
            assert param.grad is grad and grad._version == version and grad.data_ptr() == address
            assert torch.equal(grad, value)


def test_versions_of_what_is_written_rise(variant):
    """Autograd must see that a parameter, or a state tensor someone saved, has changed."""
    params = make_params()
    optimizer = variant.spec.ours(params, **copy_of(variant.options))
    give_grads(params, 0)
    optimizer.step()
    state = [v for entries in optimizer.state.values() for v in entries.values()]
    versions = [t._version for t in (*params, *state)]
    addresses = [t.data_ptr() for t in (*params, *state)]
    optimizer.step()
    assert all(t._version > v for t, v in zip((*params, *state), versions, strict=True))
    assert [t.data_ptr() for t in (*params, *state)] == addresses
    assert state == [] or all(
        a is b for a, b in zip(state, [v for e in optimizer.state.values() for v in e.values()], strict=True)
    )


def test_stale_graph_is_noticed(spec):
    """backward() through a parameter that a step has changed is an error, not a wrong gradient."""
    param = torch.nn.Parameter(torch.randn(3))
    optimizer = spec.ours([param], lr=0.1)
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def conv():
    return torch.empty(4, 3, 2, 5)


LAYOUTS = {
    "contiguous": lambda: torch.empty(6, 4),
    "transposed": lambda: torch.empty(4, 6).t(),
    "channels last": lambda: conv().to(memory_format=torch.channels_last),
    "conv": conv,
    "channels last 3d": lambda: torch.empty(2, 3, 2, 2, 4).to(memory_format=torch.channels_last_3d),
    "permuted": lambda: torch.empty(2, 3, 4, 5).permute(2, 0, 3, 1),
    "every other": lambda: torch.empty(9, 14)[::2, ::3],
    "column": lambda: torch.empty(8, 5, 2)[..., 0],
    "narrowed": lambda: torch.empty(7, 9)[2:5],
    "offset": lambda: torch.empty(101)[1:],
    "zero dimensions": lambda: torch.empty(()),
    "no elements": lambda: torch.empty(3, 0, 2),
    "no elements transposed": lambda: torch.empty(0, 4).t(),
    "ones": lambda: torch.empty(1, 5, 1, 4).to(memory_format=torch.channels_last),
    "many dimensions": lambda: torch.empty(2, 1, 2, 3, 1, 2, 2, 1, 2).permute(8, 1, 3, 0, 2, 4, 7, 6, 5),
    "long rows": lambda: torch.empty(3, 700)[:, ::2],
    "rows of two": lambda: torch.empty(150, 14)[:, 3:5],
    "rows of nine": lambda: torch.empty(70, 14)[:, 3:12],
    "fourteen dimensions": lambda: torch.empty([2] * 14).permute([*range(13, -1, -2), *range(0, 14, 2)]),
}


def laid_out(make, dtype, seed):
    tensor = make().to(dtype) if dtype != torch.float32 else make()
    like = make()
    if tensor.stride() != like.stride():  # .to() made it dense: a strided view has to be built anew
        span = 1 + sum((s - 1) * st for s, st in zip(like.shape, like.stride(), strict=True) if s)
        tensor = torch.empty(max(span, 1), dtype=dtype).as_strided(like.shape, like.stride())
    return tensor.copy_(random(tensor.shape, dtype, seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex128], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(spec, layout, dtype):
    """Parameters of any layout, with gradients of the same layout and of another one: as torch, and in half precision
    the same bits as with everything contiguous."""
    exact = dtype == torch.bfloat16
    start = laid_out(LAYOUTS[layout], dtype, 1)
    params = [torch.nn.Parameter(start), torch.nn.Parameter(start.clone())]
    twins = [torch.nn.Parameter(start.clone(memory_format=torch.contiguous_format)) for _ in params]
    ours, theirs = spec.ours(params, **spec.typical), (spec.ours if exact else spec.torch)(twins, **spec.typical)
    assert params[0].stride() == start.stride()
    for step in range(3):
        for i, (param, other) in enumerate(zip(params, twins, strict=True)):
            grad = random(param.shape, dtype, 10 * step + i)
            if i == 0:
                param.grad = torch.empty_strided(param.shape, param.stride(), dtype=dtype).copy_(grad)
            else:
                backwards = tuple(range(grad.dim()))[::-1]
                param.grad = grad.permute(backwards).contiguous().permute(backwards)
            other.grad = grad
        ours.step()
        theirs.step()
    tolerance = Tolerance(0, 0) if exact else spec.tolerances[dtype]
    for param, other in zip(params, twins, strict=True):
        assert_close(param, other, tolerance)
        for key, value in theirs.state[other].items():
            assert_close(ours.state[param][key], value, tolerance, key)


def test_strided_views_leave_their_neighbours_alone(spec):
    """Two interleaved parameters, and what lies between them, share one storage."""
    storage = random((10, 8, 3), torch.float64, 3)
    kept = storage.clone()
    params = [torch.nn.Parameter(storage[..., 0]), torch.nn.Parameter(storage[..., 1])]
    twins = [torch.nn.Parameter(kept[..., i].clone()) for i in (0, 1)]
    optimizers = spec.ours(params, **spec.typical), spec.torch(twins, **spec.typical)
    for step in range(3):
        give_grads(params, step)
        give_grads(twins, step)
        for optimizer in optimizers:
            optimizer.step()
    for i in (0, 1):
        torch.testing.assert_close(storage[..., i], twins[i].detach(), rtol=1e-11, atol=1e-12)
    assert torch.equal(storage[..., 2], kept[..., 2])


def test_broadcast_gradient(spec):
    """An expanded gradient, as sum().backward() makes it, is read only."""
    lockstep = Lockstep(spec, params=make_params(((4, 5), (3, 1, 2)), torch.float64))
    for step in range(3):
        for params in (lockstep.params, lockstep.twins):
            for param in params:
                param.grad = random((), torch.float64, step).expand(param.shape)
        for optimizer in lockstep.both:
            optimizer.step()
        lockstep.check()


@pytest.mark.only_for(lambda spec: not spec.is_real, reason="takes no complex parameters")
def test_conjugate_and_negative_views(spec):
    """Lazy views torch's for-loop resolves on its own: either the right numbers, or a clear refusal before any write."""
    for make in (lambda g: g.conj(), lambda g: torch._neg_view(g)):
        lockstep = Lockstep(spec, params=make_params(((3, 4),), torch.complex128)).step(1)
        before = snapshot(lockstep.ours)
        grad = make(random((3, 4), torch.complex128, 9))
        lockstep.params[0].grad = grad
        lockstep.twins[0].grad = grad.resolve_conj().resolve_neg().clone()
        before["grads"] = snapshot(lockstep.ours)["grads"]
        try:
            lockstep.ours.step()
        except RuntimeError as error:
            assert "view" in str(error)
            assert snapshot(lockstep.ours) == before
            continue
        lockstep.theirs.step()
        lockstep.check()


@pytest.mark.only_for(lambda spec: not spec.is_real, reason="takes no complex parameters")
def test_conjugate_parameter_is_refused_before_any_write(spec):
    """A parameter whose memory holds the conjugate of its values: torch fails on it with half of its list written."""
    params = [p.detach() for p in make_params(((3,), (3,)), torch.complex64)]
    params[1] = params[1].conj()
    optimizer = spec.ours(params, **spec.typical)
    for param in params:
        param.grad = torch.ones(3, dtype=torch.complex64)
    before = [p.resolve_conj().clone() for p in params]
    keys = {id(p): set(entries) for p, entries in optimizer.state.items()}
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 .*resolve_conj\(\)"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert {id(p): set(entries) for p, entries in optimizer.state.items()} == keys


@pytest.mark.torchs
def test_negative_parameter_takes_torchs_path(spec):
    lockstep = Lockstep(spec, params=[random((3,), torch.float64, 1)])
    param = torch._neg_view(-lockstep.params[0])
    optimizer = spec.ours([param], **spec.typical)
    for _ in range(2):
        lockstep.step()
        param.grad = lockstep.params[0].grad
        optimizer.step()
    torch.testing.assert_close(param.resolve_neg(), lockstep.twins[0], rtol=1e-11, atol=1e-12)


def test_param_data_reassigned(variant):
    """p.data = ... gives the parameter other memory: the next step must write there."""
    lockstep = Lockstep(variant.spec, variant.options, dtype=torch.float64).step(2)
    for params in (lockstep.params, lockstep.twins):
        for i, param in enumerate(params):
            param.data = random(param.shape, torch.float64, 400 + i)
    lockstep.step(2).check()
    for params in (lockstep.params, lockstep.twins):
        params[5].data = params[5].data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    lockstep.step(2).check()


def test_grad_data_reassigned_and_edited(spec):
    """Gradients replaced, reassigned through .data, or clipped in place between steps."""
    lockstep = Lockstep(spec, dtype=torch.float64).step(1)
    for step in range(3):
        for params in (lockstep.params, lockstep.twins):
            for i, param in enumerate(params):
                if step == 0:
                    param.grad.data = random(param.shape, torch.float64, 30 + i)
                elif step == 1:
                    param.grad = random(param.shape, torch.float64, 60 + i)
                else:
                    param.grad.mul_(0.5)
        for optimizer in lockstep.both:
            optimizer.step()
        lockstep.check()


def test_tensors_overwritten_in_place_between_steps(variant):
    """Parameters and state are the truth: copy_ into them is seen by the next step."""
    lockstep = Lockstep(variant.spec, variant.options, dtype=torch.float64).step(2)
    for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
        with torch.no_grad():
            for i, param in enumerate(params):
                param.copy_(random(param.shape, torch.float64, 500 + i))
                for k, (key, value) in enumerate(sorted(optimizer.state.get(param, {}).items())):
                    is_number = key in variant.spec.numbers
                    number = variant.spec.number(key, 5.0)
                    value.copy_(number if is_number else random(value.shape, torch.float64, 90 + k).abs())
    lockstep.step(3).check()


def test_state_replaced_between_steps(variant):
    """Single tensors, whole dicts and the whole mapping replaced by the user."""
    lockstep = Lockstep(variant.spec, variant.options, dtype=torch.float64).step(2)
    for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
        for i, param in enumerate(params):
            for k, key in enumerate(sorted(set(optimizer.state.get(param, {})) - variant.spec.numbers)):
                shape = optimizer.state[param][key].shape
                optimizer.state[param][key] = random(shape, torch.float64, 70 + 7 * i + k).abs()
    lockstep.step(2).check()
    for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
        for param in params:
            if param in optimizer.state:
                optimizer.state[param] = {k: v.clone() for k, v in optimizer.state[param].items()}
    lockstep.step(2).check()
    for optimizer in lockstep.both:
        fresh = type(optimizer.state)(dict)
        fresh.update({param: {k: v.clone() for k, v in e.items()} for param, e in optimizer.state.items()})
        optimizer.state = fresh
    lockstep.step(2).check()


def test_state_removed_between_steps(spec):
    """State made empty is made anew where torch makes it lazily, and is torch's KeyError where it does not."""
    if not spec.takes_late_params:
        params = make_params()
        optimizer = spec.ours(params, **spec.typical)
        give_grads(params, 0)
        before = [p.detach().clone() for p in params]
        optimizer.state.clear()
        with pytest.raises(KeyError):
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        return
    lockstep = Lockstep(spec, dtype=torch.float64).step(2)
    for optimizer in lockstep.both:
        del optimizer.state[optimizer.param_groups[0]["params"][4]]
        optimizer.state[optimizer.param_groups[0]["params"][5]].clear()
    lockstep.step(2).check()
    for optimizer in lockstep.both:
        optimizer.state.clear()
    lockstep.step(2).check()


def test_momentum_buffer_none_is_made_anew():
    """Older SGD checkpoints hold None for a buffer that was not there yet."""
    lockstep = Lockstep(SPECS[0], dtype=torch.float64).step(2)
    for optimizer in lockstep.both:
        optimizer.state[optimizer.param_groups[0]["params"][2]]["momentum_buffer"] = None
    lockstep.step(2).check()


def test_first_momentum_buffer_is_its_own_memory():
    params = make_params(((4,),))
    optimizer = SPECS[0].ours(params, lr=0.1, momentum=0.9, dampening=0.5)
    give_grads(params, 0)
    optimizer.step()
    buffer = optimizer.state[params[0]]["momentum_buffer"]
    assert torch.equal(buffer, params[0].grad) and buffer.data_ptr() != params[0].grad.data_ptr()


def test_state_put_there_before_the_first_step(spec):
    """State is only made where it is empty; what the user put there is used, and his own keys stay."""
    lockstep = Lockstep(spec, dtype=torch.float64)
    for optimizer, params in zip(lockstep.both, (lockstep.params, lockstep.twins), strict=True):
        for i, param in enumerate(params):
            for k, key in enumerate(spec.keys_of(param.shape, spec.typical)):
                is_number, shape = key in spec.numbers, spec.state_shape(key, tuple(param.shape))
                value = spec.number(key, 4.0) if is_number else random(shape, torch.float64, 40 + 9 * i + k).abs()
                optimizer.state[param][key] = value
            optimizer.state[param]["note"] = "mine"
    lockstep.step(3).check()
    assert all(entries["note"] == "mine" for entries in lockstep.ours.state.values())


def test_step_is_an_assignable_attribute(spec):
    params = make_params()
    optimizer = spec.ours(params)
    seen = []
    original = optimizer.step
    optimizer.step = lambda *args: (seen.append(1), original(*args))
    give_grads(params, 0)
    optimizer.step()
    assert seen == [1]


def test_two_optimizers_share_parameters(spec):
    """A generator and a discriminator optimizer, or two over the same weights, keep apart."""
    params = make_params(dtype=torch.float64)
    twins = twin(params)
    ours = [spec.ours(params, **spec.typical), ADAMW.ours(params[:4], lr=0.1)]
    theirs = [spec.torch(twins, **spec.typical), ADAMW.torch(twins[:4], lr=0.1)]
    for step in range(4):
        for own, optimizers in ((params, ours), (twins, theirs)):
            give_grads(own, step)
            for optimizer in optimizers:
                optimizer.step()
    for mine, other in zip(params, twins, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


def test_inference_mode_parameters_need_inference_mode(spec):
    """Inference tensors can only be written in inference mode, where a step works as ever."""
    with torch.inference_mode():
        params = [torch.randn(3)]
        params[0].grad = torch.ones(3)
        optimizer = spec.ours(params, lr=0.1)
        before = params[0].clone()
        optimizer.step()
        assert not torch.equal(params[0], before)


def test_one_op_per_group_and_call(spec):
    """All tensors of a group go in one call, whatever their shapes, dtypes and layouts."""
    last = torch.complex64 if spec.takes(torch.complex64) else torch.float16
    params = [*make_params(), *make_params(dtype=torch.bfloat16), *make_params(dtype=last)]
    optimizer = spec.ours([{"params": params[:9]}, {"params": params[9:]}], **spec.typical)
    give_grads(params, 0)
    assert native_ops(optimizer.step) == [f"optim_ext::{spec.op}"] * 2


def test_deepcopied_model_and_optimizer_keep_apart(spec):
    params = make_params(dtype=torch.float64)
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    optimizer.step()
    other_params, other = copy.deepcopy((params, optimizer))
    kept = [p.detach().clone() for p in params]
    give_grads(other_params, 1)
    other.step()
    assert all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))
    give_grads(params, 1)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, other_params, strict=True))
