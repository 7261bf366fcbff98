"""Parameters and state after three steps, down to the bit, as they were recorded: every optimizer, option set and dtype.

A change that is meant to alter no number is shown to alter none; one that is meant to records anew:
``python tests/kernels/test_recorded_bits.py``, with the optim_ext to be recorded and tests/ on the PYTHONPATH."""

import hashlib
import json
from pathlib import Path

import numpy
import pytest
import torch
from lockstep import bits, copy_of
from specs import SPECS

RECORD = Path(__file__).with_suffix(".json")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
SHAPES = ((300, 7), (5,), (), (2, 3, 4), (257,))


def numbers(shape, seed):
    """Between -1 and 1, the same on every machine and for every version of NumPy (splitmix64)."""
    count = int(numpy.prod(shape, dtype=numpy.int64))
    with numpy.errstate(over="ignore"):
        z = (numpy.arange(1, count + 1, dtype=numpy.uint64) + numpy.uint64(seed << 32)) * numpy.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        z = z ^ (z >> numpy.uint64(31))
    return torch.from_numpy((z >> numpy.uint64(11)).astype(numpy.float64) * 2.0**-52 - 1.0).reshape(shape)


def tensor(shape, seed, dtype):
    real = numbers(shape, seed)
    return torch.complex(real, numbers(shape, seed + 1)).to(dtype) if dtype.is_complex else real.to(dtype)


def digest(spec, dtype):
    found = hashlib.sha256()
    for options in spec.grid:
        params = [torch.nn.Parameter(tensor(shape, 10 * i, dtype)) for i, shape in enumerate(SHAPES)]
        params[0].data = params[0].data.t().contiguous().t()
        optimizer = spec.ours(params, **copy_of(options))
        for step in range(3):
            for i, param in enumerate(params):
                param.grad = tensor(param.shape, 1000 * (step + 1) + 10 * i, dtype)
            optimizer.step()
        for param in params:
            state = optimizer.state.get(param, {})
            for value in (param.detach(), *(state[key] for key in sorted(state))):
                found.update(bits(value)[2])
    return found.hexdigest()


def recorded():
    return {f"{spec.name} {dtype}": (spec, dtype) for spec in SPECS for dtype in DTYPES if spec.takes(dtype)}


@pytest.mark.parametrize("name", recorded())
def test_bits_are_those_recorded(name):
    assert digest(*recorded()[name]) == json.loads(RECORD.read_text())[name]


if __name__ == "__main__":
    RECORD.write_text(json.dumps({name: digest(*row) for name, row in recorded().items()}, indent=1) + "\n")
