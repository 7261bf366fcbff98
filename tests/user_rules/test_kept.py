"""Parameters and state of rules that are kept in other ways than torch keeps them, and sparse gradients of rules."""

import pytest
import torch
from kept import WAYS, everything, give_grads, name_of, same, train, value_of
from kept import make as make_built_in
from lockstep import bits, copy_of, make_params, random
from user_rules.test_twins import TYPICAL
from user_rules.twins import TWINS, Adam

import optim_ext
from optim_ext._tables import TABLES
from optim_ext.checkpoints import to_torch_state_dict
from optim_ext.math import maximum, norm, sqrt
from optim_ext.swa_utils import AveragedModel

pytestmark = pytest.mark.about_the_cpu("interpreted rules take param_precision and state_precision there only")

by_case = pytest.mark.parametrize("twin_case", TYPICAL, ids=[case.spec.name for case in TYPICAL])
by_way = pytest.mark.parametrize("way", WAYS, ids=name_of)


def pair(case, way, dtype=torch.bfloat16):
    """The built-in optimizer and what was written again, over equal parameters kept alike."""
    ours, params = make_built_in(case.spec, way, case.options, dtype=dtype)
    of, twins = TWINS[case.spec.name], [torch.nn.Parameter(p.detach().clone()) for p in params]
    return (ours, params), (of.made(twins, **{**copy_of(case.options), **of.adapted(case.options)}, **way), twins)


def assert_same(ours, written):
    (optimizer, params), (other, twins) = ours, written
    for p, q in zip(params, twins, strict=True):
        assert bits(p) == bits(q)
        mine, its = optimizer.state.get(p, {}), other.state.get(q, {})
        for key in mine.keys() & its.keys() - {"step"}:
            assert bits(mine[key]) == bits(its[key]), key


@by_way
@by_case
def test_what_is_kept_has_the_bits_of_the_built_in_rule(twin_case, way):
    ours, written = pair(twin_case, way)
    for optimizer, params in (ours, written):
        train(optimizer, params, 4)
    assert_same(ours, written)
    companions = [key for key in ours[0].state[ours[1][-1]] if "::" in key or key in ("master_param", "rounding_key")]
    assert set(companions) <= written[0].state[written[1][-1]].keys()


@by_case
def test_clipping_averages_and_state_dicts_go_with_it(twin_case):
    way = {"param_precision": "remainder", "state_precision": "q8"}
    results = []
    for optimizer, params in pair(twin_case, way):
        model = torch.nn.ParameterList(params)
        averaged = AveragedModel(model)
        optimizer.average_into(averaged, model, masters=True)
        optimizer.set_grad_policy(max_norm=0.5, skip_nonfinite=True)
        for step in range(3):
            give_grads(params, step)
            if step == 1:
                params[-1].grad[0] = float("nan")
            optimizer.step()
        results.append((everything(optimizer), [bits(p) for p in averaged.parameters()]))
        assert int(optimizer.skipped_steps) == 1
    # What both classes have: a rule may count steps where the built-in one does not.
    assert results[0][1] == results[1][1]
    assert same(*([tensor for tensor in found if tensor.numel() > 8] for found, _ in results))


@pytest.mark.parametrize("way", [WAYS[0], WAYS[7], WAYS[13], WAYS[15]], ids=name_of)
def test_compiled_has_the_bits_of_interpreted(way, one_cache_of_rules):
    compiled = optim_ext.rule(("exp_avg", "exp_avg_sq"), backend="compiled")(Adan_like)
    interpreted = optim_ext.rule(("exp_avg", "exp_avg_sq"), backend="interpreted")(Adan_like)
    found = []
    for made in (compiled, interpreted):
        params = [torch.nn.Parameter(random(shape, torch.bfloat16, 1)) for shape in ((64, 100), (17,), (3, 5))]
        optimizer = made(params, **way)
        train(optimizer, params, 4)
        found.append(everything(optimizer))
        (report,) = optim_ext.explain(optimizer)
        assert report.native and ("compiled" in report.reason) is (made is compiled)
    assert same(*found)


