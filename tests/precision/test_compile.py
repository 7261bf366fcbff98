"""torch.compile of a step with parameters and state that are kept in other ways: one graph, with the bits of eager steps."""

import copy

import pytest
import torch
from compiling import compiled
from device import ON_CPU
from kept import MUON, TAKING, WAYS, everything, give_grads, make, name_of, same
from lockstep import random
from torch._dynamo.utils import counters

import optim_ext as optim
from optim_ext.swa_utils import AveragedModel

# A matrix large enough for blocks, and a vector, which has none: two ways in one group.
SHAPES = ((64, 100), (7,), (17, 33))
ADAMW = next(spec for spec in TAKING if spec.name == "AdamW")

# Each kind of master, and of state, with every class; every pair of them where state has different forms.
SOME = [WAYS[0], WAYS[7], WAYS[10], WAYS[15]]
PAIRS = [(spec, way) for spec in TAKING for way in WAYS if way in SOME or spec.name in ("AdamW", "Adafactor", "Muon")]

by_class = pytest.mark.parametrize("spec", TAKING, ids=lambda spec: spec.name)


@pytest.fixture(params=SOME, ids=name_of)
def way(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        yield


def pair(spec, way, **given):
    """The same optimizer twice."""
    return make(spec, way, shapes=SHAPES, **given), make(spec, way, shapes=SHAPES, **given)


def step_both(eager, traced, step, first, count=1):
    for number in range(first, first + count):
        for _, params in (eager, traced):
            give_grads(params, number)
        eager[0].step()
        step()
    assert same(everything(eager[0]), everything(traced[0]))


@pytest.mark.parametrize(("spec", "each_way"), PAIRS, ids=lambda value: getattr(value, "name", None) or name_of(value))
def test_equals_eager_in_one_graph(spec, each_way):
    eager, traced = pair(spec, each_way)
    step, counter = compiled(traced[0])
    step_both(eager, traced, step, 0, 4)
    assert counter.frame_count == 1
    assert f"optim_ext.{spec.op}" in str(counter.graphs[0].graph)
    assert [sorted(entry) for entry in eager[0].state.values()] == [sorted(e) for e in traced[0].state.values()]


@pytest.mark.about_the_cpu("for Triton, by which inductor compiles for a GPU, the double of its driver is too little")
@pytest.mark.parametrize("spec", [ADAMW, MUON], ids=lambda spec: spec.name)
@pytest.mark.parametrize("way", [WAYS[0], WAYS[7], WAYS[14]], ids=name_of)
def test_inductor(spec, way):
    eager, traced = pair(spec, way)
    step_both(eager, traced, compiled(traced[0], "inductor")[0], 0, 3)


def test_a_schedule_and_a_loaded_state_recompile_nothing(way):
    eager, traced = pair(ADAMW, way, options={"lr": torch.tensor(0.1)})
    step, counter = compiled(traced[0], "eager")
    step_both(eager, traced, step, 0, 2)
    saved = copy.deepcopy(eager[0].state_dict())
    for number in range(2, 6):
        for optimizer, _ in (eager, traced):
            optimizer.param_groups[0]["lr"].fill_(0.1 / number)
        step_both(eager, traced, step, number)
    assert counter.frame_count == 1
    for optimizer, _ in (eager, traced):
        optimizer.load_state_dict(copy.deepcopy(saved))
    step_both(eager, traced, step, 2, 2)
    assert counter.frame_count <= 2  # once more if the loaded state has its keys in another order


@by_class
def test_eager_after_compiled_and_back(spec):
    eager, traced = pair(spec, {"param_precision": "remainder", "state_precision": "q8"})
    step, _ = compiled(traced[0], "eager")
    for number, run in enumerate((traced[0].step, step, traced[0].step, step, traced[0].step)):
        step_both(eager, traced, run, number)


def test_options_that_change_are_compiled_anew():
    """Also back to what torch keeps: the state is brought into the form that is asked for."""
    eager, traced = pair(ADAMW, {})
    step, _ = compiled(traced[0], "eager")
    changes: list[dict[str, object]] = [
        {},
        {"param_precision": "remainder", "state_precision": "q8"},
        {"param_precision": "master"},
        {"param_precision": "native", "state_precision": "native"},
    ]
    with torch._dynamo.config.patch(recompile_limit=8):
        for number, change in enumerate(changes):
            for optimizer, _ in (eager, traced):
                optimizer.param_groups[0].update(change)
            step_both(eager, traced, step, 2 * number, 2)


def test_a_number_among_the_options_that_changes_is_compiled_anew():
    """A compiler takes a number that it has seen to change for any number."""
    eager, traced = pair(ADAMW, {"state_precision": "q8"})
    step, _ = compiled(traced[0], "eager")
    with torch._dynamo.config.patch(recompile_limit=8):
        for number, least in enumerate((100, 10_000, 100, 5000, 200)):
            for optimizer, _ in (eager, traced):
                optimizer.param_groups[0]["min_q8_size"] = least
            step_both(eager, traced, step, number)
            assert ("exp_avg::q8" in traced[0].state[traced[1][0]]) == (least < 6400)


def test_a_step_that_a_scaler_skips_draws_nothing(way):
    eager, traced = pair(ADAMW, way, options={"fused": True})
    step, _ = compiled(traced[0])
    device = eager[1][0].device
    for number, found in enumerate((0.0, 1.0, 0.0)):
        for optimizer, _ in (eager, traced):
            optimizer.grad_scale = torch.tensor(8.0, device=device)
            optimizer.found_inf = torch.tensor(found, device=device)
        before = everything(traced[0])
        step_both(eager, traced, step, number)
        if found:
            assert same(before, everything(traced[0]))


def test_a_policy_and_an_average_of_masters_go_with_it(way):
    finals = []
    for is_compiled in (False, True):
        optimizer, params = make(ADAMW, way, shapes=SHAPES)
        model = torch.nn.ParameterList(params)
        averaged = AveragedModel(model, dtype=torch.float32)
        optimizer.average_into(averaged, model, masters=True)
        optimizer.set_grad_policy(max_norm=0.5)
        step = torch.compile(optimizer.step, backend="aot_eager") if is_compiled else optimizer.step
        for number in range(3):
            give_grads(params, number)
            step()
        finals.append([*everything(optimizer), *(p.detach().clone() for p in averaged.parameters())])
    assert same(*finals)


def test_parameters_without_gradients_and_of_other_dtypes():
    finals = []
    for is_compiled in (False, True):
        dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
        params = [torch.nn.Parameter(random((64, 100), dtype, i)) for i, dtype in enumerate(dtypes)]
        optimizer = optim.AdamW(params, param_precision="auto", state_precision={"exp_avg": "q8"})
        step = compiled(optimizer, "eager")[0] if is_compiled else optimizer.step
        for number in range(3):
            give_grads(params, number)
            params[3].grad = None
            step()
        assert len(optimizer.state) == 3
        finals.append(everything(optimizer))
    assert same(*finals)


def test_a_rule_written_in_python():
    @optim.rule(("m",), backend="interpreted" if ON_CPU else "compiled")
    def Momentum(param, grad, m, *, lr=1e-2, beta=0.9):
        m = beta * m + grad
        return param - lr * m, m

    finals = []
    for is_compiled in (False, True):
        params = [torch.nn.Parameter(random(shape, torch.bfloat16, i)) for i, shape in enumerate(SHAPES)]
        optimizer = Momentum(params, param_precision="remainder", state_precision="q8")
        step, counter = compiled(optimizer) if is_compiled else (optimizer.step, None)
        for number in range(3):
            give_grads(params, number)
            step()
        assert counter is None or counter.frame_count == 1
        finals.append(everything(optimizer))
    assert same(*finals)


def test_dampened_momentum_is_stepped_eagerly():
    """Compiled, it is torch's code, which knows nothing of what lies beside."""
    spec = next(spec for spec in TAKING if spec.name == "SGD")
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    eager, traced = pair(spec, {"param_precision": "remainder"}, options=options)
    step_both(eager, traced, torch.compile(traced[0].step, backend="eager"), 0, 3)
    assert 0 < counters["frames"]["total"] < 10, "the functions of an eager step were compiled one by one"


def test_what_takes_torchs_code_is_refused():
    """As by an eager step, before anything is written."""
    optimizer, params = make(ADAMW, {"param_precision": "master"}, options={"differentiable": True}, shapes=SHAPES)
    give_grads(params, 0)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match="needs a native step, but torch's own code would run"):
        torch.compile(optimizer.step, backend="eager")()
    assert same(before, everything(optimizer))
