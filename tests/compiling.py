"""Compiled steps, for the tests that compare them with eager ones."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend


def compiled(optimizer, backend="aot_eager"):
    """A function of one compiled step, and the counter of its graphs; a graph break is an error."""
    counter = CompileCounterWithBackend(backend)

    @torch.compile(backend=counter, fullgraph=True)
    def step():
        optimizer.step()

    return step, counter
