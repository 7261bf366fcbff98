"""Adafactor where its matrices and vectors differ from other optimizers' state; the rest is in the shared rows."""

import pytest
import torch
from lockstep import Lockstep, bits, give_grads, make_params, native_ops, random, twin
from specs import SPECS, Tolerance

import optim_ext

SPEC = next(spec for spec in SPECS if spec.name == "Adafactor")
# Many pieces and widths of rows and columns, single rows and columns, stacks of small matrices.
SHAPES = ((700, 33), (3, 2500), (1, 9), (9, 1), (1, 1), (4, 50, 70), (512, 3, 3), (30, 11, 7, 7), (2, 300, 1), (600,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matrices_of_every_kind(dtype):
    params = make_params(SHAPES, dtype)
    Lockstep(SPEC, {"lr": 0.1, "weight_decay": 0.1}, params).step(3, frozen=()).check()


def test_more_small_matrices_than_are_worked_on_at_a_time():
    params = make_params(((300, 300, 3, 3), (400, 250, 3, 3), (5, 4), (300, 300, 3, 3)))
    # Sums of a million numbers are where float32 differs: torch adds up the norms of parameter and update in it.
    Lockstep(SPEC, {"lr": 0.1}, params).step(2).check(Tolerance(1e-4, 1e-5))


def test_strided_matrices():
    def strided():
        matrices = [random((9, 6), torch.float64, 0).t(), random((9, 12), torch.float64, 1)[:, ::2]]
        stacks = [random((8, 5, 3, 3), torch.float64, 2).contiguous(memory_format=torch.channels_last)]
        return [*matrices, *stacks, random((10,), torch.float64, 3)[::2]]

    Lockstep(SPEC, {"lr": 0.1}, strided()).step(3).check()


def test_gradients_that_are_repeated_or_zero():
    """Rows and columns of zeros, at which the second moment is held up by eps alone."""
    grads = [torch.ones(1).expand(6, 5), torch.zeros(6, 5), torch.eye(6, 5), torch.zeros(7)]
    for options in ({}, {"eps": (1e-30, 1e-3)}):
        params = make_params([grad.shape for grad in grads], torch.float64)
        lockstep = Lockstep(SPEC, options, params)
        for _ in range(3):
            for own in (lockstep.params, lockstep.twins):
                for param, grad in zip(own, grads, strict=True):
                    param.grad = grad.double()
            for optimizer in lockstep.both:
                optimizer.step()
        lockstep.check()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_spreads_as_in_torch(value):
    for place in range(2):
        lockstep = Lockstep(SPEC, {}, make_params(((5, 4), (6,)), torch.float64)).step(1)
        for own in (lockstep.params, lockstep.twins):
            give_grads(own, 1)
            own[place].grad.view(-1)[1] = value
        for optimizer in lockstep.both:
            optimizer.step()
        for mine, other in zip(lockstep.params, lockstep.twins, strict=True):
            assert torch.equal(mine.isfinite(), other.isfinite())
        lockstep.check()


def test_eps_of_the_first_gradient_counts_for_all():
    """Torch's default for eps is that of the dtype it meets first."""
    params = [*make_params(((6, 5), (4,)), torch.bfloat16), *make_params(((6, 5), (4,)), torch.float64)]
    for first in (0, 2):
        lockstep = Lockstep(SPEC, {}, twin(params))
        for step in range(2):
            for own in (lockstep.params, lockstep.twins):
                give_grads(own, step, frozen=range(first))
                for param in own[first:]:
                    param.grad *= 1e-3
            for optimizer in lockstep.both:
                optimizer.step()
        torch.testing.assert_close(lockstep.params[2:], lockstep.twins[2:], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads):
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            params = make_params(((700, 900), *SHAPES))
            optimizer = optim_ext.Adafactor(params, lr=0.1)
            for step in range(2):
                give_grads(params, step)
                optimizer.step()
            results.append([bits(t) for p in params for t in (p, *optimizer.state[p].values())])
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_no_memory_of_a_parameters_size():
    params = make_params(((1000, 1000),))
    optimizer = optim_ext.Adafactor(params)
    give_grads(params, 0)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    assert max(event.cpu_memory_usage for event in profile.events()) < 100_000
    assert native_ops(optimizer.step) == ["optim_ext::adafactor_"]


def test_refusals_are_torchs():
    messages = []
    for library in (torch.optim, optim_ext):
        for grad in (torch.ones(2, 2).to_sparse(), torch.ones(2, 2, dtype=torch.complex64)):
            param = torch.zeros(2, 2, dtype=grad.dtype)
            param.grad = grad
            with pytest.raises(RuntimeError) as caught:
                library.Adafactor([param]).step()
            messages.append(str(caught.value))
    assert messages[:2] == messages[2:]


WRONG = {
    "shape": (lambda right: torch.zeros(2, 9), "has shape"),
    "dtype": (lambda right: right.long(), "has dtype Long"),
    "complex": (lambda right: right.to(torch.complex64), "has dtype ComplexFloat"),
    "layout": (lambda right: right.to_sparse(), "has layout Sparse"),
    "expanded": (lambda right: torch.zeros(()).expand(right.shape), "share memory"),
}


@pytest.mark.parametrize(("make", "words"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize(("index", "key"), [(0, "row_var"), (0, "col_var"), (1, "variance")])
def test_bad_state_is_refused_before_any_write(index, key, make, words):
    params = make_params(((4, 6), (5,)))
    optimizer = optim_ext.Adafactor(params)
    give_grads(params, 0)
    optimizer.step()
    entries = optimizer.state[params[index]]
    right = entries[key]
    entries[key] = make(right)
    before = [bits(p) for p in params]
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        optimizer.step()
    assert [bits(p) for p in params] == before
    if words != "has layout Sparse":  # which the dispatcher may refuse before the op sees it
        assert f"parameter {index} of group 0: {key} " in str(caught.value) and words in str(caught.value)
    entries[key] = right
    optimizer.step()


def test_state_that_overlaps_is_stepped_in_turn():
    """The row averages of one parameter are the column averages of another; a vector has neither."""
    results = []
    for make in (optim_ext.Adafactor, torch.optim.Adafactor):
        params = make_params(((4, 4), (5,), (4, 4)), torch.float64)
        optimizer = make(params)
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
            optimizer.state[params[0]]["row_var"] = optimizer.state[params[2]]["col_var"].t()
        results.append(params)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_state_of_the_other_kind_is_refused():
    """A variance on a matrix, as a wrong checkpoint might have it."""
    params = make_params(((4, 4),))
    optimizer = optim_ext.Adafactor(params)
    optimizer.state[params[0]] = {"step": torch.tensor(1.0), "variance": torch.zeros(4, 4)}
    give_grads(params, 0)
    before = [bits(p) for p in params]
    with pytest.raises(ValueError, match="params has 1 tensors of two or more dimensions but row_vars has 0"):
        optimizer.step()
    assert [bits(p) for p in params] == before


def test_a_rate_without_limit():
    """lr is the most that a step, relative to the parameter, may be."""
    results = []
    for package in (torch.optim, optim_ext):
        params = [torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))]
        optimizer = package.Adafactor(params, lr=float("inf"), weight_decay=0.0)
        for p in params:
            p.grad = torch.arange(float(p.numel())).view(p.shape)
        optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results)
