"""Rules written in Python whose parameters and state are kept in other ways than torch keeps them, on CUDA tensors: the bits
of the CPU, where the same rule is interpreted."""

import copy

import pytest
import torch
from device_trace import device_trace
from examples.test_rules import load
from kept import WAYS, everything, name_of, same
from lockstep import bits, random
from user_rules.twins import TWINS

import optim_ext
from optim_ext._rules import cuda
from optim_ext._rules.compiler import CannotCompile
from optim_ext._rules.self_check import by_op
from optim_ext.math import norm, sign
from optim_ext.swa_utils import AveragedModel, get_ema_multi_avg_fn

# Rows that end with a block of 64 or in the midst of one, or of 8 elements.
SHAPES = ((), (7,), (0,), (3, 5), (17, 33), (64, 100), (20, 1032))
FEW = [
    way
    for way in WAYS
    if tuple(way.values()) in {("master", "native"), ("remainder", "q8"), ("kahan", "bf16"), ("stochastic", "q8")}
]
pytestmark = pytest.mark.usefixtures("one_cache_of_rules")


def tiger(backend):
    @optim_ext.rule("exp_avg", backend=backend)
    def Tiger(param, grad, exp_avg, *, lr=1e-2, beta=0.965, weight_decay=0.01):
        exp_avg = beta * exp_avg + (1 - beta) * grad
        return param * (1 - lr * weight_decay) - lr * sign(exp_avg), exp_avg

    return Tiger


def schedule_free(backend):
    """A state that begins as the parameter, one that a function makes, and a number of each parameter."""

    @optim_ext.rule({"z": "param", "own": lambda p, group: 2 * p}, scalars={"weight_sum": 0.0}, backend=backend)
    def ScheduleFree(param, grad, z, own, weight_sum, *, step, lr=0.1, beta=0.9):
        weight_sum = weight_sum + lr**2
        c = lr**2 / weight_sum
        z = z - lr * grad
        return param + c * (z - param) + (1 - beta) * (step - 1) * 1e-3 * grad, z, own - lr * grad, weight_sum

    return ScheduleFree


def adan(backend):
    return as_written(load("adan"), backend)


def of_eight_states(backend):
    names = [f"m{k}" for k in range(8)]
    body = "".join(f"    {name} = 0.{k + 1} * {name} + grad\n" for k, name in enumerate(names))
    text = f"def Eight(param, grad, {', '.join(names)}, *, lr=1e-3):\n{body}"
    text += f"    return param - lr * ({' + '.join(names)}), {', '.join(names)}\n"
    made = {}
    exec(text, made)
    return optim_ext.rule(names, backend=backend, source=text)(made["Eight"])


def as_written(made, backend):
    of = made._definition
    return optim_ext.rule(of.states, scalars=of.scalars, backend=backend)(made.reference)


RULES = [tiger, schedule_free, adan, of_eight_states]


@pytest.fixture(scope="module", params=RULES, ids=lambda made: made.__name__)
def pair(request):
    """A rule for the GPU, and for the CPU."""
    return request.param("compiled"), request.param("interpreted")


@pytest.fixture(scope="module")
def tigers():
    return tiger("compiled"), tiger("interpreted")


@pytest.fixture(scope="module")
def schedules():
    return schedule_free("compiled"), schedule_free("interpreted")


def in_another_order(value):
    """With gaps, and the last dimensions turned."""
    room = torch.zeros(*(size + 3 for size in value.shape), dtype=value.dtype, device=value.device)
    return room[tuple(slice(size) for size in value.shape)].copy_(value)


def make(made, way, device, shapes=SHAPES, dtype=torch.bfloat16, views=(), **options):
    values = [random(shape, dtype, i, device) for i, shape in enumerate(shapes)]
    params = [torch.nn.Parameter(in_another_order(v) if i in views else v) for i, v in enumerate(values)]
    size = {"min_q8_size": 64} if way else {}
    return made(params, **way, **size, **options), params


def give_grads(params, step, turned=()):
    for i, p in enumerate(params):
        grad = random(p.shape, torch.bfloat16, 1000 * (step + 1) + i, p.device).to(p.dtype)
        p.grad = grad.mT.contiguous().mT if i in turned and grad.dim() > 1 else grad


def assert_same_bits(on_gpu, on_cpu):
    mine, others = ([p for group in o.param_groups for p in group["params"]] for o in (on_gpu, on_cpu))
    for index, (p, other) in enumerate(zip(mine, others, strict=True)):
        entry, its = on_gpu.state[p], on_cpu.state[other]
        assert bits(p) == bits(other), index
        assert entry.keys() == its.keys()
        for key in its:
            assert bits(entry[key]) == bits(its[key]), (index, key)


