"""State that is kept in other ways comes back bit for bit, loads into any way from any other, and from torch's."""

import copy
import io

import pytest
import torch
from kept import MUON, TAKING, WAYS, everything, make, name_of, same, train, value_of
from lockstep import copy_of
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import optim_ext as optim

ADAMW, ADAFACTOR = (next(spec for spec in TAKING if spec.name == name) for name in ("AdamW", "Adafactor"))
# One that goes element by element, and those that have state of other shapes or sweep twice.
of_each_kind = pytest.mark.parametrize("spec", [ADAMW, ADAFACTOR, MUON], ids=lambda spec: spec.name)


@pytest.fixture(params=WAYS, ids=name_of)
def way(request):
    return request.param


def through_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(saved, params, way, spec=ADAMW):
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = spec.ours(copies, **copy_of(spec.typical), **way)
    optimizer.load_state_dict(saved)
    return optimizer, copies


@pytest.mark.parametrize("spec", TAKING, ids=lambda spec: spec.name)
def test_a_run_that_was_saved_and_loaded_has_the_bits_of_one_that_was_not(spec, way):
    optimizer, params = make(spec, way)
    train(optimizer, params, 3)
    saved = through_file(optimizer.state_dict())
    other, others = resumed(saved, params, way, spec)
    assert same(everything(optimizer), everything(other))
    train(optimizer, params, 3, 3)
    train(other, others, 3, 3)
    assert same(everything(optimizer), everything(other))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("spec", TAKING, ids=lambda spec: spec.name)
def test_distributed_checkpoints_of_one_process(spec, way, flat, tmp_path):
    """Into an optimizer that has stepped and into one that has not, which torch makes the state of by a step."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = network(spec, way)
    train(optimizer, list(model.parameters()), 3)
    weights, state = get_state_dict(model, optimizer, options=options)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    for steps in (0, 1):
        other, resumed = network(spec, way)
        train(resumed, list(other.parameters()), steps, 7)
        weights, state = get_state_dict(other, resumed, options=options)
        checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
        set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
        assert same(everything(optimizer), everything(resumed))
    train(optimizer, list(model.parameters()), 2, 3)
    train(resumed, list(other.parameters()), 2, 3)
    assert same(everything(optimizer), everything(resumed))


def network(spec, way):
    torch.manual_seed(0)
    bias = spec is not MUON
    model = torch.nn.Sequential(torch.nn.Linear(100, 64, bias), torch.nn.Linear(64, 3, bias)).bfloat16()
    groups = [{"params": list(layer.parameters())} for layer in model]
    return model, spec.ours(groups, **copy_of(spec.typical), **way)


def test_loading_does_not_write_to_what_is_loaded(way):
    optimizer, params = make(ADAMW, way)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    other, others = resumed(saved, params, way)
    train(other, others, 2, 2)
    for number, entry in before["state"].items():
        for key, value in entry.items():
            if key != "step":  # which torch shares as well
                assert torch.equal(saved["state"][number][key], value), key


@of_each_kind
@pytest.mark.parametrize("source", [{}, *WAYS], ids=lambda way: name_of(way) or "plain")
def test_any_way_loads_into_any_other(source, way, spec):
    """The constructor says how state is kept; what was learned comes from the checkpoint."""
    optimizer, params = make(spec, source)
    train(optimizer, params, 3)
    saved = through_file(optimizer.state_dict())
    other, others = resumed(saved, params, way, spec)
    fresh, fresh_params = make(spec, way)
    train(fresh, fresh_params, 1)
    for p, its in zip(others, fresh_params, strict=True):
        assert {key: value.dtype for key, value in other.state[p].items()} == {
            key: value.dtype for key, value in fresh.state[its].items()
        }
        assert "step" not in spec.state({}) or float(other.state[p]["step"]) == 3.0
    for group in other.param_groups:
        assert {name: group.get(name, "native") for name in way} == way
    for p, its in zip(params, others, strict=True):
        assert torch.equal(p, its)
        if {"param_precision": source.get("param_precision")}.items() <= way.items():
            assert torch.equal(value_of(optimizer, p), value_of(other, its))
    train(other, others, 1, 3)


@of_each_kind
def test_a_checkpoint_of_torch_loads(way, spec):
    params = [torch.nn.Parameter(torch.randn(64, 100).bfloat16()) for _ in range(2)]
    theirs = spec.torch(params)
    train(theirs, params, 3)
    other, others = resumed(theirs.state_dict(), params, way, spec)
    for p, its in zip(params, others, strict=True):
        for key, value in theirs.state[p].items():
            if key in other.state[its] and other.state[its][key].dtype is torch.float32:
                assert torch.equal(other.state[its][key], value.float()), key
        assert torch.equal(value_of(other, its), p.float())
    train(other, others, 1, 3)


@of_each_kind
def test_what_is_kept_beside_parameters_loads_into_an_optimizer_that_keeps_nothing(way, spec):
    optimizer, params = make(spec, way)
    train(optimizer, params, 3)
    other, others = resumed(optimizer.state_dict(), params, {}, spec)
    for p in others:
        assert sorted(other.state[p]) == spec.keys_of(tuple(p.shape), spec.typical)
        for key, shape in spec.state_of(tuple(p.shape), spec.typical).items():
            assert other.state[p][key].shape == shape and other.state[p][key].dtype is torch.bfloat16
    train(other, others, 1, 3)


@of_each_kind
def test_an_option_changed_between_steps_converts_the_state(way, spec):
    optimizer, params = make(spec, {})
    train(optimizer, params, 2)
    optimizer.param_groups[0].update(way)
    train(optimizer, params, 2, 2)
    fresh, fresh_params = make(spec, way)
    train(fresh, fresh_params, 1)
    for p, its in zip(params, fresh_params, strict=True):
        kept, made = optimizer.state[p], fresh.state[its]
        assert {key: (v.dtype, v.shape) for key, v in kept.items()} == {
            key: (v.dtype, v.shape) for key, v in made.items()
        }


def test_state_of_a_channels_last_parameter_survives(way):
    p = torch.nn.Parameter(torch.randn(64, 8, 3, 3).bfloat16().to(memory_format=torch.channels_last))
    optimizer = optim.AdamW([p], **way)
    train(optimizer, [p], 2)
    saved = through_file(optimizer.state_dict())
    q = torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format))
    other = optim.AdamW([q], **way)
    other.load_state_dict(saved)
    train(optimizer, [p], 2, 2)
    train(other, [q], 2, 2)
    assert same(everything(optimizer), everything(other))
