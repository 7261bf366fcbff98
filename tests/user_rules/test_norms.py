"""Rules that take norms of whole tensors: what the function computes, in two sweeps, natively."""

import copy
import math

import pytest
import torch
from lockstep import bits, give_grads, make_params, native_ops, snapshot, twin
from user_rules.twins import LAMB, LARS

import optim_ext
from optim_ext.math import exp, lerp, maximum, norm, rms, sqrt, where

rule = optim_ext.rule


def direction(m, grad, eps):
    return m / (sqrt(abs(grad)) + eps)


def relative(x, eps):
    return x / (norm(x) + eps)


@rule("m", backend="interpreted")
def Computed(param, grad, m, *, step, lr=0.1, beta=0.9, eps=1e-3):
    """Two numbers of one value that is computed, by functions of the user's, with what depends on the step."""
    m = lerp(m, grad, (1 - beta) / (1 - beta**step))
    update = direction(m, grad, eps)
    return param - lr * relative(update, eps) / maximum(1.0, rms(update)), m


@rule(("m", "v"), backend="interpreted")
def OfTwo(param, grad, m, v, *, lr=0.1, beta=0.9):
    """Of two computed values, one of them with a state that nothing else reads."""
    m = beta * m + grad
    return param - lr * m * exp(-rms(grad * (1 + v))) * norm(m + param) / (1 + norm(m + param)), m, v


@rule(("m",), backend="interpreted")
def OfMemory(param, grad, m, *, lr=0.1, limit=0.5, largest=None):
    """Of a state and of the gradient as they are in memory, and conditions on them."""
    if norm(grad) > limit:
        grad = grad * limit / norm(grad)
    if largest is not None and rms(m) > largest:
        m = where(rms(m) > 2 * largest, 0.0, m)
    m = 0.9 * m + grad
    return param - lr * m, m


@rule(scalars={"total": 0.25}, backend="interpreted")
def OfScalar(param, grad, total, *, step, lr=0.1, eps=1e-8):
    """AdaGrad-Norm: a number of the state that a norm goes into."""
    total = total + norm(grad / step) ** 2
    return param - lr / (sqrt(total) + eps) * grad, total


MADE = [Computed, OfTwo, OfMemory, OfScalar, LAMB, LARS]


def by_function(made):
    of = made._definition
    return rule(of.states, scalars=of.scalars, check=of.options.check, backend="torch")(made.reference)


