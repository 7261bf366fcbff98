"""torch.compile of a step: one graph, the same numbers as eager, and no recompilation under a schedule."""

import pytest
import torch
from compiling import compiled
from lockstep import assert_close, copy_of, give_grads, make_params, twin
from specs import TENSOR_LRS, Tolerance
from torch._dynamo.utils import counters

import optim_ext

SHAPES = ((3, 4), (5,), ())


@pytest.fixture(autouse=True)
def fresh():
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        yield


def compare(spec, options, steps=4, backend="aot_eager", dtype=torch.float64):
    torchs = spec.name == "SGD" and options.get("momentum") and options.get("dampening")
    tolerance = spec.tolerances[dtype] if torchs else Tolerance(0, 0)
    # torch 2.13's own compiled step loses the buffer of a 0-dim parameter when it is functionalised.
    params = make_params(SHAPES[:2] if torchs else SHAPES, dtype)
    others = twin(params)
    eager, traced = spec.ours(others, **copy_of(options)), spec.ours(params, **copy_of(options))
    step, counter = compiled(traced, backend)
    for i in range(steps):
        give_grads(params, i)
        give_grads(others, i)
        eager.step()
        step()
    for mine, other in zip(params, others, strict=True):
        assert_close(mine, other, tolerance)
        assert traced.state.get(mine, {}).keys() == eager.state.get(other, {}).keys()
        for key, value in eager.state.get(other, {}).items():
            found = traced.state[mine][key]  # numbers are where torch.compile moved them
            assert_close(found.to(value.device) if key in spec.numbers else found, value, tolerance, key)
    return counter


def ops_in(graph):
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


def test_equals_eager_in_one_graph(variant):
    counter = compare(variant.spec, variant.options)
    # The first step makes the state; from the second on the graph is the last one.
    assert counter.frame_count <= 2
    if variant.spec.name == "SGD" and variant.options.get("momentum") and variant.options.get("dampening"):
        return  # torch's own code
    assert any(f"optim_ext.{variant.spec.op}" in "".join(ops_in(graph)) for graph in counter.graphs)


def test_groups(spec):
    """State of the first one stays what its part of the graph steps when that of the next one is gathered."""
    finals = []
    for is_compiled in (False, True):
        params = make_params(SHAPES[:2])
        optimizer = spec.ours([{"params": [params[0]]}, {"params": [params[1]]}], **copy_of(spec.typical))
        step = compiled(optimizer)[0] if is_compiled else optimizer.step
        for i in range(3):
            give_grads(params, i)
            step()
        entries = [optimizer.state[p] for p in params]
        finals.append([*params, *(entry[key] for entry in entries for key in sorted(entry))])
    for mine, other in zip(*finals, strict=True):
        assert torch.equal(torch.as_tensor(mine).cpu(), torch.as_tensor(other).cpu())


@pytest.mark.about_the_cpu("for Triton, by which inductor compiles for a GPU, the double of its driver is too little")
def test_inductor(spec):
    compare(spec, spec.typical, steps=3, backend="inductor", dtype=torch.float32)


def set_lr(optimizer, value):
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(value)
    else:
        group["lr"] = value


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{}, TENSOR_LRS[0]], ids=["number", "tensor"])
def test_a_schedule_recompiles_nothing(spec, options, backend):
    """A learning rate in a tensor is compiled once, a number once more when it is first seen to change; 100 more steps
    under 100 more learning rates run what is there."""
    # Rprop's step does not use its learning rate: a number that has become a symbol and does not reach the graph makes
    # Dynamo start its one recompilation over, after it called this backend (TensorifyScalarRestartAnalysis).
    expected = 1 if options else 3 if (spec.name, backend) == ("Rprop", "aot_eager") else 2
    options = {**spec.typical, **options}
    params = make_params(SHAPES)
    others = twin(params)
    optimizer, eager = spec.ours(params, **copy_of(options)), spec.ours(others, **copy_of(options))
    give_grads(params, 0)
    give_grads(others, 0)
    step, counter = compiled(optimizer, backend)
    for i in range(102):
        for one, run in ((eager, eager.step), (optimizer, step)):
            set_lr(one, 0.1 / (i + 1))
            run()
        if i > 1:
            assert counter.frame_count == expected
    assert sum(counters["graph_break"].values()) == 0
    assert all(torch.equal(mine, other) for mine, other in zip(params, others, strict=True))