def Adan_like(param, grad, exp_avg, exp_avg_sq, *, step, lr=1e-2, beta=0.9, eps=1e-6):
    exp_avg = beta * exp_avg + (1 - beta) * grad
    exp_avg_sq = maximum(beta * exp_avg_sq, grad * grad)
    return param - lr / (1 - beta**step) * exp_avg / (sqrt(exp_avg_sq) + eps), exp_avg, exp_avg_sq


def test_a_state_that_begins_as_the_parameter_begins_as_its_float32_value():
    @optim_ext.rule({"z": "param", "own": lambda p, group: 2 * p}, backend="interpreted")
    def Averaged(param, grad, z, own, *, step, lr=0.1):
        z = z - lr * grad
        return param + (z - param) / step, z, own - 0 * grad

    exact = random((33, 20), torch.float32, 1)
    kept, wide = torch.nn.Parameter(exact.bfloat16()), torch.nn.Parameter(exact.clone())
    kept_optimizer, wide_optimizer = Averaged([kept], param_precision="master"), Averaged([wide])
    kept_optimizer.load_master_params({"0.0": exact})
    for step in range(3):
        kept.grad = random(kept.shape, torch.bfloat16, 50 + step)
        wide.grad = kept.grad.float()
        kept_optimizer.step()
        wide_optimizer.step()
    assert bits(value_of(kept_optimizer, kept)) == bits(wide)
    for key in ("z", "own"):
        assert bits(kept_optimizer.state[kept][key]) == bits(wide_optimizer.state[wide][key]), key


def test_a_rule_of_eight_states_keeps_them_all_in_8_bits():
    names = [f"m{k}" for k in range(8)]
    body = "".join(f"    {name} = 0.{k + 1} * {name} + grad\n" for k, name in enumerate(names))
    text = f"def Eight(param, grad, {', '.join(names)}, *, lr=1e-3):\n{body}"
    text += f"    return param - lr * ({' + '.join(names)}), {', '.join(names)}\n"
    Eight = optim_ext.rule(names, backend="interpreted", source=text)(_function_of(text, "Eight"))
    results = []
    for state in ("q8", "bf16", "fp32"):
        p = torch.nn.Parameter(random((64, 100), torch.bfloat16, 1))
        optimizer = Eight([p], param_precision="master", state_precision=state)
        train(optimizer, [p], 5)
        results.append([optimizer.state[p]["master_param"], optimizer.state[p]])
    assert {f"{name}::q8" for name in names} < results[0][1].keys()
    for value, _ in results[:2]:
        torch.testing.assert_close(value, results[2][0], rtol=0, atol=6e-3)
        assert not torch.equal(value, results[2][0])


def _function_of(text, name):
    made = {}
    exec(text, made)
    return made[name]


def test_what_cannot_be_kept_is_refused_when_it_is_asked_for():
    p = torch.nn.Parameter(torch.ones(64, 100, dtype=torch.bfloat16))

    @optim_ext.rule(("m",), state_dtype=torch.float32)
    def Wide(param, grad, m, *, lr=0.1):
        return param - lr * grad, m + grad

    with pytest.raises(ValueError, match="Wide keeps its state in torch.float32, as its decorator says"):
        Wide([p], param_precision="master")

    @optim_ext.rule(("sum",))
    def Signed(param, grad, sum, *, lr=0.1):
        return param - lr * sum, sum + grad

    Signed([p], param_precision="master")
    for state in ("q8", "bf16"):
        with pytest.raises(ValueError, match="the state 'sum' of Signed becomes negative, .*give it another name"):
            Signed([p], state_precision=state)

    @optim_ext.rule(("m",))
    def OfMemory(param, grad, m, *, lr=0.1):
        return param - lr * grad / (1 + norm(m)), m + grad

    OfMemory([p], state_precision="bf16")
    with pytest.raises(ValueError, match="OfMemory takes the norm of 'm', which cannot be in 8 bits then"):
        OfMemory([p], state_precision="q8")
    with pytest.raises(ValueError, match="state_precision names 'v', which is no state of OfMemory; it has 'm'"):
        OfMemory([p], state_precision={"v": "q8"})
    optimizer = Adam([p])
    with pytest.raises(ValueError, match="param_precision is 'masters'"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "param_precision": "masters"})
    assert len(optimizer.param_groups) == 1