def compare(pair, way, device, steps=3, before_step=None, turned=(), **how):
    """Gives the optimizer on the device."""
    (on_gpu, params), (on_cpu, others) = (
        make(*each, **how) for each in ((pair[0], way, device), (pair[1], way, "cpu"))
    )
    for step in range(steps):
        for optimizer, its in ((on_gpu, params), (on_cpu, others)):
            give_grads(its, step, turned)
            if before_step is not None:
                before_step(optimizer, its, step)
            optimizer.step()
    assert_same_bits(on_gpu, on_cpu)
    assert all(p.is_cuda for p in params)
    return on_gpu


@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_the_bits_of_the_cpu(pair, way, device):
    optimizer = compare(pair, way, device)
    (report,) = optim_ext.explain(optimizer)
    assert report.native and "compiled for CUDA; " in report.reason


@pytest.mark.parametrize("way", FEW, ids=name_of)
def test_memory_in_any_order(pair, way, device):
    compare(pair, way, device, views=(3, 4, 5), turned=(4, 6))


@pytest.mark.parametrize("param", ["master", "kahan", "auto"])
def test_half_precision_of_the_other_kind(pair, param, device):
    compare(pair, {"param_precision": param, "state_precision": "q8"}, device, dtype=torch.float16)


@pytest.mark.parametrize("state", ["bf16", "q8"])
def test_parameters_in_float32(pair, state, device):
    compare(pair, {"state_precision": state}, device, dtype=torch.float32, views=(5,))


@pytest.mark.parametrize("way", FEW, ids=name_of)
def test_rows_that_sparse_gradients_hold(tigers, way, device):
    """Some of them twice: what is kept of the others is not touched."""
    shapes = ((17, 33), (64, 100), (64, 128))
    before = {}

    def give_rows(optimizer, params, step):
        for p in params:
            held = torch.tensor([[p.shape[0] - 1, step, p.shape[0] - 1]], device=p.device)
            p.grad = torch.sparse_coo_tensor(held, p.grad[:3], p.shape, check_invariants=False)
            if step == 1:
                before[p.device.type, p.shape] = p[5:8].detach().clone()

    optimizer = compare(tigers, way, device, shapes=shapes, before_step=give_rows, lazy_rows=True)
    (report,) = optim_ext.explain(optimizer)
    assert report.native
    for p in optimizer.param_groups[0]["params"]:
        assert bits(p[5:8]) == bits(before["cuda", p.shape])


@pytest.mark.parametrize("way", FEW, ids=name_of)
@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_a_rule_written_again_has_the_bits_of_the_built_in_one(name, way, device):
    of = TWINS[name]
    written, params = make(as_written(of.made, "compiled"), way, device, **of.adapted({}))
    built_in, others = make(getattr(optim_ext, name), way, device)
    for step in range(3):
        for optimizer, its in ((written, params), (built_in, others)):
            give_grads(its, step)
            optimizer.step()
    for p, other in zip(params, others, strict=True):
        assert bits(p) == bits(other)
        mine, its = written.state[p], built_in.state[other]
        assert all(bits(mine[key]) == bits(its[key]) for key in mine.keys() & its.keys() - {"step"})


def test_groups_kept_in_different_ways_and_not_at_all(tigers, device):
    """In one optimizer, and in one of its groups: float32 parameters have nothing beside them."""
    found = []
    for made, where in zip(tigers, (device, torch.device("cpu")), strict=True):
        optimizer, params = make(made, {}, where)
        for way, seed in ((WAYS[7], 10), (WAYS[0], 20)):
            more = [random(shape, torch.bfloat16, seed + i, where) for i, shape in enumerate(SHAPES)]
            more.append(random((33,), torch.float32, seed, where))
            more = [torch.nn.Parameter(value) for value in more]
            optimizer.add_param_group({"params": more, **way})
            params += more
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
        found.append(optimizer)
    assert_same_bits(*found)


@pytest.mark.parametrize("way", FEW, ids=name_of)
def test_numbers_on_the_device(schedules, way, device):
    """A rate in a tensor, counters and scalars there."""

    def begin(optimizer, params, step):
        if step == 0:
            where = params[0].device
            optimizer.param_groups[0]["lr"] = torch.tensor(0.05, dtype=torch.float64, device=where)
            optimizer.param_groups[0]["capturable"] = where.type == "cuda"

    optimizer = compare(schedules, way, device, before_step=begin)
    assert all(value.device.type == "cuda" for entry in optimizer.state.values() for value in entry.values())


