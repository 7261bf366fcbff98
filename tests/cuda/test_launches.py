"""What a step costs beside its arithmetic: launches, waiting, memory; and that it runs where and when it should."""

import pytest
import torch
from device_trace import device_trace
from lockstep import bits, copy_of, give_grads, make_params, native_ops, random
from on_double import length, repetitions
from specs import SPECS

MANY = [(64,)] * 500 + [(8, 8)] * 500
WAITS = ("Synchronize", "cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaMallocHost", "cudaFreeHost")
# Not LAMB, LARS and Adafactor, which look at whole tensors before they update them: that takes launches of its own.
pytestmark = pytest.mark.only_for(lambda spec: not spec.whole_tensors, reason="its launches are counted here")
COUNTING = [spec for spec in SPECS if "step" in spec.state(spec.typical) and not spec.whole_tensors]
# Torch's code, which makes the state, copies the rate to the device (ASGD) or reads it there (Rprop).
WAITS_FOR_STATE = ("ASGD", "Rprop")


def stepped(spec, options, shapes, device, dtype=torch.float32, steps=3):
    """An optimizer with its state made and its plan in place, and its parameters."""
    params = make_params(shapes, dtype, device=device)
    optimizer = spec.ours(params, **options)
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    return optimizer, params


def update(spec):
    """Launches of one update: a rule with numbers of its own beside the step count stores them in a second one."""
    return 1 + bool(spec.numbers - {"step"})


def counting(spec, device_steps=False):
    """Launches that count the step: one where counters are on the device, on which torch keeps those of ASGD always."""
    return int(device_steps or spec.name == "ASGD")


def check_trace(trace, kernels, copies):
    assert len(trace.kernels) == kernels and all("optim_ext" in name for name in trace.kernels), trace
    assert len(trace.copies) == copies, trace
    assert not [name for name in trace.runtime if any(word in name for word in WAITS)], trace


@pytest.mark.parametrize("shapes", [MANY[:100], MANY], ids=["100 tensors", "1000 tensors"])
def test_one_launch(variant, shapes, device):
    """However many tensors; a table too large for kernel arguments is one copy more."""
    optimizer, _ = stepped(variant.spec, copy_of(variant.options), shapes, device)
    in_memory = len(shapes) == 1000  # at some 60 bytes a tensor; arguments hold 32 KB
    kernels = counting(variant.spec) + update(variant.spec)
    check_trace(device_trace(optimizer.step), kernels=kernels, copies=int(in_memory))


@pytest.mark.parametrize("counting_spec", COUNTING, ids=lambda s: s.name)
def test_one_more_launch_for_counters_on_the_device(counting_spec, device):
    options = {**counting_spec.typical, **counting_spec.device_steps}
    optimizer, _ = stepped(counting_spec, options, MANY, device)
    kernels = counting(counting_spec, device_steps=True) + update(counting_spec)
    check_trace(device_trace(optimizer.step), kernels=kernels, copies=1)


def test_one_launch_for_float_and_one_for_double(spec, device):
    params = [*make_params(device=device), *make_params(dtype=torch.float64, device=device)]
    optimizer = spec.ours(params, **spec.typical)
    for step in range(3):
        give_grads(params, step)
        optimizer.step()
    check_trace(device_trace(optimizer.step), kernels=counting(spec) + 2 * update(spec), copies=0)


def test_hyper_parameters_on_the_device_cost_no_launch(spec, device):
    options = {**spec.typical, "lr": torch.tensor(0.01, device=device)}
    optimizer, _ = stepped(spec, options, MANY[:50], device)
    check_trace(device_trace(optimizer.step), kernels=counting(spec) + update(spec), copies=0)


def test_the_op_is_what_profilers_see(spec, device):
    optimizer, _ = stepped(spec, spec.typical, MANY[:50], device)
    assert native_ops(optimizer.step) == [f"optim_ext::{spec.op}"]


def make_state_where_torch_waits(spec, optimizer, params):
    if spec.name in WAITS_FOR_STATE:
        give_grads(params, 0)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_the_host_never_waits(variant, dtype, device, no_sync):
    """Not even in the first step, which makes the state, nor where gradients come and go."""
    params = make_params(dtype=dtype, device=device)
    optimizer = variant.spec.ours(params, **copy_of(variant.options))
    make_state_where_torch_waits(variant.spec, optimizer, params)
    for step in range(4):
        give_grads(params, step, frozen={step})
        with no_sync:
            optimizer.step()


@pytest.mark.parametrize("large", [False, True], ids=["few", "many"])
def test_the_host_never_waits_with_everything_on_the_device(spec, large, device, no_sync):
    params = make_params(MANY if large else MANY[:20], device=device)
    options = {**copy_of({**spec.typical, "lr": torch.tensor(0.01)}, device), **spec.device_steps}
    if spec.betas:
        options["betas"] = (torch.tensor(0.8, device=device), torch.tensor(0.95, device=device))
    optimizer = spec.ours(params, **options)
    make_state_where_torch_waits(spec, optimizer, params)
    for step in range(3):
        give_grads(params, step)
        with no_sync:
            optimizer.step()


def test_the_host_never_waits_for_a_rate_on_the_device(spec, device, no_sync):
    """Also where counters are on the host, and other numbers with them: they do not depend on the rate (NAdam)."""
    params, twins = make_params(device=device), make_params(device=device)
    ours = spec.ours(params, **{**spec.typical, "lr": torch.tensor(0.01, dtype=torch.float64, device=device)})
    other = spec.ours(twins, **{**spec.typical, "lr": 0.01})
    make_state_where_torch_waits(spec, ours, params)
    make_state_where_torch_waits(spec, other, twins)
    for step in range(3):
        for own in (params, twins):
            give_grads(own, step)
        with no_sync:
            ours.step()
        other.step()
    assert [bits(p) for p in params] == [bits(p) for p in twins]


