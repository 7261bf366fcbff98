"""Parameters, gradients and state in one piece of memory: views that interleave, and views that overlap."""

import pytest
import torch
from lockstep import random


def columns(count):
    return list(random((64, count), torch.float64, 3).unbind(1))


def real_and_imaginary():
    numbers = random((64,), torch.complex128, 3)
    return [numbers.real, numbers.imag]


def halves_of_rows():
    return [half for row in random((3, 40), torch.float64, 3) for half in (row[:20], row[20:])]


PACKED = {  # a parameter, its gradient, the next parameter, ...
    "columns of one matrix": lambda: columns(4),
    "rows of eight": lambda: list(random((64, 2, 8), torch.float64, 3).unbind(1)),
    "real and imaginary parts": real_and_imaginary,
    "one packed buffer": halves_of_rows,
    "a column, its gradient dense": lambda: [columns(4)[1], random((64,), torch.float64, 4)],
}


@pytest.mark.parametrize("views", PACKED.values(), ids=PACKED.keys())
def test_gradients_that_lie_between_the_parameters(spec, views):
    """They share a stretch of memory with what is written, but no element. Later steps are compared with what is
    remembered of the first one, whose tensors are gone by then."""
    packed = views()
    params = [torch.nn.Parameter(p) for p in packed[::2]]
    twins = [torch.nn.Parameter(p.clone()) for p in packed[::2]]
    ours, theirs = spec.ours(params, **spec.typical), spec.torch(twins, **spec.typical)
    for step in range(4):
        for i, (param, other, memory) in enumerate(zip(params, twins, packed[1::2], strict=True)):
            param.grad = memory.copy_(random(memory.shape, torch.float64, 10 * step + i)).view(memory.shape)
            other.grad = memory.clone()
        ours.step()
        theirs.step()
        torch.randn(1000)  # in the memory of what is gone
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-11, atol=1e-12)