@pytest.mark.parametrize("way", FEW, ids=name_of)
def test_scaled_steps_and_one_that_is_skipped_on_the_device(pair, way, device):
    def told(optimizer, params, step):
        optimizer._step_supports_amp_scaling = True
        where = params[0].device
        optimizer.grad_scale = torch.tensor(4.0, device=where)
        optimizer.found_inf = torch.tensor(float(step == 1), device=where)

    compare(pair, way, device, steps=4, before_step=told, shapes=SHAPES[1:])


@pytest.mark.parametrize("way", FEW, ids=name_of)
def test_skipped_steps_draw_nothing(pair, way, device):
    def told(optimizer, params, step):
        if step == 0:
            optimizer.set_grad_policy(max_norm=1.0, skip_nonfinite=True)
        if step == 2:
            params[5].grad[3, 4] = float("nan")

    optimizer = compare(pair, way, device, steps=4, before_step=told)
    keys = [entry["rounding_key"] for entry in optimizer.state.values() if "rounding_key" in entry]
    assert {int(key[1]) for key in keys} <= {3}
    assert int(optimizer.skipped_steps) == 1


@pytest.mark.parametrize("way", FEW, ids=name_of)
def test_a_graph_draws_other_words_at_every_replay(schedules, way, device):
    (on_gpu, params), (on_cpu, others) = (
        make(schedules[0], way, device, capturable=True),
        make(schedules[1], way, "cpu"),
    )
    for p in params:
        p.grad = torch.zeros_like(p)
    graph = None
    for step in range(6):
        give_grads(others, step)
        torch._foreach_copy_([p.grad for p in params], [p.grad for p in others])
        on_cpu.step()
        if graph is None:
            on_gpu.step()
            if step == 2:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    on_gpu.step()
        else:
            graph.replay()
    assert_same_bits(on_gpu, on_cpu)


@pytest.mark.parametrize("way", FEW, ids=name_of)
def test_masters_and_checkpoints_cross_devices(pair, way, device):
    (on_gpu, params), (on_cpu, others) = make(pair[0], way, device), make(pair[1], way, "cpu")
    for step in range(2):
        give_grads(others, step)
        on_cpu.step()
    with torch.no_grad():
        for p, other in zip(params, others, strict=True):
            p.copy_(other)
    on_gpu.load_state_dict(copy.deepcopy(on_cpu.state_dict()))
    for step in range(2, 4):
        for optimizer, its in ((on_gpu, params), (on_cpu, others)):
            give_grads(its, step)
            optimizer.step()
    assert_same_bits(on_gpu, on_cpu)
    masters = dict(on_gpu.master_params())
    assert all(bits(masters[name]) == bits(value) for name, value in on_cpu.master_params())
    back, others = make(pair[1], way, "cpu")
    with torch.no_grad():
        for p, other in zip(params, others, strict=True):
            other.copy_(p)
    back.load_state_dict(copy.deepcopy(on_gpu.state_dict()))
    for optimizer, its in ((on_gpu, params), (back, others)):
        give_grads(its, 4)
        optimizer.step()
    assert_same_bits(on_gpu, back)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("way", FEW, ids=name_of)
def test_an_average_follows(tigers, way, masters, device):
    found = []
    for made, where in zip(tigers, (device, torch.device("cpu")), strict=True):
        model = torch.nn.Linear(100, 64, dtype=torch.bfloat16, device=where)
        with torch.no_grad():
            model.weight.copy_(random((64, 100), torch.bfloat16, 5, where))
            model.bias.copy_(random((64,), torch.bfloat16, 6, where))
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), dtype=torch.float32)
        optimizer = made(model.parameters(), **way)
        optimizer.average_into(average, masters=masters)
        for step in range(4):
            give_grads(list(model.parameters()), step)
            optimizer.step()
        found.append(([bits(p) for p in average.parameters()], everything(optimizer)))
    assert found[0][0] == found[1][0]
    assert same([tensor.cpu() for tensor in found[0][1]], found[1][1])


