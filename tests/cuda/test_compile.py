"""A compiled step on a GPU has the bits of an eager one on the CPU."""

import math

import pytest
import torch
from lockstep import bits, give_grads, make_params
from torch._dynamo.testing import CompileCounterWithBackend

import optim_ext
from optim_ext import swa_utils

SHAPES = ((3, 4), (5,), ())


def compiled(optimizer):
    """A function of one compiled step, and the counter of its graphs; a graph break is an error."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(lambda: optimizer.step(), backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_eager_and_compiled_steps_take_turns(spec, first, device):
    """torch.compile keeps counts on the device: from the first step on, or it moves them there."""
    params, twins = make_params(SHAPES, device=device), make_params(SHAPES, device="cpu")
    ours, other = (spec.ours(own, **spec.typical) for own in (params, twins))
    step, counter = compiled(ours)
    turns = (ours.step, step) if first == "eager" else (step, ours.step)
    for index in range(5):
        for own in (params, twins):
            give_grads(own, index)
        turns[index % 2]()
        other.step()
    assert [bits(p) for p in params] == [bits(p) for p in twins]
    assert any(spec.op in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)
    assert [report.native for report in optim_ext.explain(ours)] == [True]


def test_policies_and_averages(device):
    finals = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3).to(place)
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        optimizer = optim_ext.AdamW(model.parameters(), lr=0.1)
        policy = optimizer.set_grad_policy(max_norm=0.5, skip_nonfinite=True)
        optimizer.average_into(averaged)
        step = optimizer.step if place.type == "cpu" else torch.compile(optimizer.step, backend="aot_eager")
        for index in range(4):
            give_grads(model.parameters(), index)
            if index == 2:
                model.bias.grad[1] = math.nan
            step()
        assert policy.skipped_steps == 1 and averaged.n_averaged == 3
        finals.append([bits(tensor) for tensor in (*model.parameters(), *averaged.module.parameters())])
    assert finals[1] == finals[0]
