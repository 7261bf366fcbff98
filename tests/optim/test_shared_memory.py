"""Parameters, gradients and state in one piece of memory: views that interleave, and views that overlap."""

import pytest
import torch
from lockstep import give_grads, random, snapshot
from specs import SPECS

import optim_ext
from optim_ext.swa_utils import AveragedModel, get_ema_multi_avg_fn


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


def tied(base):
    """A flat buffer, its views, and a view that is none of them."""
    return [base[:24], base[:12].view(3, 4), base[12:24].view(4, 3).t(), base[30:]]


OVERLAPS = {  # parameters in one buffer
    "the same memory": lambda base: [base[:12], base[:12]],
    "half of it": lambda base: [base[:12], base[6:18]],
    "one element": lambda base: [base[:12], base[11:23]],
    "one inside another": lambda base: [base[:12], base[3:5]],
    "a transposed view": lambda base: [base[:12].view(3, 4), base[:12].view(3, 4).t()],
    "a strided view of it": lambda base: [base[:12], base[:24:2]],
    "two strided views": lambda base: [base[:24:2], base[2:26:2]],
    "a flat buffer and its views": tied,
    "views, and then their buffer": lambda base: tied(base)[::-1],
    "a chain": lambda base: [base[i : i + 9] for i in (0, 8, 16, 24, 4)],
}


class Shared:
    """Ours and torch's optimizer, each over views of a buffer of its own."""

    def __init__(self, spec, views, **options):
        self.bases = [random((40,), torch.float64, 3) for _ in range(2)]
        self.params = [[torch.nn.Parameter(view) for view in views(base)] for base in self.bases]
        makes = (spec.ours, spec.torch)
        self.optimizers = [
            make(params, **spec.typical | options) for make, params in zip(makes, self.params, strict=True)
        ]

    def step(self, steps=3):
        for step in range(steps):
            for params, optimizer in zip(self.params, self.optimizers, strict=True):
                give_grads(params, step)
                optimizer.step()
        return self

    def check(self):
        torch.testing.assert_close(*self.bases, rtol=1e-11, atol=1e-12)
        for mine, other in zip(*self.params, strict=True):
            for key, value in self.optimizers[1].state[other].items():
                torch.testing.assert_close(self.optimizers[0].state[mine][key], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("views", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_parameters_that_overlap_step_in_turn(spec, views):
    """As torch's for-loop: each from where the ones before it in the list have left it."""
    Shared(spec, views).step().check()


def test_state_that_two_parameters_share(spec):
    """Also what they have of it besides their own."""
    shared = Shared(spec, lambda base: [base[:5], base[5:10], base[10:15]]).step(1)
    for params, optimizer in zip(shared.params, shared.optimizers, strict=True):
        for key in optimizer.state[params[0]]:
            optimizer.state[params[1]][key] = optimizer.state[params[0]][key]
    shared.step().check()


def test_a_gradient_that_a_later_parameter_writes(spec):
    """It is read before."""
    shared = Shared(spec, lambda base: [base[:5], base[5:10]])
    for _ in range(3):
        for params, optimizer in zip(shared.params, shared.optimizers, strict=True):
            params[0].grad, params[1].grad = params[1].detach(), torch.ones(5, dtype=torch.float64)
            optimizer.step()
    shared.check()


def test_bad_input_is_found_before_the_first_turn(spec):
    shared = Shared(spec, OVERLAPS["a flat buffer and its views"])
    params, optimizer = shared.params[0], shared.optimizers[0]
    give_grads(params, 0)
    optimizer.step()
    key = next(iter(spec.state_of(params[2].shape, spec.typical)))
    right = optimizer.state[params[2]][key]
    optimizer.state[params[2]][key] = torch.zeros(7)
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, ValueError), match="parameter 2 of group 0"):
        optimizer.step()
    assert snapshot(optimizer) == before
    optimizer.state[params[2]][key] = right
    optimizer.step()


def test_a_decoder_tied_to_its_encoder_is_averaged_after_all_turns():
    results = []
    for in_step in (True, False):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"enc": torch.nn.Linear(6, 4), "dec": torch.nn.Linear(4, 6)}).double()
        model["dec"].weight.data = model["enc"].weight.data.t()
        optimizer = optim_ext.AdamW(model.parameters(), lr=0.1)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        if in_step:
            optimizer.average_into(averaged, model)
        for step in range(3):
            give_grads(model.parameters(), step)
            optimizer.step()
            if not in_step:
                averaged.update_parameters(model)
        results.append([*model.parameters(), *averaged.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_asgd_after_the_average_is_put_in_place():
    """``p.data = state["ax"]`` for evaluation, and training goes on: torch's code steps it, which writes one after the
    other."""
    results = []
    for library in (optim_ext, torch.optim):
        p, other = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
        optimizer = library.ASGD([{"params": [p]}, {"params": [other]}], lr=0.1, t0=0)
        for step in range(5):
            give_grads([p, other], step)
            optimizer.step()
            if step == 1:
                p.data = optimizer.state[p]["ax"]
                if library is optim_ext:
                    text = str(optim_ext.explain(optimizer))
        results.append([p, other, *(optimizer.state[q]["ax"] for q in (p, other))])
    assert "parameter 0 of group 0: its state 'ax' lies in its own memory" in text
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert results[0][0].data_ptr() == results[0][2].data_ptr()


@pytest.mark.parametrize("in_torch", [spec for spec in SPECS if spec.in_torch], ids=lambda spec: spec.name)
def test_state_in_its_own_memory_is_torchs(in_torch):
    """Any of its state, in any class that torch has: its code writes one after the other."""
    for key in in_torch.state_of((4,), in_torch.typical):
        results = []
        for make in (in_torch.ours, in_torch.torch):
            p = torch.nn.Parameter(torch.linspace(0.5, 1.0, 4, dtype=torch.float64))
            optimizer = make([p], **in_torch.typical)
            for step in range(3):
                give_grads([p], step)
                optimizer.step()
                if step == 0:
                    optimizer.state[p][key] = p.detach()
            results.append(p.detach())
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", ["Lion", "LARS"])
def test_state_in_its_own_memory_is_refused_where_torch_has_no_code(name):
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = getattr(optim_ext, name)([p], **({"momentum": 0.9} if name == "LARS" else {}))
    p.grad = torch.ones(4)
    optimizer.step()
    key = next(iter(optimizer.state[p]))
    p.data = optimizer.state[p][key]
    with pytest.raises(RuntimeError, match=f"parameter 0 of group 0: {key} overlaps in memory"):
        optimizer.step()


def test_gradients_that_overlap_are_clipped_in_turn():
    results = []
    for clip in (optim_ext.utils.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        base = random((20,), torch.float64, 3)
        params = [torch.nn.Parameter(torch.zeros(12, dtype=torch.float64)) for _ in range(2)]
        params[0].grad, params[1].grad = base[:12], base[8:]
        clip(params, 0.5)
        results.append(base)
    torch.testing.assert_close(*results)
