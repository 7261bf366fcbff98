"""Random rules: native in float64 what the function is, in float32 close to it, and compiled the bits of interpreted.

OPTIM_EXT_FUZZ says how many, and from which seed on: "1000" or "1000:5000".
"""

import os

import pytest
import torch
from lockstep import bits, give_grads, make_params, twin
from user_rules.programs import Program

_COUNT, _, _FIRST = os.environ.get("OPTIM_EXT_FUZZ", "40").partition(":")
SEEDS = range(int(_FIRST or 0), int(_FIRST or 0) + int(_COUNT))
SHAPES = ((300,), (3, 5), ())


def run(made, dtype, params=None, steps=3):
    params = make_params(SHAPES, dtype) if params is None else params
    optimizer = made(params)
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_rule_is_its_function(seed):
    """The class compares itself with the function in float64 when it is made; here also how steps go on from there."""
    program = Program(seed)
    native, by_function = program.rule(backend="interpreted"), program.rule(backend="torch")
    params = make_params(SHAPES, torch.float64)
    twins = twin(params)
    run(native, torch.float64, params), run(by_function, torch.float64, twins)
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(param.detach(), other.detach(), rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_rule_in_float_is_close_to_double(seed):
    made = Program(seed).rule(backend="interpreted")
    start = make_params(SHAPES, torch.float32)
    wide = [torch.nn.Parameter(p.detach().double()) for p in start]
    exact, single = made(wide), made(start)
    give_grads(start, 0)
    for param, other in zip(start, wide, strict=True):
        other.grad = param.grad.double()
    for optimizer in (exact, single):
        optimizer.step()
    for param, other in zip(start, wide, strict=True):
        torch.testing.assert_close(param.detach().double(), other.detach(), rtol=1e-4, atol=1e-4)


def test_the_programs_cover_the_grammar():
    text = "".join(Program(seed).text for seed in range(40))
    for word in (
        "lerp",
        "clamp",
        "where",
        "exp",
        "log",
        "sign",
        "square",
        "minimum",
        "maximum",
        "norm(",
        "rms(",
        " / size",
        " + size**2",
        "if ",
        "else",
        "&",
        "|",
        "~",
    ):
        assert word in text


@pytest.mark.parametrize("seed", [1000, 1001, 1002])
def test_compiled_is_interpreted_in_every_bit(seed):
    program = Program(seed)
    interpreted, compiled = program.rule(backend="interpreted"), program.rule(backend="compiled")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
        (_, one), (optimizer, other) = run(interpreted, dtype), run(compiled, dtype)
        assert [bits(p) for p in one] == [bits(p) for p in other]
        assert all(variant.compiled for variant in [optimizer._variant(optimizer.param_groups[0])])