def stepped(made, params, steps=4, **options):
    optimizer = made(params, **options)
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("options", [{}, {"maximize": True, "lr": 0.3}], ids=str)
@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_native_steps_are_those_of_the_function(made, options):
    params = make_params(((), (7,), (0,), (3, 5), (70, 70)), dtype=torch.float64)
    twins = twin(params)
    native, function = stepped(made, params, **options), stepped(by_function(made), twins, **options)
    give_grads(params, 9)
    assert native_ops(native.step) == ["optim_ext::rule_"]
    give_grads(twins, 9)
    function.step()
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(param.detach(), other.detach(), rtol=1e-6, atol=1e-9)
        for key, value in native.state[param].items():
            torch.testing.assert_close(value, function.state[other][key].detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_float_steps_of_the_function_are_close_in_its_own_dtype(made):
    """Norms are tensors in double to the function, which change the dtype of nothing."""
    for dtype in (torch.float32, torch.bfloat16):
        params = make_params(((7,), (3, 5)), dtype=dtype)
        twins = twin(params)
        stepped(made, params), stepped(by_function(made), twins)
        rtol = 1e-4 if dtype == torch.float32 else 5e-2
        for param, other in zip(params, twins, strict=True):
            torch.testing.assert_close(param.detach(), other.detach(), rtol=rtol, atol=rtol)


def test_an_optional_norm_is_that_of_its_variant():
    params = make_params(dtype=torch.float64)
    twins = twin(params)
    stepped(OfMemory, params, largest=0.3), stepped(by_function(OfMemory), twins, largest=0.3)
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(param.detach(), other.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("first", [0.0, math.inf, -math.inf, math.nan, 1e200], ids=str)
@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_zeros_infinities_and_no_elements_are_as_in_torch(made, first):
    """A tensor of zeros, gradients of zeros, one bad element, and no element at all: against the function in torch."""
    shapes = ((5,), (4,), (0,), (3,))
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes[:3]]
    params.append(torch.nn.Parameter(torch.tensor([1.0, first, -2.0], dtype=torch.float64)))
    grads = [torch.zeros(5, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    grads += [torch.ones(0, dtype=torch.float64), torch.tensor([first, 1.0, 0.5], dtype=torch.float64)]
    twins = twin(params)
    optimizers = made(params), by_function(made)(twins)
    for _ in range(2):
        for optimizer, own in zip(optimizers, (params, twins), strict=True):
            for param, grad in zip(own, grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
        for param, other in zip(params, twins, strict=True):
            torch.testing.assert_close(param.detach(), other.detach(), rtol=1e-6, atol=1e-12, equal_nan=True)


def test_a_division_by_a_norm_of_zero_is_no_error_and_one_by_another_zero_is():
    @rule(backend="interpreted")
    def Divides(param, grad, *, lr=0.1, share=1.0):
        return param - lr * grad * (1 / norm(param)) - rms(grad / (1 / share)) * norm(param)

    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = Divides([param])
    optimizer.step()
    assert param.tolist() == [-math.inf] * 3
    optimizer.param_groups[0]["share"] = 0.0
    before = snapshot(optimizer)
    with pytest.raises(ZeroDivisionError, match=r"a division by zero in `1 / share` \(line \d+\), .* share = 0"):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_threads_change_no_bit(made):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            params = make_params(((400, 400), (17,), (300, 301), ()))
            params.append(torch.nn.Parameter(params[0].detach().t().clone().t()))
            stepped(made, params, 3)
            found.append([bits(p) for p in params])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("made", [Computed, OfTwo, OfMemory, OfScalar], ids=lambda made: made.__name__)
def test_compiled_has_the_bits_of_interpreted(made, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_CACHE", str(tmp_path / "cache"))
    definition = made._definition
    compiled = rule(definition.states, scalars=definition.scalars, backend="compiled")(made.reference)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
        params = make_params(((7,), (0,), (70, 70), (5000,)), dtype)
        params.append(torch.nn.Parameter(params[2].detach().t().clone().t()))
        twins = twin(params)
        optimizers = [stepped(each, own) for each, own in ((made, params), (compiled, twins))]
        assert optimizers[1]._variant(optimizers[1].param_groups[0]).compiled
        assert [bits(p) for p in params] == [bits(p) for p in twins], dtype
        for param, other in zip(params, twins, strict=True):
            for key, value in optimizers[0].state[param].items():
                assert bits(value) == bits(optimizers[1].state[other][key]), (dtype, key)


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_state_goes_to_the_plain_twin_and_back(made):
    params = make_params(dtype=torch.float64)
    native, other = stepped(made, params, 2), by_function(made)(twin(params))
    other.load_state_dict(copy.deepcopy(native.state_dict()))
    back = made(twin(params))
    back.load_state_dict(copy.deepcopy(other.state_dict()))
    for optimizer in (native, other, back):
        give_grads(optimizer.param_groups[0]["params"], 5)
        optimizer.step()
    for param, its, own in zip(params, other.param_groups[0]["params"], back.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(its.detach(), param.detach(), rtol=1e-6, atol=1e-9)
        assert bits(own) == bits(param)


def test_a_bad_group_stops_all_of_them_before_the_first_sweep():
    params = make_params()
    optimizer = LAMB([{"params": params[:4]}, {"params": params[4:]}])
    give_grads(params, 0)
    optimizer.step()
    optimizer.state[params[5]]["exp_avg"] = torch.zeros(3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="exp_avg has shape"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_policies_skip_and_clip_as_those_of_lamb():
    results = []
    for made in (optim_ext.LAMB, LAMB):
        params = make_params()
        optimizer = made(params)
        optimizer.set_grad_policy(max_norm=0.5, skip_nonfinite=True)
        for step in range(4):
            give_grads(params, step)
            if step == 2:
                params[4].grad[0] = float("nan")
            optimizer.step()
        results.append(([bits(p) for p in params], int(optimizer.grad_policy.skipped_steps)))
    assert results[0] == results[1] and results[0][1] == 1


def said(act, made):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        act(made)
    return f"{caught.type.__name__}: {caught.value}"


def lazy(made):
    made([{"params": [torch.nn.Parameter(torch.ones(4, 3))], "lazy_rows": True}])


def expanded(made):
    param = torch.nn.Parameter(torch.ones(1).expand(3))
    param.grad = torch.ones(3)
    made([param]).step()


def shard(made):
    param = torch.nn.Parameter(torch.ones(4))
    param._fsdp_flattened = True
    param.grad = torch.ones(4)
    made([("cut", param)]).step()


@pytest.mark.parametrize("act", [lazy, expanded, shard], ids=lambda act: act.__name__)
@pytest.mark.parametrize(("made", "built_in"), [(LAMB, optim_ext.LAMB), (LARS, optim_ext.LARS)], ids=["LAMB", "LARS"])
def test_what_the_built_in_class_refuses_is_refused_in_its_words(act, made, built_in):
    assert said(act, made) == said(act, built_in).replace(built_in._op, "rule_")


@pytest.mark.parametrize(("made", "built_in"), [(LAMB, optim_ext.LAMB), (LARS, optim_ext.LARS)], ids=["LAMB", "LARS"])
def test_parameters_that_share_memory_take_turns_as_in_the_built_in_class(made, built_in):
    results = []
    for cls in (made, built_in):
        memory = torch.arange(1.0, 9000.0)
        params = [memory[:6000].requires_grad_(), memory[2000:].requires_grad_()]
        stepped(cls, params, 3)
        results.append(bits(memory))
    assert results[0] == results[1]


def test_sparse_gradients_are_refused_as_by_every_rule():
    params = make_params(((4, 3), (5,)))
    give_grads(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    optimizer = LAMB(params)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="LAMB does not support sparse gradients"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_a_shard_of_fsdp_is_refused_as_by_lamb():
    param = torch.nn.Parameter(torch.ones(4))
    param._fsdp_flattened = True
    param.grad = torch.ones(4)
    for options in ({}, {"differentiable": True}):
        optimizer = Computed([("cut", param)], **options)
        with pytest.raises(RuntimeError, match="parameter 'cut': it is a shard of FSDP, whose norm is not that of"):
            optimizer.step()
    (report,) = optim_ext.explain(Computed([("cut", param)]))
    assert not report.native and "it is a shard of FSDP, whose norm is not that of the parameter" in report.reason
    assert param.tolist() == [1.0] * 4


def test_a_differentiable_step_goes_through_norms():
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    inner = start.clone()
    inner.retain_grad()
    inner.grad = torch.tensor([0.6, 0.8], dtype=torch.float64)
    OfMemory([inner], lr=rate, differentiable=True).step()
    inner.sum().backward()
    assert rate.grad.item() == pytest.approx(-0.5 * 1.4)


def test_compiled_graphs_take_norms():
    params = make_params(((5,), (3, 4)))
    twins = twin(params)
    eager, traced = Computed(params), Computed(twins)
    step = torch.compile(traced.step, backend="eager", fullgraph=True)
    for index in range(3):
        give_grads(params, index), give_grads(twins, index)
        eager.step()
        step()
    assert [bits(p) for p in params] == [bits(p) for p in twins]


def test_a_norm_of_something_else_refuses_the_class(monkeypatch):
    from optim_ext._rules import definition as module

    true = module.code_of

    def false(*arguments):
        code = true(*arguments)
        return {**code, "norms": [({"norm": "rms", "rms": "norm"}[kind], place) for kind, place in code["norms"]]}

    monkeypatch.setattr(module, "code_of", false)
    made = rule("m", backend="interpreted")(OfMemory.reference)
    with pytest.raises(optim_ext.RuleError, match="differs from the function at step 1, element .* of param"):
        made(make_params())


def test_code_whose_norms_are_of_nothing_is_refused():
    from optim_ext import _C

    variant = Computed._definition.variant((...,) * 3)
    code = {**Computed._definition._code(variant.translation), "lists": ["m"]}
    for what, damage in (
        ("norms", {"norms": [("norm", 3), ("rms", 4)]}),
        ("norms", {"norms": [("norm", 0), ("rms", 1)]}),
        ("what is said of it", {"lists": []}),
        ("norms", {"for_norms": None}),
        ("code for its norms", {"for_norms": {**code["for_norms"], "updates": 9}}),
        ("for its norms, ", {"for_norms": {**code["for_norms"], "tile": [("copy", 2, 1, 1, 1)]}}),
    ):
        with pytest.raises(ValueError, match=f"the code of rule damaged is not sound: {what}"):
            _C.define_rule("damaged", {**code, **damage})