def test_a_step_is_a_launch_and_one_more_for_scalars_counters_and_draws(tigers, schedules, device):
    for made, way, options, kernels in (
        (tigers[0], WAYS[0], {}, 1),
        (tigers[0], WAYS[6], {}, 2),
        (schedules[0], WAYS[0], {}, 2),
        (schedules[0], WAYS[6], {"capturable": True}, 4),
    ):
        optimizer, params = make(made, way, device, **options)
        for step in range(2):
            give_grads(params, step)
            optimizer.step()
        trace = device_trace(optimizer.step)
        assert len(trace.kernels) == kernels and all("optim_ext" in name for name in trace.kernels), trace
        assert len(trace.copies) == 0, trace


@pytest.mark.parametrize("way", FEW, ids=name_of)
def test_nothing_waits_for_the_device(tigers, way, device, no_sync):
    optimizer, params = make(tigers[0], way, device)
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    give_grads(params, 2)
    with no_sync:
        optimizer.step()


# ---- which kernels there are ----


def test_the_first_step_waits_for_its_kernel(device, tmp_path, monkeypatch):
    """Where torch's operations step other rules meanwhile: these do not know what lies beside."""
    monkeypatch.setenv("OPTIM_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")
    made = tiger("auto")
    optimizer, params = make(made, WAYS[4], device)
    assert optim_ext.explain(optimizer)[0].native
    assert not (tmp_path / "cache").exists()
    others = make(tiger("interpreted"), WAYS[4], "cpu")
    for one, its in ((optimizer, params), others):
        give_grads(its, 0)
        one.step()
    assert_same_bits(optimizer, others[0])
    assert len(list((tmp_path / "cache").glob("*.rule"))) == 1