def test_a_norm_of_what_is_in_8_bits_is_refused_by_the_op():
    @optim_ext.rule(("m",), backend="interpreted")
    def OfMemory(param, grad, m, *, lr=0.1):
        return param - lr * grad / (1 + norm(m)), m  # which may be in 8 bits although it stays as it is

    variant = OfMemory._definition.variant((...,))
    lists = [[torch.ones(16, 64, dtype=dtype)] for dtype in (torch.bfloat16, torch.bfloat16, torch.uint8)]
    before = [bits(list_[0]) for list_ in lists]
    with pytest.raises(RuntimeError, match=r"m\[0\] is in 8 bits, and the rule takes its norm"):
        torch.ops.optim_ext.rule_(
            *lists,
            *([] for _ in range(10)),
            rule=variant.name,
            hypers=[torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)],
            companions=[torch.ones(16, 64), torch.ones(16, 1, dtype=torch.uint8)],
        )
    assert [bits(list_[0]) for list_ in lists] == before


def test_state_goes_from_one_way_to_another_and_to_the_plain_twin():
    ((_, _), (optimizer, params)) = pair(TYPICAL[0], WAYS[3])
    train(optimizer, params, 3)
    plain = to_torch_state_dict(optimizer)
    assert not any("::" in key for entry in plain["state"].values() for key in entry)
    other = type(optimizer)([torch.nn.Parameter(p.detach().clone()) for p in params], param_precision="kahan")
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        wide = value_of(optimizer, p)
        torch.testing.assert_close(value_of(other, q), wide, rtol=2**-15, atol=1e-30)


ROWS, WIDTH = 40, 6
ELEMENT_WISE = [case for case in TYPICAL if TABLES[case.spec.op].is_element_wise and not case.options.get("dampening")]


@pytest.mark.parametrize("way", [{}, WAYS[7], WAYS[14]], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("twin_case", ELEMENT_WISE, ids=[case.spec.name for case in ELEMENT_WISE])
def test_rows_that_are_held_have_the_bits_of_the_built_in_rule(twin_case, dtype, way):
    of, way = TWINS[twin_case.spec.name], {**way, "min_q8_size": 1}
    p, q = (torch.nn.Parameter(random((ROWS, WIDTH), dtype, 1)) for _ in range(2))
    ours = twin_case.spec.ours([p], **copy_of(twin_case.options), lazy_rows=True, **way)
    written = of.made([q], **{**copy_of(twin_case.options), **of.adapted(twin_case.options)}, lazy_rows=True, **way)
    for step in range(4):
        for optimizer, param in ((ours, p), (written, q)):
            index = torch.randint(ROWS, (1, 9), generator=torch.Generator().manual_seed(step))
            values = random((9, WIDTH), dtype, 100 + step)
            param.grad = torch.sparse_coo_tensor(index, values, param.shape)
            optimizer.step()
    assert_same((ours, [p]), (written, [q]))


def test_compiled_rows_have_the_bits_of_interpreted_ones(one_cache_of_rules):
    found = []
    for backend in ("compiled", "interpreted"):
        made = optim_ext.rule(("exp_avg", "exp_avg_sq"), backend=backend)(Adan_like)
        params = make_params(((ROWS, WIDTH), (ROWS, 700)))
        optimizer = made(params, lazy_rows=True)
        for step in range(3):
            for p in params:
                index = torch.randint(ROWS, (1, 9), generator=torch.Generator().manual_seed(step))
                p.grad = torch.sparse_coo_tensor(index, random((9, p.shape[1]), p.dtype, step), p.shape)
            optimizer.step()
        found.append(everything(optimizer))
    assert same(*found)
