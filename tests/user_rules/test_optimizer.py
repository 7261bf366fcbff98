"""The class that a function becomes: everything that the built-in classes have."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from lockstep import bits, give_grads, make_params, native_ops, snapshot, twin
from torch._subclasses.fake_tensor import FakeTensorMode

import optim_ext
from optim_ext.math import sign, where

rule = optim_ext.rule


@rule(state=("exp_avg",), backend="interpreted")
def Tiger(param, grad, exp_avg, *, lr=1e-3, beta=0.965, weight_decay=0.01):
    """The sign of a momentum."""
    exp_avg = beta * exp_avg + (1 - beta) * grad
    return param * (1 - lr * weight_decay) - lr * sign(exp_avg), exp_avg


MANY = {"m": 0.0, "start": "param", "rate": "lr", "three": 3.0}


@rule(state=MANY, scalars={"total": 0.0}, backend="interpreted")
def Everything(
    param, grad, m, start, rate, three, total, *, step, lr=0.1, betas=(0.9, 0.99), pulled=True, kind="m", limit=None
):
    total = total + 0.5
    m = betas[0] * m + (1 - betas[0]) * grad * three
    update = m if kind == "m" else grad
    if limit is not None:
        update = where(abs(update) > limit, sign(update) * limit, update)
    if pulled:
        update = update + 0.01 * (param - start)
    rate = rate * betas[1]
    correction = 1 / (1 - betas[0] ** step) / (1 + total)
    return param - rate * update * correction, m, start, rate, three, total


EverythingByFunction = rule(state=MANY, scalars={"total": 0.0}, backend="torch")(Everything.reference)


@rule(backend="interpreted")
def Plain(param, grad, *, lr=0.1):
    return param - lr * grad


def test_the_class_has_the_functions_name_and_text():
    assert issubclass(Tiger, torch.optim.Optimizer) and Tiger.__name__ == Tiger.__qualname__ == "Tiger"
    assert Tiger.__module__ == __name__
    assert Tiger.__doc__.startswith("The sign of a momentum.") and "clip_grad_norm" in Tiger.__doc__
    assert str(inspect.signature(Tiger)) == (
        "(params, lr=0.001, beta=0.965, weight_decay=0.01, *, maximize=False, foreach=None, fused=None, capturable=False, "
        "differentiable=False, lazy_rows=False, param_precision='native', state_precision='native', rounding_seed=0, "
        "min_q8_size=4096, max_norm=None, norm_type=2.0, skip_nonfinite=False, skip_above=None)"
    )
    x = torch.ones(3, dtype=torch.float64)
    assert torch.equal(Tiger.reference(x, x, x, lr=0.5)[0], x * (1 - 0.5 * 0.01) - 0.5)


def test_options_go_to_the_groups_in_the_order_of_the_signature():
    optimizer = Tiger(make_params(), 0.5, weight_decay=0.0, maximize=True)
    group = optimizer.param_groups[0]
    assert [key for key in group if key != "params"] == [
        "lr",
        "beta",
        "weight_decay",
        "maximize",
        "foreach",
        "fused",
        "capturable",
        "differentiable",
    ]
    assert (group["lr"], group["beta"], group["weight_decay"], group["maximize"]) == (0.5, 0.965, 0.0, True)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
        ({"beta": 1.0}, ValueError, "Invalid beta value: 1.0"),
        ({"beta": "x"}, TypeError, "beta is 'x', expected a number"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ({"rate": 1.0}, TypeError, r"Tiger\(\) got an unexpected keyword argument 'rate'"),
        ({"fused": True, "foreach": True}, RuntimeError, "cannot be `True` together"),
        ({"fused": True, "differentiable": True}, RuntimeError, "does not support `differentiable`"),
    ],
)
def test_options_are_refused_in_torchs_words(options, error, words):
    with pytest.raises(error, match=words):
        Tiger(make_params(), **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"betas": (0.9,)}, ValueError, r"Invalid betas: \(0.9,\), expected 2 values"),
        ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
        ({"betas": 0.9}, TypeError, "betas is 0.9, expected 2 numbers"),
        ({"pulled": 0.5}, TypeError, "pulled is 0.5, expected a value such as True"),
        ({"limit": "x"}, TypeError, "limit is 'x', expected a number"),
        ({"limit": float("nan")}, ValueError, "Invalid limit value: nan"),
    ],
)
def test_options_of_every_kind_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        Everything(make_params(), **options)


def test_what_is_allowed_can_be_said():
    @rule(check={"lr": lambda lr: lr > 0, "alpha": None}, backend="interpreted")
    def Checked(param, grad, *, lr=0.1, alpha=5.0):
        return param - lr * alpha * grad

    Checked(make_params(), alpha=-3.0)
    with pytest.raises(ValueError, match="Invalid learning rate: 0.0"):
        Checked(make_params(), lr=0.0)


VARIANTS = [
    {},
    {"pulled": False},
    {"kind": "g"},
    {"limit": 0.5},
    {"maximize": True},
    {"pulled": False, "kind": "g", "lr": 0.3},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_native_steps_are_those_of_the_function(options):
    """Every way a state may begin, scalars, counts, constants: against the same class with backend="torch"."""
    params = make_params(dtype=torch.float64)
    twins = twin(params)
    native, by_function = Everything(params, **options), EverythingByFunction(twins, **options)
    for step in range(4):
        for own, optimizer in ((params, native), (twins, by_function)):
            give_grads(own, step)
            optimizer.step()
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(param.detach(), other.detach(), rtol=1e-12, atol=1e-12)
        for key, value in native.state[param].items():
            torch.testing.assert_close(value, by_function.state[other][key].detach(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, ["m", "start", "rate", "three", "total", "step"]),
        ({"pulled": False}, ["m", "rate", "three", "total", "step"]),
    ],
)
def test_state_that_a_variant_does_without_does_not_exist(options, keys):
    params = make_params()
    optimizer = Everything(params, **options)
    give_grads(params, 0)
    optimizer.step()
    assert list(optimizer.state[params[2]]) == keys


def test_state_is_kept_in_its_own_dtype_and_stays_there():
    @rule("m", state_dtype=torch.float32, backend="interpreted")
    def Wide(param, grad, m, *, lr=0.1):
        m = 0.9 * m + grad
        return param - lr * m, m

    params = make_params(dtype=torch.bfloat16)
    optimizer = Wide(params)
    give_grads(params, 0)
    optimizer.step()
    assert optimizer.state[params[0]]["m"].dtype == torch.float32
    other = Wide(twin(params))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, own in zip(params, other.param_groups[0]["params"], strict=True):
        assert bits(optimizer.state[param]["m"]) == bits(other.state[own]["m"])


def test_groups_have_their_own_options_and_variants():
    first, second = make_params(seed=1), make_params(seed=2)
    optimizer = Everything([{"params": first, "lr": 0.5}, {"params": second, "pulled": False, "limit": 0.1}])
    alone = [Everything(twin(first), lr=0.5), Everything(twin(second), pulled=False, limit=0.1)]
    for step in range(3):
        give_grads(first, step), give_grads(second, step)
        optimizer.step()
        for one, params in zip(alone, (first, second), strict=True):
            for param, own in zip(params, one.param_groups[0]["params"], strict=True):
                own.grad = param.grad.clone()
            one.step()
    for one, params in zip(alone, (first, second), strict=True):
        assert [bits(p) for p in params] == [bits(p) for p in one.param_groups[0]["params"]]


def test_a_scheduler_and_a_tensor_change_the_rate():
    params = make_params()
    runs = []
    for rates in ([0.1, 0.05, 0.025], "scheduler", "tensor"):
        own = twin(params)
        rate = torch.tensor(0.1, dtype=torch.float64) if rates == "tensor" else 0.1
        optimizer = Tiger(own, lr=rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if rates == "scheduler" else None
        for step in range(3):
            if isinstance(rates, list):
                optimizer.param_groups[0]["lr"] = rates[step]
            give_grads(own, step)
            optimizer.step()
            if scheduler:
                scheduler.step()
            if rates == "tensor":
                rate.mul_(0.5)
        runs.append([bits(p) for p in own])
    assert runs[0] == runs[1] == runs[2]


def test_an_optimizer_is_saved_loaded_copied_and_pickled():
    params = make_params()
    optimizer = Everything(params)
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    others = []
    for make in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        others.append(make(optimizer))
    loaded = Everything(twin(params), lr=0.3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    others.append(loaded)
    give_grads(params, 5)
    optimizer.step()
    for other in others:
        own = other.param_groups[0]["params"]
        give_grads(own, 5)
        other.step()
        assert [bits(p) for p in own] == [bits(p) for p in params]


def test_a_plain_twin_loads_what_the_native_one_saves_and_the_other_way_round():
    params = make_params(dtype=torch.float64)
    native, by_function = Everything(params), EverythingByFunction(twin(params))
    give_grads(params, 0)
    native.step()
    by_function.load_state_dict(copy.deepcopy(native.state_dict()))
    with torch.no_grad():
        for own, param in zip(by_function.param_groups[0]["params"], params, strict=True):
            own.copy_(param)
    for optimizer in (native, by_function):
        give_grads(optimizer.param_groups[0]["params"], 1)
        optimizer.step()
    for own, param in zip(by_function.param_groups[0]["params"], params, strict=True):
        torch.testing.assert_close(own.detach(), param.detach(), rtol=1e-12, atol=1e-12)
    back = Everything(twin(params))
    back.load_state_dict(by_function.state_dict())
    give_grads(back.param_groups[0]["params"], 2)
    assert native_ops(back.step) == ["optim_ext::rule_"]


def test_a_differentiable_step_is_recorded():
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    param = torch.ones(3, dtype=torch.float64, requires_grad=True)
    inner = param.clone()
    inner.retain_grad()
    inner.grad = torch.full((3,), 2.0, dtype=torch.float64)
    optimizer = Plain([{"params": [inner]}], lr=rate, differentiable=True)
    optimizer.step()
    inner.sum().backward()
    assert rate.grad.item() == -6.0


def test_explain_says_how_a_rule_runs():
    params = make_params()
    give_grads(params, 0)
    assert (
        str(optim_ext.explain(Tiger(params))[0])
        == "group 0: native (one call of optim_ext::rule_ per device, interpreted)"
    )
    reason = optim_ext.explain(Tiger(params, differentiable=True))[0]
    assert not reason.native and "differentiable=True" in reason.reason

    @rule(backend="torch")
    def ByTorch(param, grad, *, lr=0.1):
        return param - lr * grad

    reason = optim_ext.explain(ByTorch(params))[0]
    assert (reason.native, reason.reason) == (False, 'the rule has backend="torch"')


def test_backend_torch_runs_the_function():
    @rule(backend="torch")
    def ByTorch(param, grad, *, lr=0.1):
        return param - lr * grad

    params = make_params()
    give_grads(params, 0)
    expected = [param.detach() - 0.1 * param.grad for param in params]
    optimizer = ByTorch(params)
    assert native_ops(optimizer.step) == []
    assert all(torch.equal(param, value) for param, value in zip(params, expected, strict=True))


def test_hooks_and_closures_are_called():
    params, seen = make_params(), []
    optimizer = Tiger(params)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    give_grads(params, 0)
    assert optimizer.step(lambda: 3.0) == 3.0 and seen == ["before", "after"]


def test_scaler_unscales_in_the_step_where_the_optimizer_is_fused():
    runs = []
    for fused in (False, True):
        param = torch.nn.Parameter(torch.ones(5))
        optimizer = Tiger([param], fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale((param * torch.arange(5.0) * (float("inf") if step == 1 else 1.0)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(bits(param))
    assert runs[0] == runs[1]


def test_policies_skip_and_clip():
    params = make_params()
    optimizer = Tiger(params)
    optimizer.set_grad_policy(max_norm=1.0, skip_nonfinite=True)
    give_grads(params, 0)
    params[2].grad[0] = float("nan")
    before = snapshot(optimizer)["params"]
    optimizer.step()
    assert snapshot(optimizer)["params"] == before and int(optimizer.grad_policy.skipped_steps) == 1
    give_grads(params, 1)
    optimizer.step()
    assert snapshot(optimizer)["params"] != before


def test_sparse_gradients_are_refused_before_anything_is_written():
    params = make_params(((4, 3), (5,)))
    give_grads(params, 0)
    params[0].grad = params[0].grad.to_sparse()
    optimizer = Tiger(params)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_bad_state_is_refused_by_name_before_anything_is_written():
    params = make_params()
    optimizer = Tiger([("first", params[2]), ("second", params[4])])
    give_grads(params, 0)
    optimizer.step()
    optimizer.state[params[4]]["exp_avg"] = torch.zeros(2)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"parameter 'second': exp_avg has shape \[2\], expected its parameter's shape"
    ):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lr": float("nan")}, ValueError, "group 0: .*lr is NaN"),
        ({"betas": (float("nan"), 0.9)}, ValueError, r"group 0: .*betas\[0\] is NaN"),
        ({"betas": (0.9, 0.9, 0.9)}, ValueError, "betas of group 0 has 3 values, expected 2"),
        (
            {"betas": (1.0, 0.9)},
            ZeroDivisionError,
            r"group 0: .*at step 1 a division by zero in `1 / \(1 - betas\[0\] \*\* step\) / \(1 \+ total\)` \(line \d+\), with lr = 0.1, betas\[0\] = 1",
        ),
    ],
)
def test_options_that_no_step_can_be_made_of_are_refused_at_the_step(changes, error, words):
    params = make_params()
    optimizer = Everything(params)
    give_grads(params, 0)
    optimizer.param_groups[0].update(changes)
    before = snapshot(optimizer)
    with pytest.raises(error, match=words):
        optimizer.step()
    assert snapshot(optimizer) == before


SCALE = 2.0


def test_numbers_from_outside_are_read_again():
    global SCALE

    @rule(backend="interpreted")
    def Scaled(param, grad, *, lr=0.1):
        return param - lr * SCALE * grad

    def stepped():
        param = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        param.grad = torch.ones(3, dtype=torch.float64)
        Scaled([param], lr=1.0).step()
        return param[0].item()

    assert stepped() == -2.0
    SCALE = 3.0
    try:
        assert stepped() == -3.0
    finally:
        SCALE = 2.0
    assert stepped() == -2.0


def test_small_steps_take_the_fast_path():
    params = make_params(((5,), (7,)))
    optimizer = Tiger(params)
    for step in range(6):
        give_grads(params, step)
        optimizer.step()
    assert optimizer._plan.steps_as_before > 0


def test_a_rule_without_state_needs_no_parentheses():
    @rule
    def Bare(param, grad, *, lr=0.1):
        return param - lr * grad

    assert issubclass(Bare, torch.optim.Optimizer)


def test_compiled_steps_have_the_bits_of_eager_ones_and_two_graphs_serve_six_rates():
    params = make_params(((5,), (3, 4)))
    twins, graphs = twin(params), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    eager, traced = Everything(params), Everything(twins)
    compiled = torch.compile(traced.step, backend=counting, fullgraph=True)
    for step in range(6):
        for optimizer in (eager, traced):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        give_grads(params, step), give_grads(twins, step)
        eager.step()
        compiled()
    assert [bits(p) for p in params] == [bits(p) for p in twins]
    assert len(graphs) <= 2


def test_opcheck():
    from optim_ext._rules.definition import arranged

    Tiger(make_params())
    name = Tiger._definition.variant((...,) * 3).name
    torch.library.opcheck(
        torch.ops.optim_ext.rule_.default,
        ([torch.ones(3)], [torch.ones(3)], *arranged([[torch.zeros(3)]], [], list), []),
        {"rule": name, "hypers": [torch.tensor(value, dtype=torch.float64) for value in (1.0, 0.1, 0.9, 0.0)]},
    )


def test_a_rule_that_this_process_does_not_know_is_refused():
    from optim_ext._rules.definition import arranged

    with pytest.raises(ValueError, match="this process knows no rule abc; make an optimizer of its class first"):
        torch.ops.optim_ext.rule_([torch.ones(3)], [torch.ones(3)], *arranged([], [], list), [], rule="abc", hypers=[])


def test_a_difference_from_the_function_refuses_the_class(monkeypatch):
    """The check that caught a translator that took 2 ** -step for 1."""
    from optim_ext._rules import definition as module

    true = module.code_of

    def false(*arguments):
        code = true(*arguments)
        return {
            **code,
            "tile": [(op if op != "subtract_product" else "multiply_add", *rest) for op, *rest in code["tile"]],
        }

    monkeypatch.setattr(module, "code_of", false)

    @rule(backend="interpreted")
    def Wrong(param, grad, *, lr=0.1):
        return param - lr * grad

    with pytest.raises(
        optim_ext.RuleError, match="differs from the function at step 1, element 1 of param: .* against"
    ):
        Wrong(make_params())


@pytest.mark.parametrize(
    "mode", [FakeTensorMode, lambda: torch.device("meta"), torch.inference_mode], ids=["fake", "meta", "inference"]
)
def test_a_class_may_be_used_first_in_any_mode(mode):
    """What a rule was translated to is compared with the function in numbers, whatever tensors are there."""

    @rule("m", backend="interpreted")
    def First(param, grad, m, *, step, lr=0.1):
        m = 0.9 * m + grad / step
        return param - lr * m, m

    with mode():
        param = torch.nn.Parameter(torch.empty(3))
        param.grad = torch.empty(3)
        optimizer = First([param])
        for _ in range(2):
            optimizer.step()
    params = make_params()
    give_grads(params, 0)
    expected = [param.detach() - 0.1 * param.grad for param in params]
    First(params).step()
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value)


def test_source_is_shown():
    text = Tiger.source("cpu")
    assert "struct Rule" in text and "beta" in text and "OPTIM_EXT_EXPORT_RULE" in text
    with pytest.raises(ValueError, match="kind is 'gpu'"):
        Tiger.source("gpu")
    with pytest.raises(TypeError, match="Tiger has no option 'x'"):
        Tiger.source(x=True)
