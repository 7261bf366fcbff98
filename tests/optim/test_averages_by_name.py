"""AveragedModel(match="name"): averages are of the tensors of their name, in whatever order a model has them."""

import copy
import pickle

import pytest
import torch
from lockstep import bits, give_grads, native_ops
from torch import nn

import optim_ext
from optim_ext.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Model(nn.Module):
    """Parts of the same shape, so that order alone would not tell."""

    def __init__(self, order, norm=True):
        super().__init__()
        for seed, name in order:
            torch.manual_seed(seed)
            self.add_module(name, nn.Linear(3, 3))
        if norm:
            self.norm = nn.BatchNorm1d(3)


ORDER = [(1, "first"), (2, "second"), (3, "third")]
FUNCTIONS = {
    "mean": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
    "own": {"avg_fn": lambda average, param, n: 0.75 * average + 0.25 * param},
    "own multi": {"multi_avg_fn": lambda averages, params, n: torch._foreach_lerp_(averages, params, 0.25)},
}


def change(model, step):
    """By name, so that two models with other orders change alike."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(step + len(name) + 0.5 * name.startswith("second"))


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_another_order_of_the_same_names(function, use_buffers):
    model, turned = (
        Model(ORDER, norm=not (use_buffers and function)),
        Model(ORDER[::-1], norm=not (use_buffers and function)),
    )
    by_name = AveragedModel(model, match="name", use_buffers=use_buffers, **function)
    expected = AveragedModel(model, use_buffers=use_buffers, **function)
    for step in range(3):
        change(model, step)
        change(turned, step)
        by_name.update_parameters(turned)
        expected.update_parameters(model)
    ours, theirs = by_name.module.state_dict(), expected.module.state_dict()
    assert [*ours] == [*theirs] and all(bits(ours[name]) == bits(theirs[name]) for name in ours)
    target = Model(ORDER[1:] + ORDER[:1], norm=hasattr(model, "norm"))
    by_name.copy_to(target)
    assert all(bits(value) == bits(ours[name]) for name, value in target.state_dict().items())
    own = copy.deepcopy(target.state_dict())
    with by_name.swap_into(target):
        assert all(bits(value) == bits(ours[name]) for name, value in target.state_dict().items())
    assert all(bits(value) == bits(own[name]) for name, value in target.state_dict().items())


def test_order_takes_one_for_the_other():
    """What the option is for."""
    model, turned = Model(ORDER), Model(ORDER[::-1])
    averaged = AveragedModel(model)
    averaged.update_parameters(turned)
    assert bits(averaged.module.first.weight) == bits(turned.third.weight)


def test_in_the_step_of_an_optimizer():
    model, turned = Model(ORDER), Model(ORDER[::-1])
    turned.load_state_dict(model.state_dict())
    runs = []
    for own, match in ((model, "order"), (turned, "name")):
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), match=match)
        optimizer = optim_ext.AdamW(own.named_parameters(), lr=0.1)
        optimizer.average_into(averaged, own)
        for step in range(3):
            params = dict(own.named_parameters())
            give_grads([params[name] for name in sorted(params)], step)
            ops = native_ops(optimizer.step)
        assert ops == ["optim_ext::adamw_"]
        runs.append({name: bits(value) for name, value in averaged.module.named_parameters()})
        if own is model:
            own.load_state_dict({name: value.clone() for name, value in turned.state_dict().items()})
    assert runs[0] == runs[1]


def partners(change_model):
    model = Model(ORDER)
    averaged = AveragedModel(model, match="name")
    before = {name: bits(value) for name, value in averaged.module.state_dict().items()}
    change_model(model)
    return model, averaged, before


WRONG = {
    "renamed": (
        lambda model: model.add_module("fourth", model._modules.pop("third")),
        "parameter 'fourth.weight' of the model has no average of this name",
    ),
    "more": (
        lambda model: model.register_parameter("scale", nn.Parameter(torch.ones(1))),
        "parameter 'scale' of the model has no average of this name",
    ),
    "fewer": (
        lambda model: model._modules.pop("second"),
        "the average of parameter 'second.weight' has no parameter of this name in the model",
    ),
    "tied": (
        lambda model: setattr(model.third, "weight", model.first.weight),
        "the average of parameter 'third.weight' has no parameter of this name in the model",
    ),
    "shape": (
        lambda model: setattr(model.second, "bias", nn.Parameter(torch.ones(4))),
        r"parameter 'second.bias' of the model has shape \(4,\), its average \(3,\)",
    ),
    "buffer": (
        lambda model: model.register_buffer("extra", torch.ones(1)),
        "buffer 'extra' of the model has no average of this name",
    ),
}


@pytest.mark.parametrize("change_model, words", WRONG.values(), ids=WRONG.keys())
def test_what_has_no_partner_is_refused_by_name(change_model, words):
    model, averaged, before = partners(change_model)
    for ask in (averaged.update_parameters, averaged.copy_to, lambda m: averaged.swap_into(m).__enter__()):
        with pytest.raises(ValueError, match=words):
            ask(model)
    with pytest.raises(ValueError, match=words):
        optim_ext.SGD(model.parameters()).average_into(averaged, model)
    assert {name: bits(value) for name, value in averaged.module.state_dict().items()} == before
    assert averaged.n_averaged == 0


def test_two_tensors_with_one_average():
    model = Model(ORDER)
    model.third.weight = model.first.weight
    averaged = AveragedModel(model, match="name")
    averaged.update_parameters(model)
    turned = Model(ORDER[::-1])
    turned.third.weight = turned.first.weight  # tied alike, under whichever name comes first
    averaged.update_parameters(turned)
    with pytest.raises(ValueError, match="parameter 'third.weight' and 'first.weight' have one average together"):
        averaged.update_parameters(Model(ORDER))


def test_a_model_that_changes_its_order_later():
    model = Model(ORDER)
    averaged = AveragedModel(model, match="name")
    averaged.update_parameters(model)
    model.add_module("first", model._modules.pop("first"))  # now the last
    change(model, 5)
    averaged.n_averaged.zero_()
    averaged.update_parameters(model)
    assert all(bits(v) == bits(model.state_dict()[name]) for name, v in averaged.module.state_dict().items())


def test_copies_and_other_values():
    averaged = AveragedModel(Model(ORDER), match="name")
    assert copy.deepcopy(averaged).match == pickle.loads(pickle.dumps(averaged)).match == "name"
    assert AveragedModel(Model(ORDER)).match == "order"
    with pytest.raises(ValueError, match="match must be 'order' or 'name', got 'names'"):
        AveragedModel(Model(ORDER), match="names")
