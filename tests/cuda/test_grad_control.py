"""Clipping and skipping on a GPU: the CPU's bits, three launches, no waiting, and CUDA graphs that see live gradients."""

import math

import pytest
import torch
from device_trace import device_trace
from lockstep import bits, copy_of, give_grads, make_params
from on_double import length
from specs import SPECS

import optim_ext

SHAPES = ((300, 301), (3,), (65537,), (), (255,), (1 << 15,), (0,), (1000, 7))
MANY = [(64,)] * 1000
COUNTING = [spec for spec in SPECS if "step" in spec.state(spec.typical)]


# Moduli of complex numbers are torch's own, which rounds them differently on a GPU.
SAME_BITS = [
    pytest.param(norm_type, dtype, id=f"{norm_type}-{dtype}")
    for norm_type in (1.0, 2.0, math.inf)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    if norm_type == 2.0 or not dtype.is_complex
]


@pytest.mark.parametrize(("norm_type", "dtype"), SAME_BITS)
def test_the_cpus_bits(norm_type, dtype, device):
    results = []
    for place in (torch.device("cpu"), device):
        params = make_params(SHAPES, dtype, device=place)
        give_grads(params, 0)
        params[0].grad = params[0].grad.t().contiguous().t()
        optimizer = optim_ext.AdamW(params, lr=0.1)
        norm = optimizer.clip_grad_norm(0.5, norm_type)
        optimizer.step()
        each = torch.ops.optim_ext.norms([p.grad for p in params], norm_type=norm_type)
        results.append([bits(tensor) for tensor in (norm, each, *params)])
    assert results[0] == results[1]


@pytest.mark.parametrize("shapes", [MANY[:50], MANY, [(length(1 << 22),)] * 3], ids=["few", "many", "large"])
def test_three_launches_and_no_waiting(shapes, device, no_sync):
    params = make_params(shapes, device=device)
    optimizer = optim_ext.AdamW(params, fused=True)
    policy = optimizer.set_grad_policy(max_norm=1.0, skip_nonfinite=True, skip_above=1e9)
    for step in range(3):
        give_grads(params, step)
        with no_sync:
            optimizer.step()
    trace = device_trace(optimizer.step)
    assert len(trace.kernels) == 3 and all("optim_ext" in name for name in trace.kernels), trace
    assert policy.skipped_steps == 0 and policy.skipped_steps.device == device


@pytest.mark.parametrize("skipped", [0, 1], ids=["the first step", "a later step"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skipped_on_the_device(spec, bad, skipped, device):
    """What a skipped first step has made is as good as no state."""
    options = {**spec.typical, **spec.device_steps}
    params, twins = make_params(device=device), make_params(device=device)
    ours, other = (spec.ours(own, **copy_of(options)) for own in (params, twins))
    policy = ours.set_grad_policy(skip_nonfinite=True)
    for step in range(3):
        skip = step == skipped
        for own in (params, twins):
            give_grads(own, step)
        if skip:
            params[4].grad[1, 2] = bad
        ours.step()
        if not skip:
            other.step()
    assert policy.skipped_steps == 1 and not policy.last_step_skipped
    assert [bits(p) for p in params] == [bits(p) for p in twins]


@pytest.mark.parametrize("counting_spec", COUNTING, ids=lambda s: s.name)
def test_counters_go_where_skipping_is_decided(counting_spec, device, no_sync):
    """Whatever the options, and not before a step may be skipped."""
    spec = counting_spec
    params, twins = make_params(device=device), make_params(device=device)
    ours, other = (spec.ours(own, **spec.typical) for own in (params, twins))
    for step in range(4):
        for own in (params, twins):
            give_grads(own, step)
        other.step()
        if step == 2:
            policy = ours.set_grad_policy(skip_above=1e9)
        numbers = {entry[key].device for entry in ours.state.values() for key in spec.numbers}
        assert step == 0 or spec.name == "ASGD" or numbers == {device if step == 3 else torch.device("cpu")}
        ours.step()
    assert policy.skipped_steps == 0
    assert [bits(p) for p in params] == [bits(p) for p in twins]
    give_grads(params, 4)
    with no_sync:
        ours.step()


def test_counts_in_python_numbers_cannot_skip(device):
    param = torch.nn.Parameter(torch.zeros(5, 3, device=device))
    optimizer = optim_ext.SparseAdam([param])
    optimizer.set_grad_policy(skip_nonfinite=True)
    param.grad = torch.ones(5, 3, device=device).to_sparse(1)
    with pytest.raises(RuntimeError, match="SparseAdam counts steps in Python numbers"):
        optimizer.step()
    assert not optimizer.state and not param.any()


def test_in_a_graph(device):
    params, twins = make_params(device=device), make_params(device=device)
    ours, eager = (optim_ext.AdamW(own, capturable=True) for own in (params, twins))
    policies = [optimizer.set_grad_policy(max_norm=0.5, skip_above=1e3) for optimizer in (ours, eager)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for own, optimizer in ((params, ours), (twins, eager)):
            give_grads(own, 0)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for step in range(4):
        give_grads(twins, step)
        if step == 2:
            twins[4].grad.fill_(1e4)
        for p, q in zip(params, twins, strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
        eager.step()
        assert bits(policies[0].last_norm) == bits(policies[1].last_norm)
        assert policies[0].skipped_steps == policies[1].skipped_steps == int(step >= 2)
    assert [bits(p) for p in params] == [bits(p) for p in twins]


def test_two_devices_make_one_norm(device):
    params = [*make_params(((5, 7),)), *make_params(((4,),), device=device)]
    give_grads(params, 0)
    optimizer = optim_ext.AdamW(params)
    norm = optimizer.clip_grad_norm(0.1)
    expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten().cpu() for p in params]))
    torch.testing.assert_close(norm.cpu(), expected)
    optimizer.step()