def test_a_schedule_of_betas_recompiles_nothing():
    params = make_params(SHAPES)
    optimizer = optim_ext.AdamW(params)
    give_grads(params, 0)
    step, counter = compiled(optimizer)
    for i in range(20):
        optimizer.param_groups[0]["betas"] = (0.95 - 0.005 * i, 0.999 - 0.001 * i)
        step()
    assert counter.frame_count == 2


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_with_a_scheduler(spec, lr):
    """torch's scheduler wraps step(); whatever that does to the graph, the numbers are eager's."""
    params = make_params(SHAPES, torch.float64)
    others = twin(params)
    optimizers = [spec.ours(own, **copy_of({**spec.typical, "lr": lr})) for own in (params, others)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]
    step = torch.compile(optimizers[0].step, backend="eager")
    for i in range(5):
        give_grads(params, i)
        give_grads(others, i)
        step()
        optimizers[1].step()
        for scheduler in schedulers:
            scheduler.step()
    assert all(torch.equal(mine, other) for mine, other in zip(params, others, strict=True))


def test_a_whole_training_step():
    """Forward, backward by compiled autograd's rules, and the step: as a user compiles it."""
    finals = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        optimizer = optim_ext.AdamW(model.parameters(), lr=0.05)

        def train(x, y, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = train if backend is None else torch.compile(train, backend=backend)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
            run(x, x.sum(1, keepdim=True))
        finals.append([p.detach().clone() for p in model.parameters()])
    for mine, other in zip(*finals, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_eager_after_compiled_and_back(spec):
    """State made by one serves the other."""
    params = make_params(SHAPES, torch.float64)
    others = twin(params)
    optimizer, reference = spec.ours(params, **spec.typical), spec.ours(others, **spec.typical)
    step, _ = compiled(optimizer, "eager")
    for i, run in enumerate((optimizer.step, step, optimizer.step, step, optimizer.step)):
        give_grads(params, i)
        give_grads(others, i)
        run()
        reference.step()
    assert all(torch.equal(mine, other) for mine, other in zip(params, others, strict=True))


@pytest.mark.only_for(lambda spec: spec.differentiable, reason="torch's class does not have the flag")
def test_differentiable_takes_torchs_code(spec):
    results: list[object] = []
    for cls in (spec.torch, spec.ours):
        leaf = torch.arange(1.0, 4.0, dtype=torch.float64, requires_grad=True)
        grad = torch.ones(3, dtype=torch.float64, requires_grad=True)
        param = leaf.clone()
        param.grad = grad * 1.0
        optimizer = cls([param], **{**spec.typical, "differentiable": True})
        torch.compile(optimizer.step, backend="eager")()
        try:
            param.sum().backward()
        except RuntimeError as error:  # ASGD writes what backward needs, and torch 2.12 has no backward of fma
            results.append(str(error))
        else:
            results.append(None if grad.grad is None else grad.grad.tolist())
    assert results[0] == results[1]
    assert spec.name in ("SGD", "ASGD") or isinstance(results[0], list) or "no autograd formula" in str(results[0])


def test_scaler_of_a_fused_optimizer():
    """What GradScaler leaves on it counts in a compiled step too."""
    params = make_params(SHAPES)
    others = twin(params)
    ours, eager = (optim_ext.Adam(own, lr=0.1, fused=True) for own in (params, others))
    step, _ = compiled(ours)
    for i, found in enumerate((0.0, 1.0, 0.0)):
        for optimizer, own, run in ((ours, params, step), (eager, others, eager.step)):
            give_grads(own, i)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)
            before = [p.detach().clone() for p in own]
            run()
            assert all(torch.equal(p, b) for p, b in zip(own, before, strict=True)) == bool(found)
    for mine, other in zip(params, others, strict=True):
        assert torch.equal(mine, other) and torch.equal(mine.grad, other.grad)
        assert ours.state[mine]["step"] == eager.state[other]["step"] == 2