def test_memory_does_not_grow(spec, device):
    for options in (spec.typical, {**spec.typical, **spec.device_steps}):
        optimizer, _ = stepped(spec, options, MANY, device)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        for _ in range(repetitions(300)):
            optimizer.step()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated(device) == before


def test_a_step_needs_no_memory_that_grows_with_the_model(spec, device):
    optimizer, _ = stepped(spec, spec.typical, [(length(1 << 22),)] * 4, device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    optimizer.step()
    assert torch.cuda.max_memory_allocated(device) - before <= 1 << 20


SLEEP = 100_000_000  # GPU cycles: some 50 ms, an age for the host


@pytest.mark.parametrize("shapes", [MANY[:10], MANY], ids=["few", "many"])
def test_runs_on_the_current_stream(variant, shapes, device):
    """Gradients that arrive late on a side stream are waited for by the GPU; tables of many steps queued meanwhile do
    not get in each other's way."""
    finals = []
    for delayed in (False, True):
        params = make_params(shapes, device=device)
        optimizer = variant.spec.ours(params, **copy_of(variant.options))
        grads = [[random(shape, torch.float32, 50 * s + i, device) for i, shape in enumerate(shapes)] for s in range(6)]
        for param in params:
            param.grad = torch.full_like(param, float("nan") if delayed else 0.0)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream(device) if delayed else torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            if delayed:
                torch.cuda._sleep(SLEEP)
            for step in grads:
                torch._foreach_copy_([p.grad for p in params], step)
                optimizer.step()
        torch.cuda.synchronize()
        finals.append([bits(p) for p in params])
    assert finals[1] == finals[0]


def test_two_streams_at_once(spec, device):
    """Two optimizers on two streams, each with tables in flight, get what each gets alone."""
    finals = []
    for at_once in (False, True):
        both = [make_params(MANY, seed=7 * i, device=device) for i in range(2)]
        optimizers = [spec.ours(params, **spec.typical) for params in both]
        for params in both:
            give_grads(params, 0)
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(device) for _ in both]
        for _ in range(10):
            for stream, optimizer in zip(streams, optimizers, strict=True):
                with torch.cuda.stream(stream):
                    optimizer.step()
                if not at_once:
                    torch.cuda.synchronize()
        torch.cuda.synchronize()
        finals.append([bits(p) for params in both for p in params])
    assert finals[1] == finals[0]


# CUDA graphs.


def capture(optimizer):
    """A graph of one step, captured on a side stream as torch.cuda.graph does. Pinned memory that the capture has given
    back is written over: no replay may read it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    for power in range(4, 20):
        torch.full((1 << power,), 255, dtype=torch.uint8, pin_memory=True)
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", [MANY[:10], MANY], ids=["few", "many"])
def test_graph_replays_see_live_values(spec, shapes, dtype, device):
    """Learning rate, betas, gradients and step counters change from replay to replay; equal to the CPU bit by bit.

    A thousand tensors are several launches in a graph, each with its table in its arguments."""
    tensors = {"lr": torch.tensor(0.01)} | ({"betas": (torch.tensor(0.8), torch.tensor(0.95))} if spec.betas else {})
    options = {**spec.typical, **tensors}
    params, reference = make_params(shapes, dtype, device=device), make_params(shapes, dtype)
    on_gpu = spec.ours(params, **copy_of(options, device), **spec.device_steps)
    on_cpu = spec.ours(reference, **copy_of(options))
    for param in params:
        param.grad = torch.zeros_like(param)
    graph = None
    for step in range(8):
        give_grads(reference, step)
        torch._foreach_copy_([p.grad for p in params], [p.grad for p in reference])
        for optimizer in (on_gpu, on_cpu):
            group = optimizer.param_groups[0]
            group["lr"].fill_(0.02 / (1 + step))
            if spec.betas:
                group["betas"][0].fill_(0.8 + 0.01 * step)
        on_cpu.step()
        if graph is None:
            on_gpu.step()
            if step == 2:
                graph = capture(on_gpu)  # which runs nothing
        else:
            graph.replay()
    assert graph is not None
    for mine, other in zip(params, reference, strict=True):
        assert bits(mine) == bits(other)
        for key, value in on_cpu.state.get(other, {}).items():
            assert bits(on_gpu.state[mine][key]) == bits(value), key


@pytest.mark.only_for(lambda spec: spec.accepts("capturable"), reason="torch captures others as they are")
def test_capture_without_capturable_is_torchs_error(spec, device):
    messages = []
    for make in (spec.torch, spec.ours):
        params = make_params(device=device)
        optimizer = make(params, **spec.typical)
        give_grads(params, 0)
        optimizer.step()
        before = [bits(p) for p in params]
        with pytest.raises(RuntimeError, match="capturable is False") as caught:
            capture(optimizer)
        messages.append(str(caught.value))
        torch.cuda.synchronize()
        assert [bits(p) for p in params] == before
    assert messages[1] == messages[0]


def test_capture_without_counters_on_the_device(device):
    """SGD counts nothing; a learning rate that is a number is part of the graph, as in torch."""
    spec = next(row for row in SPECS if row.name == "SGD")
    finals = []
    for make in (spec.torch, spec.ours):
        params = make_params(dtype=torch.float64, device=device)
        optimizer = make(params, **spec.typical)
        give_grads(params, 0)
        optimizer.step()
        graph = capture(optimizer)
        for _ in range(3):
            graph.replay()
        finals.append(params)
    for mine, other in zip(*finals, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)
