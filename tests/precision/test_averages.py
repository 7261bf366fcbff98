"""Averages and norms of what parameters and the things beside them are together."""

import pytest
import torch
from kept import WAYS, everything, give_grads, name_of, same, value_of
from lockstep import random

import optim_ext as optim
from optim_ext.swa_utils import AveragedModel, get_ema_multi_avg_fn


@pytest.fixture(params=WAYS, ids=name_of)
def way(request):
    return request.param


def network(dtype=torch.bfloat16):
    model = torch.nn.Sequential(torch.nn.Linear(100, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 3)).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(random(p.shape, torch.bfloat16, i))
    return model


def average_of(model, **options):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), dtype=torch.float32, **options)


class Shadow:
    """A float32 model that has the values of another's parameters after each step, and its average."""

    def __init__(self, model, optimizer, **options):
        self.source, self.optimizer = model, optimizer
        self.model = network(torch.float32)
        self.average = average_of(self.model, **options)

    @torch.no_grad()
    def update(self):
        for p, q in zip(self.model.parameters(), self.source.parameters(), strict=True):
            p.copy_(value_of(self.optimizer, q))
        for b, c in zip(self.model.buffers(), self.source.buffers(), strict=True):
            b.copy_(c)
        self.average.update_parameters(self.model)

    def is_like(self, average):
        ones, others = self.average.state_dict(), average.state_dict()
        return all(torch.equal(ones[key].double(), others[key].double()) for key in ones)


def step(model, optimizer, number, frozen=()):
    give_grads(list(model.parameters()), number)
    for index in frozen:
        list(model.parameters())[index].grad = None
    optimizer.step()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (optim.AdamW, {}),
        (optim.AdamW, {"use_buffers": True}),
        (optim.AdamW, {"update_every": 2}),
        (optim.Adafactor, {}),
        (optim.Muon, {}),
    ],
    ids=str,
)
def test_masters_are_averaged(way, cls, options):
    model = network()
    optimizer = cls([p for p in model.parameters() if cls is not optim.Muon or p.dim() == 2], **way)
    average, shadow = average_of(model, **options), Shadow(model, optimizer, **options)
    optimizer.average_into(average, masters=True)
    for number in range(5):
        with torch.no_grad():
            model[1].running_mean.add_(1)
        step(model, optimizer, number, frozen=[1] if number < 2 else [])
        shadow.update()
    assert shadow.is_like(average)


def test_an_average_of_masters_moves_where_one_of_parameters_stands_still():
    ends = {}
    for masters in (False, True):
        model = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
        torch.nn.init.ones_(model.weight)
        optimizer = optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, param_precision="remainder")
        average = average_of(model)
        optimizer.average_into(average, masters=masters)
        for _ in range(50):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        ends[masters] = average.module.weight.mean().item()
    assert ends[False] == 1.0 and 1 - 50e-5 < ends[True] < 1 - 30e-5


def test_who_has_nothing_beside_is_averaged_as_ever():
    """Also parameters of no optimizer, of other dtypes, and those of a group that keeps nothing."""
    found = []
    for masters in (False, True):
        model = network()
        groups = [
            {"params": [model[0].weight], "param_precision": "stochastic"},
            {"params": [model[0].bias], "param_precision": "native"},
        ]
        optimizer = optim.AdamW(groups, param_precision="remainder")
        average = average_of(model)
        optimizer.average_into(average, masters=masters)
        for number in range(3):
            step(model, optimizer, number)
        found.append([p.detach().view(torch.uint8) for p in average.parameters()] + everything(optimizer))
    assert same(*found)


def test_the_same_average_by_the_other_rule():
    """Asked for anew, the next step averages otherwise, although nothing else has changed."""
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=1e-4, param_precision="kahan")
    average, shadow = average_of(model), Shadow(model, optimizer)
    for number in range(4):
        optimizer.average_into(average, masters=number % 2 == 1)
        step(model, optimizer, number)
        if number == 0:
            shadow.average.module.load_state_dict(average.module.state_dict())
            shadow.average.n_averaged.fill_(1)
        elif number % 2 == 1:
            shadow.update()
        else:
            shadow.average.update_parameters(model)
    assert shadow.is_like(average)


def test_a_skipped_step_leaves_the_average_alone(way):
    model = network()
    optimizer = optim.AdamW(model.parameters(), **way)
    optimizer.set_grad_policy(skip_nonfinite=True)
    average = average_of(model)
    optimizer.average_into(average, masters=True)
    step(model, optimizer, 0)
    before = [tensor.clone() for tensor in average.state_dict().values()]
    give_grads(list(model.parameters()), 1)
    model[0].weight.grad.fill_(torch.inf)
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, average.state_dict().values(), strict=True))


def test_state_that_is_loaded_is_what_is_averaged_next(way):
    model, other = network(), network()
    optimizer, source = optim.AdamW(model.parameters(), **way), optim.AdamW(other.parameters(), **way)
    average, shadow = average_of(model), Shadow(model, optimizer)
    optimizer.average_into(average, masters=True)
    for number in range(4):
        step(model, optimizer, number)
        shadow.update()
        if number == 1:
            for again in range(5):
                step(other, source, 10 + again)
            optimizer.load_state_dict(source.state_dict())
            model.load_state_dict(other.state_dict())
    assert shadow.is_like(average)


def test_with_a_group_that_takes_torchs_code():
    model = network()
    groups = [
        {"params": list(model[0].parameters()), "param_precision": "remainder"},
        {"params": [*model[1].parameters(), *model[2].parameters()], "differentiable": True},
    ]
    optimizer = optim.AdamW(groups, lr=1e-4)
    average, shadow = average_of(model), Shadow(model, optimizer)
    optimizer.average_into(average, masters=True)
    for number in range(3):
        step(model, optimizer, number)
        shadow.update()
    assert shadow.is_like(average)


def test_explain_says_which_averages_are_of_masters():
    model = network()
    optimizer = optim.AdamW(model.parameters(), param_precision="remainder")
    optimizer.average_into(average_of(model))
    assert "averages" not in optim.explain(optimizer)[0].reason
    optimizer.average_into(average_of(model), masters=True)
    said = "averages take the float32 values of 6 parameters, after the step"
    assert optim.explain(optimizer)[0].reason.endswith(said)


@pytest.mark.parametrize("precision", ["master", "remainder", "kahan"])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.Adafactor])
@pytest.mark.parametrize("measure", [optim.AdamW.measure_step, optim.utils.measure_step], ids=["method", "function"])
def test_a_step_too_small_for_16_bits_is_measured(precision, measure, cls):
    """From the first step on, at which nothing lies beside the parameter yet."""
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = cls([p], lr=1e-4, weight_decay=0.0, param_precision=precision)
    for number in range(3):
        p.grad = torch.ones_like(p)
        with measure(optimizer) as norms:
            optimizer.step()
        assert p.eq(1).all()
        assert norms[0].update.item() == pytest.approx(64e-4, rel=2e-2)
        assert norms[0].param.item() == pytest.approx(64 * (1 - 1e-4 * (number + 1)), rel=1e-5)


def test_alone_16_bits_do_not_move():
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = optim.AdamW([p], lr=1e-4, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    with optimizer.measure_step() as norms:
        optimizer.step()
    assert norms[0].update.item() == 0.0
