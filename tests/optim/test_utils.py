"""optim_ext.utils against torch.nn.utils."""

import inspect
import math

import pytest
import torch
from lockstep import bits, give_grads, make_params, random, twin

from optim_ext import utils

SHAPES = ((), (7,), (3, 5), (2, 3, 4), (17, 33))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.complex64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def with_grads(dtype=torch.float32, shapes=SHAPES):
    params = make_params(shapes, dtype)
    twins = twin(params)
    for own in (params, twins):
        give_grads(own, 0, frozen={1})
    return params, twins


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "get_total_norm"])
def test_signatures(name):
    mine, other = (inspect.signature(getattr(module, name)) for module in (utils, torch.nn.utils))
    assert [(p.name, p.default) for p in mine.parameters.values()] == [
        (p.name, p.default) for p in other.parameters.values()
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [1, 2.0, math.inf, 3.0, 0.5])
def test_clip_grad_norm(dtype, norm_type):
    for max_norm in (0.5, 1e6, 0.0):
        params, twins = with_grads(dtype)
        versions = [None if p.grad is None else p.grad._version for p in params]
        found = utils.clip_grad_norm_(params, max_norm, norm_type)
        expected = torch.nn.utils.clip_grad_norm_(twins, max_norm, norm_type)
        assert found.dtype == expected.dtype and found.shape == ()
        torch.testing.assert_close(found, expected, rtol=RTOL[dtype], atol=0)
        for p, q in zip(params, twins, strict=True):
            if q.grad is None:
                assert p.grad is None
            else:
                torch.testing.assert_close(p.grad, q.grad, rtol=RTOL[dtype], atol=1e-6)
        assert all(p.grad is None or p.grad._version > v for p, v in zip(params, versions, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_clip_grad_value(dtype):
    params, twins = with_grads(dtype)
    for own in (params, twins):
        own[4].grad[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    assert utils.clip_grad_value_(params, 0.25) is None
    torch.nn.utils.clip_grad_value_(twins, 0.25)
    for p, q in zip(params, twins, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", [1, 2.0, math.inf])
def test_total_norm_of_mixed_tensors(norm_type):
    tensors = [random(shape, dtype, i) for i, (shape, dtype) in enumerate(zip(SHAPES, DTYPES, strict=True))]
    tensors[4] = tensors[4].t()[::2]
    found, expected = (module.get_total_norm(tensors, norm_type) for module in (utils, torch.nn.utils))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    exact = torch.linalg.vector_norm(torch.cat([t.to(torch.complex128).flatten() for t in tensors]), norm_type)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
    assert utils.get_total_norm(tensors[0]) == tensors[0].abs() and utils.get_total_norm([]) == 0


def test_parameters_in_every_form():
    for form in (lambda ps: iter(ps), list, lambda ps: ps[3]):
        params, twins = with_grads()
        torch.testing.assert_close(
            utils.clip_grad_norm_(form(params), 0.1), torch.nn.utils.clip_grad_norm_(form(twins), 0.1)
        )
        for p, q in zip(params, twins, strict=True):
            assert p.grad is None or torch.allclose(p.grad, q.grad)


def test_bad_input():
    params, _ = with_grads()
    before = [p.grad is None or bits(p.grad) for p in params]
    for value in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm must be at least 0"):
            utils.clip_grad_norm_(params, value)
        with pytest.raises(ValueError, match="clip_value must be at least 0"):
            utils.clip_grad_value_(params, value)
    assert before == [p.grad is None or bits(p.grad) for p in params]
    params[0].grad.fill_(math.inf)
    before = [p.grad is None or bits(p.grad) for p in params]
    for check in (
        lambda: utils.clip_grad_norm_(params, 1.0, error_if_nonfinite=True),
        lambda: utils.get_total_norm([params[0].grad], error_if_nonfinite=True),
    ):
        with pytest.raises(RuntimeError, match="is non-finite, so it cannot be"):
            check()
    assert before == [p.grad is None or bits(p.grad) for p in params]


def test_torchs_function_serves_what_no_kernel_does():
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert utils.get_total_norm([torch.ones(2, device="meta")]).device.type == "meta"
    assert utils.clip_grad_norm_([param], 1.0, norm_type=3.0) == torch.linalg.vector_norm(torch.tensor([3.0, 4.0]), 3)


def test_a_gradient_that_is_there_twice():
    results = []
    for module in (torch.nn.utils, utils):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.full((4,), 10.0)
        norm = module.clip_grad_norm_([param, param], 1.0)
        module.clip_grad_value_([param, param], 0.3)
        results.append((norm, param.grad))
    torch.testing.assert_close(*results)


def test_an_empty_generator_warns():
    with pytest.warns(UserWarning, match="empty generator"):
        assert utils.clip_grad_norm_((p for p in ()), 1.0) == 0