def test_only_what_steps_need_is_compiled(device, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_CACHE", str(tmp_path / "cache"))
    made, seen = tiger("compiled"), []
    for dtype, way in (
        (torch.bfloat16, {}),  # the plain kernel
        (torch.float32, WAYS[0]),  # beside which nothing lies
        (torch.bfloat16, {"state_precision": "fp32"}),
        (torch.bfloat16, WAYS[0]),
        (torch.float32, {"state_precision": "q8"}),
    ):
        optimizer, params = make(made, way, device, dtype=dtype)
        give_grads(params, 0)
        optimizer.step()
        seen.append(len(list((tmp_path / "cache").glob("*.rule"))))
    assert seen == [1, 1, 1, 2, 2]
    made = tiger("compiled")  # a new class does not know what the other one has loaded
    optimizer, params = make(made, WAYS[7], device)
    give_grads(params, 0)
    optimizer.step()
    assert sorted(kind.name for kind in made._variant_with({}).on_gpus[0]) == ["optim_ext_kept_sweep_float"]


def test_kernels_are_compiled_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_CACHE", str(tmp_path / "cache"))
    tiger("auto").compile("sm_90", param_precision="auto")
    assert len(list((tmp_path / "cache").glob("*.rule"))) == 3  # and those in float and in double
    with pytest.raises(ValueError, match="Tiger: param_precision is 'masters', expected one of"):
        tiger("auto").compile("sm_90", param_precision="masters")


def test_options_of_the_rule_are_compiled_in(device):
    def made(backend):
        @optim_ext.rule("m", backend=backend)
        def Either(param, grad, m, *, lr=1e-2, nesterov=False):
            m = 0.9 * m + grad
            return param - lr * ((grad + 0.9 * m) if nesterov else m), m

        return Either

    classes = made("compiled"), made("interpreted")
    found = [compare(classes, WAYS[7], device, nesterov=nesterov) for nesterov in (False, True)]
    values = [bits(optimizer.param_groups[0]["params"][5]) for optimizer in found]
    assert values[0] != values[1]


# ---- what is refused, before anything is written ----


def refused(optimizer, params, error, message):
    before = [bits(p) for p in params]
    give_grads(params, 0)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert [bits(p) for p in params] == before
    assert not optimizer.state


def test_without_kernels_a_step_is_refused(device, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")

    def there_is_none():
        raise CannotCompile("there is no NVRTC (libnvrtc.so.13); torch's package nvidia-cuda-nvrtc has it")

    monkeypatch.setattr(cuda, "find_nvrtc", there_is_none)
    made = tiger("auto")
    optimizer, params = make(made, WAYS[0], device)
    message = (
        r"(?s)param_precision='master' of group 0 needs a native step, but torch's own code would run \(.*it is on cuda:0, and "
        r"there is no NVRTC \(libnvrtc.so.13\); torch's package nvidia-cuda-nvrtc has it\); it may with 'native' for"
    )
    refused(optimizer, params, RuntimeError, message)
    assert "there is no NVRTC" in str(optim_ext.explain(optimizer)[0])
    plain, params = make(made, {}, device)
    give_grads(params, 0)
    plain.step()  # by the function
    with pytest.raises(CannotCompile, match="there is no NVRTC"):
        make(tiger("compiled"), WAYS[0], device)


def test_kernels_that_cannot_be_compiled(device, monkeypatch):
    monkeypatch.setattr(cuda, "FLAGS", (*cuda.FLAGS, "-DTHAT_NOTHING_WAS_COMPILED_WITH"))
    monkeypatch.setattr(cuda, "include_paths", lambda: ["/nowhere"])
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")
    optimizer, params = make(tiger("auto"), WAYS[0], device)
    refused(optimizer, params, RuntimeError, r"would run \(.*fails with status 1")


def test_a_captured_step_whose_kernel_is_not_loaded(device, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")
    optimizer, params = make(tiger("auto"), WAYS[0], device, capturable=True)
    give_grads(params, 0)
    before = [bits(p) for p in params]
    with (
        pytest.raises(RuntimeError, match="are loaded between steps: take one before a graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    assert [bits(p) for p in params] == before


def test_rules_that_never_have_kernels_say_so_when_they_are_made(device):
    message = (
        r"parameter 0 of group 0.*: it is on cuda:0, where param_precision and state_precision need the kernels of Tiger, and "
        r"the rule has backend=\"interpreted\", which is for the CPU; use 'native' for both"
    )
    with pytest.raises(ValueError, match=message):
        make(tiger("interpreted"), WAYS[0], device)

    @optim_ext.rule("m", backend="auto")
    def OfNorms(param, grad, m, *, lr=0.1):
        return param - lr / (1 + norm(grad)) * grad, m + grad

    for way in ({"param_precision": "master"}, {"state_precision": "bf16"}):
        with pytest.raises(
            ValueError, match="need the kernels of OfNorms, and rules that take norms have kernels for the CPU"
        ):
            make(OfNorms, way, device)
    make(OfNorms, {}, device)
    plain, params = make(tiger("torch"), WAYS[0], device)
    refused(plain, params, RuntimeError, 'the rule has backend="torch"')


def test_a_compiled_step_is_one_graph(tigers, device):
    found = []
    for compiles in (False, True):
        optimizer, params = make(tigers[0], WAYS[7], device)
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiles else optimizer.step
        for count in range(3):
            give_grads(params, count)
            step()
        found.append(everything(optimizer))
    assert same(*found)


def test_kernels_that_differ_are_refused(device, monkeypatch):
    """Those of another rule, as they would come out of a cache that somebody has mixed up."""
    true = cuda.cuda_unit_of
    monkeypatch.setattr(cuda, "cuda_unit_of", lambda *given: true(*given).replace("sign(", "magnitude("))
    message = "compiled for cuda:0 it differs from interpreted in torch.bfloat16 kept as remainder, exp_avg q8 at step 1, in param"
    with pytest.raises(optim_ext.RuleError, match=message):
        make(tiger("compiled"), WAYS[0], device)


def test_kernels_that_differ_do_not_keep_plain_ones_from_running(device, monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")
    true = cuda.cuda_unit_of

    def mixed_up(struct, rule_bytes, kind):
        return true(struct.replace("sign(", "magnitude(") if kind.kept else struct, rule_bytes, kind)

    monkeypatch.setattr(cuda, "cuda_unit_of", mixed_up)
    made = tiger("auto")
    optimizer, params = make(made, WAYS[0], device)
    refused(optimizer, params, RuntimeError, "would run .*compiled for cuda:0 it differs from interpreted")
    plain, params = make(made, {}, device, max_norm=1.0)  # waits for its kernels
    give_grads(params, 0)
    plain.step()
    assert optim_ext.explain(plain)[0].native
    assert "it differs from interpreted" in str(optim_ext.explain(optimizer)[0])


def test_an_op_without_kernels_refuses_before_it_writes(device):
    made = tiger("compiled")
    make(made, {}, device)  # has the plain kernel loaded
    variant = made._variant_with({})
    name = f"{variant.name} on cuda:0, optim_ext_sweep_float"
    options = made._definition.options.defaults
    value = torch.ones(3, dtype=torch.bfloat16)
    arguments = [value, value.float()], value, [], 1, options, device
    with pytest.raises(
        ValueError, match=r"that take what lies beside .* compile\(\"cuda\", param_precision=\"auto\"\) there first"
    ):
        by_op(variant, name, *arguments, companions=[value.float()])
    by_op(variant, name, *arguments)
