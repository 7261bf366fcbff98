"""Rules written in Python on CUDA tensors: compiled by NVRTC, loaded, launched by the same loop as the built-in rules."""

import time

import pytest
import torch
from device_trace import device_trace
from examples.test_rules import load
from lockstep import bits, give_grads, make_params
from user_rules.twins import TWINS

import optim_ext
from optim_ext._rules import cuda
from optim_ext._rules.compiler import CannotCompile
from optim_ext.math import norm, sign

SHAPES = [(257,), (), (0,), (33, 40), (5,)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("one_cache_of_rules")


def tiger(backend="compiled"):
    @optim_ext.rule("exp_avg", backend=backend)
    def Tiger(param, grad, exp_avg, *, lr=1e-3, beta=0.965, weight_decay=0.01):
        exp_avg = beta * exp_avg + (1 - beta) * grad
        return param * (1 - lr * weight_decay) - lr * sign(exp_avg), exp_avg

    return Tiger


def schedule_free(backend="compiled"):
    @optim_ext.rule({"z": "param"}, scalars={"weight_sum": 0.0}, backend=backend)
    def ScheduleFree(param, grad, z, weight_sum, *, step, lr=0.1, beta=0.9):
        weight_sum = weight_sum + lr**2
        c = lr**2 / weight_sum
        z = z - lr * grad
        return param + c * (z - param) + (1 - beta) * (step - 1) * 1e-3 * grad, z, weight_sum

    return ScheduleFree


def stepped(
    made, device, dtype=torch.float32, steps=3, shapes=SHAPES, before_step=lambda optimizer, step: None, **options
):
    params = make_params(shapes, dtype, device=device)
    optimizer = made(params, **options)
    for step in range(steps):
        give_grads(params, step)
        before_step(optimizer, step)
        optimizer.step()
    entries = [optimizer.state[p] for p in params]
    states = [{key: bits(value.cpu()) for key, value in entry.items()} for entry in entries]
    return [bits(p) for p in params], states, optimizer


def same_bits(made, device, **how):
    """As the CPU interprets it. Gives the optimizer on the device."""
    values, states, optimizer = stepped(made("compiled"), device, **how)
    others, their_states, _ = stepped(made("interpreted"), torch.device("cpu"), **how)
    assert values == others
    assert states == their_states
    return optimizer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("made", [tiger, schedule_free])
def test_a_rule_has_the_bits_of_the_cpu(made, dtype, device):
    optimizer = same_bits(made, device, dtype=dtype)
    (report,) = optim_ext.explain(optimizer)
    assert str(report) == "group 0: native (one call of optim_ext::rule_ per device, compiled for CUDA)"


@pytest.mark.parametrize("name", ["adan", "ademamix"])
def test_an_example_has_the_bits_of_the_cpu(name, device, monkeypatch):
    def made(backend):
        monkeypatch.setenv("OPTIM_EXT_RULES", backend)
        return load(name)

    same_bits(made, device)


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_a_rule_written_again_has_the_bits_of_the_built_in_one(name, device):
    of = TWINS[name]
    again = optim_ext.rule(of.made._definition.states, scalars=of.made._definition.scalars, backend="compiled")(
        of.made.reference
    )
    built_in = getattr(optim_ext, name)
    assert stepped(again, device, **of.adapted({}))[0] == stepped(built_in, device)[0]


def test_rows_that_sparse_gradients_hold_have_the_bits_of_the_cpu(device):
    def give_rows(optimizer, step):
        for p in optimizer.param_groups[0]["params"]:
            if p.dim() > 0 and p.numel() > 0:
                held = torch.tensor([[p.shape[0] - 1, step, p.shape[0] - 1]], device=p.device)
                p.grad = torch.sparse_coo_tensor(held, p.grad[:3], p.shape)

    optimizer = same_bits(tiger, device, before_step=give_rows, lazy_rows=True)
    (report,) = optim_ext.explain(optimizer)
    assert report.native


def test_everything_a_step_may_be_told_stays_on_the_device(device):
    """Clipping and skipping, a rate in a tensor, counters and scalars there."""

    def told(optimizer, step):
        if step == 0:
            optimizer.set_grad_policy(max_norm=1.0, skip_nonfinite=True)
        if step == 1:
            optimizer.param_groups[0]["params"][0].grad[3] = float("nan")

    def rate(where):
        return torch.tensor(0.05, dtype=torch.float64, device=where)

    values, states, optimizer = stepped(
        schedule_free(), device, before_step=told, lr=rate(device), capturable=True, steps=4
    )
    others, their_states, _ = stepped(
        schedule_free("interpreted"), torch.device("cpu"), before_step=told, lr=rate("cpu"), steps=4
    )
    assert values == others and states == their_states
    assert int(optimizer.skipped_steps) == 1
    assert all(value.device.type == "cuda" for entry in optimizer.state.values() for value in entry.values())


def test_an_average_follows(device):
    def averaged(backend, where):
        model = torch.nn.Linear(40, 30).to(where)
        with torch.no_grad():
            for p, value in zip(model.parameters(), make_params([(30, 40), (30,)], device="cpu"), strict=True):
                p.copy_(value)
        optimizer = tiger(backend)(model.parameters())
        average = optim_ext.swa_utils.AveragedModel(model, multi_avg_fn=optim_ext.swa_utils.get_ema_multi_avg_fn(0.9))
        optimizer.average_into(average, model)
        for step in range(3):
            give_grads(model.parameters(), step)
            optimizer.step()
        return [bits(p) for p in (*model.parameters(), *average.module.parameters())]

    assert averaged("compiled", device) == averaged("interpreted", torch.device("cpu"))


def test_a_scaler_unscales_in_the_step(device):
    def scaled(backend, where):
        params = make_params(SHAPES, device=where)
        optimizer = tiger(backend)(params, fused=True)
        scaler = torch.amp.GradScaler(where.type, init_scale=4.0)
        for step in range(3):
            scaler.scale(torch.zeros((), device=where))
            give_grads(params, step)
            if step == 1:
                params[0].grad[2] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        return [bits(p) for p in params]

    assert scaled("compiled", device) == scaled("interpreted", torch.device("cpu"))


def test_a_step_is_a_launch_and_one_more_for_scalars_and_counters(device):
    for made, options, kernels in (
        (tiger(), {}, 1),
        (schedule_free(), {}, 2),
        (schedule_free(), {"capturable": True}, 3),
    ):
        _, _, optimizer = stepped(made, device, **options)
        trace = device_trace(optimizer.step)
        assert len(trace.kernels) == kernels and all("optim_ext" in name for name in trace.kernels), trace
        assert len(trace.copies) == 0, trace


def test_a_graph_replays_steps(device):
    made, params = tiger(), make_params(SHAPES, device=device)
    optimizer = made(params, capturable=True)
    give_grads(params, 0)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    graph.replay()
    twins = make_params(SHAPES, device="cpu")
    other = tiger("interpreted")(twins)
    give_grads(twins, 0)
    for _ in range(3):
        other.step()
    assert [bits(p) for p in params] == [bits(p) for p in twins]


def test_a_compiled_step_has_the_bits_of_an_eager_one(device):
    def trained(compiles):
        params = make_params(SHAPES, device=device)
        optimizer = tiger()(params)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiles else optimizer.step
        for count in range(3):
            give_grads(params, count)
            step()
        return [bits(p) for p in params]

    assert trained(compiles=True) == trained(compiles=False)


def test_the_function_steps_until_its_kernels_are_there(device, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")
    params = make_params(SHAPES, device=device)
    optimizer = tiger("auto")(params)
    assert "its kernels for cuda:0 are not compiled yet" in str(optim_ext.explain(optimizer)[0])
    end = time.monotonic() + 120
    step = 0
    while "native" not in str(optim_ext.explain(optimizer)[0]) and time.monotonic() < end:
        give_grads(params, step := step + 1)
        optimizer.step()
        time.sleep(0.05)
    assert "native" in str(optim_ext.explain(optimizer)[0])


def test_what_torchs_operations_cannot_do_is_waited_for(device, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")
    params = make_params(SHAPES, device=device)
    optimizer = tiger("auto")(params, max_norm=1.0, weight_decay=0.02)
    give_grads(params, 0)
    optimizer.step()
    assert str(optim_ext.explain(optimizer)[0]).startswith("group 0: native")


def test_why_torchs_operations_are_taken_is_said(device, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")
    params = make_params(SHAPES, device=device)
    interpreted = optim_ext.explain(tiger("interpreted")(params))[0]
    assert 'it is on cuda:0, and the rule has backend="interpreted", which is for the CPU' in str(interpreted)

    @optim_ext.rule(backend="auto")
    def OfNorms(param, grad, *, lr=0.1):
        return param - lr / (1 + norm(grad)) * grad

    optimizer = OfNorms(params)
    give_grads(params, 0)
    optimizer.step()
    assert "it is on cuda:0, and rules that take norms have kernels for the CPU" in str(optim_ext.explain(optimizer)[0])

    @optim_ext.rule(backend="auto")
    def Many(param, grad, *, lr=0.1, a=0.1, b=0.2, c=0.3, d=0.4):
        return param - lr * (a + b + c + d) * grad

    tensors = {key: torch.tensor(0.1, device=device) for key in ("lr", "a", "b", "c", "d")}
    many = Many(params, **tensors)
    Many.compile("cuda")
    assert "5 of its options are tensors there, of which kernels take 4" in str(optim_ext.explain(many)[0])
    with pytest.raises(CannotCompile, match="rules that take norms have kernels for the CPU"):
        OfNorms.compile("cuda")


def test_a_rule_that_fails_to_compile_is_its_function(device, monkeypatch):
    monkeypatch.setattr(cuda, "include_paths", lambda: ["/nowhere"])
    monkeypatch.setattr(cuda, "FLAGS", (*cuda.FLAGS, "-DTHAT_NOTHING_WAS_COMPILED_WITH"))
    with pytest.raises(CannotCompile, match=r"(?s)fails with status 1:.*one_rule\.h"):
        tiger()(make_params(SHAPES, device=device))
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")
    monkeypatch.setattr(cuda, "compile_in_background", lambda what, work: work())
    values, _, optimizer = stepped(tiger("auto"), device)
    assert "fails with status 1" in str(optim_ext.explain(optimizer)[0])
    assert values == stepped(tiger("torch"), device)[0]


def test_kernels_that_differ_are_refused(device, monkeypatch):
    """Those of another rule, as they would come out of a cache that somebody has mixed up."""
    true = cuda.cuda_unit_of
    monkeypatch.setattr(cuda, "cuda_unit_of", lambda *given: true(*given).replace("sign(", "magnitude("))
    with pytest.raises(
        optim_ext.RuleError, match="compiled for cuda:0 it differs from interpreted in torch.float32 at step 1"
    ):
        tiger()(make_params(SHAPES, device=device))


def test_only_what_a_step_needs_is_compiled(device, tmp_path, monkeypatch):
    """And what was loaded stays when more is loaded."""
    monkeypatch.setenv("OPTIM_EXT_CACHE", str(tmp_path / "cache"))
    made = tiger()
    for count, dtype in enumerate((torch.bfloat16, torch.float32, torch.float64)):
        params = make_params(SHAPES, dtype, device=device)
        optimizer = made(params)
        give_grads(params, 0)
        optimizer.step()
        assert len(list((tmp_path / "cache").glob("*.rule"))) == (2 if count == 2 else 1)
    model = torch.nn.ParameterList(make_params(SHAPES, torch.bfloat16, device=device))
    optimizer, averaged = made(model), optim_ext.swa_utils.AveragedModel(model)
    optimizer.average_into(averaged, model)
    give_grads(list(model), 0)
    optimizer.step()
    assert len(list((tmp_path / "cache").glob("*.rule"))) == 3
    (kinds,) = made._variant_with({}).on_gpus.values()
    assert sorted(kind.name for kind in kinds) == [
        "optim_ext_averaging_sweep_float",
        "optim_ext_sweep_double",
        "optim_ext_sweep_float",
    ]


def test_kernels_are_compiled_ahead_for_an_architecture(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_CACHE", str(tmp_path / "cache"))
    tiger().compile("sm_90")
    assert len(list((tmp_path / "cache").glob("*.rule"))) == 2  # in float and in double
    with pytest.raises(CannotCompile, match="compute capability 7.0 or newer, found sm_61"):
        tiger().compile("sm_61")


@pytest.mark.only_where(torch.cuda.device_count() > 1, reason="there are no two GPUs")
def test_every_gpu_has_kernels_of_its_own(device):
    other = torch.device("cuda", 1)
    params = [*make_params(SHAPES, device=device), *make_params(SHAPES, device=other)]
    twins = make_params(SHAPES, device="cpu")
    for optimizer, its in ((tiger()(params), params), (tiger("interpreted")(twins), twins)):
        for step in range(2):
            give_grads(its[: len(SHAPES)], step)
            give_grads(its[len(SHAPES) :], step)
            optimizer.step()
    assert [bits(p) for p in params] == [bits(p) for p in twins] * 2


def test_an_op_without_kernels_refuses_before_it_writes(device):
    made = tiger("interpreted")
    variant = made._variant_with({})
    param = torch.ones(3, device=device)
    empty = [[] for _ in range(10)]
    with pytest.raises(ValueError, match="this process has no kernels of rule"):
        torch.ops.optim_ext.rule_(
            [param],
            [param.clone()],
            [param.clone()],
            *empty,
            rule=variant.name,
            hypers=[torch.tensor(1.0, dtype=torch.float64) for _ in range(4)],
        )
    assert bits(param) == bits(torch.ones(3))
