"""All or nothing: bad input is refused by name before anything is written, and the optimizer works once it is mended."""

import math
from contextlib import nullcontext

import pytest
import torch
from device import DEVICE
from lockstep import copy_of, give_grads, make_params, snapshot
from specs import SPECS, TENSOR_LRS
from torch.utils._python_dispatch import TorchDispatchMode

from optim_ext.swa_utils import AveragedModel

SHAPES = ((3, 4), (5,), (2, 2), (6,))
READS_LR = [spec for spec in SPECS if spec.name != "Rprop"]  # which has it in step_size
PLACES = {"first group": (0, 0), "first group, second": (0, 1), "second group": (1, 1)}


class Scene:
    """An optimizer of two groups, stepped `steps` times, whose parameter at `place` gets bad input."""

    def __init__(self, spec, place=(1, 1), named=False, steps=2, dtype=torch.float32, options=None):
        self.spec, self.place, self.named = spec, place, named
        self.params = make_params(SHAPES, dtype)
        names = ("fc.weight", "fc.bias", "head.weight", "head.bias")
        entries = list(zip(names, self.params, strict=True)) if named else self.params
        self.optimizer = spec.ours(
            [{"params": entries[:2], "lr": 0.02}, {"params": entries[2:]}],
            **copy_of(spec.typical if options is None else options),
        )
        for step in range(steps):
            self.give(step)
            self.optimizer.step()
        self.give(steps)
        self.index = 2 * place[0] + place[1]
        self.name = names[self.index]
        self.group = self.optimizer.param_groups[place[0]]

    @property
    def param(self):
        return self.params[self.index]

    @property
    def state(self):
        return self.optimizer.state[self.param]

    @property
    def state_key(self):
        """The last state tensor that is not the counter."""
        return list(self.spec.state_of(self.param.shape, self.spec.typical))[-1]

    @property
    def called(self):
        """What a message must call the parameter."""
        return f"parameter '{self.name}'" if self.named else f"parameter {self.place[1]} of group {self.place[0]}"

    def give(self, step):
        give_grads(self.params, step)

    def refused(self, *words, by=RuntimeError):
        """The step raises, names the parameter and says these words, and leaves every bit as it was."""
        before = snapshot(self.optimizer)
        with pytest.raises(by) as caught:
            self.optimizer.step()
        message = str(caught.value)
        assert type(caught.value) is by
        assert snapshot(self.optimizer) == before
        for word in (self.called, *words):
            assert word in message, message
        return message

    def works(self):
        """One more step writes every parameter."""
        before = [p.detach().clone() for p in self.params]
        self.optimizer.step()
        assert all(not torch.equal(p, b) for p, b in zip(self.params, before, strict=True))


def scenes(places=PLACES):
    def decorate(test):
        test = pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])(test)
        test = pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])(test)
        return pytest.mark.parametrize("place", places.values(), ids=places.keys())(test)

    return decorate


@scenes()
def test_gradient_whose_memory_was_taken_away(spec, place, named, steps):
    scene = Scene(spec, place, named, steps)
    memory = scene.param.grad.untyped_storage()
    size = memory.nbytes()
    memory.resize_(0)
    with pytest.raises(RuntimeError, match="no memory") as caught:
        scene.optimizer.step()
    assert scene.called in str(caught.value)
    memory.resize_(size)
    scene.give(steps)
    scene.works()


@scenes()
def test_gradient_of_a_wrong_shape(spec, place, named, steps):
    scene = Scene(spec, place, named, steps)
    right = scene.param.grad
    kept = scene.param.data
    scene.param.data = torch.zeros(9)
    scene.param.grad = torch.zeros(9)
    scene.param.data = kept
    scene.refused("grad", "[9]", str(list(kept.shape)))
    scene.param.grad = right
    scene.works()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.int8], ids=str)
@scenes({"second group": (1, 1)})
def test_gradient_of_a_wrong_dtype(spec, place, named, steps, dtype):
    scene = Scene(spec, place, named, steps)
    right = scene.param.grad
    scene.param.grad_dtype = None
    scene.param.grad = torch.ones(scene.param.shape).to(dtype)
    scene.refused("grad", "dtype")
    scene.param.grad = right
    scene.works()


@pytest.mark.only_for(lambda spec: not spec.is_real, reason="takes no complex parameters")
def test_real_gradient_of_a_complex_parameter(spec):
    scene = Scene(spec, dtype=torch.complex64)
    right = scene.param.grad
    scene.param.grad_dtype = None
    scene.param.grad = torch.ones(scene.param.shape)
    scene.refused("grad", "dtype", "complex")
    scene.param.grad = right
    scene.works()


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
@scenes({"first group": (0, 0), "second group": (1, 1)})
def test_state_of_a_wrong_dtype(spec, place, named, steps, dtype):
    scene = Scene(spec, place, named, steps=max(steps, 1))
    right = scene.state[scene.state_key]
    scene.state[scene.state_key] = right.to(dtype)
    scene.refused("dtype")
    scene.state[scene.state_key] = right
    scene.works()


@scenes()
def test_state_of_another_size(spec, place, named, steps):
    scene = Scene(spec, place, named, steps=max(steps, 1))
    right = scene.state[scene.state_key]
    for wrong in (torch.zeros(2, 9), torch.zeros(()), torch.zeros(0)):
        scene.state[scene.state_key] = wrong
        scene.refused(f": {scene.state_key} has shape", str(list(wrong.shape)), str(list(right.shape)))
    scene.state[scene.state_key] = right
    scene.works()


@scenes({"first group": (0, 0), "second group": (1, 1)})
def test_state_on_another_device(spec, place, named, steps):
    scene = Scene(spec, place, named, steps=max(steps, 1))
    right = scene.state[scene.state_key]
    scene.state[scene.state_key] = right.to("meta")
    scene.refused("meta", DEVICE.type)
    scene.state[scene.state_key] = right
    scene.works()


@scenes({"first group": (0, 0), "second group": (1, 1)})
def test_state_of_a_wrong_layout(spec, place, named, steps):
    scene = Scene(spec, place, named, steps=max(steps, 1))
    right = scene.state[scene.state_key]
    scene.state[scene.state_key] = right.to_sparse()
    scene.refused("layout", "parse")
    scene.state[scene.state_key] = right
    scene.works()


COUNTERS = {
    "two": torch.tensor([1.0, 2.0]),
    "none": torch.zeros(0),
    "nan": torch.tensor(math.nan),
    "negative": torch.tensor(-1.0),
    "infinite": torch.tensor(math.inf),
}


# For torch's own classes torch counts in these (test_state_dict.py).
OTHER_COUNTERS = {"integer": torch.tensor(3), "half": torch.tensor(3.0, dtype=torch.float16)}
COUNTING = [s for s in SPECS if "step" in s.state(s.typical)]
BAD_COUNTERS = [(s, name, c) for s in COUNTING for name, c in COUNTERS.items()]
BAD_COUNTERS += [(s, name, c) for s in COUNTING if not s.in_torch for name, c in OTHER_COUNTERS.items()]


@pytest.mark.parametrize(
    "counting_spec, counter",
    [(s, c) for s, _, c in BAD_COUNTERS],
    ids=[f"{s.name}-{name}" for s, name, _ in BAD_COUNTERS],
)
def test_bad_counters(counting_spec, counter):
    scene = Scene(counting_spec)
    right = scene.state["step"]
    scene.state["step"] = counter.cpu().clone()
    scene.refused("step")
    scene.state["step"] = right
    scene.works()


def test_missing_and_foreign_state_entries(spec):
    """An entry deleted, or replaced by what is no tensor: an error, never a half-made step."""
    for wrong in ("absent", "text", 3.5):
        scene = Scene(spec)
        right = scene.state[scene.state_key]
        if wrong == "absent":
            scene.state["other"] = 1  # so that the dict is not empty, which would mean: make it anew
            del scene.state[scene.state_key]
            if spec.name == "SGD":  # where torch, too, makes a missing buffer anew
                scene.works()
                continue
        else:
            scene.state[scene.state_key] = wrong
        before = snapshot(scene.optimizer)
        with pytest.raises((KeyError, TypeError, RuntimeError, AttributeError, ValueError)):
            scene.optimizer.step()
        assert snapshot(scene.optimizer) == before
        scene.state[scene.state_key] = right
        scene.works()


def test_interleaved_views_do_not_overlap(spec):
    """Views that span one stretch of memory without sharing an element are fine."""
    base = torch.randn(6, 2)
    params = [torch.nn.Parameter(base[:, 0]), torch.nn.Parameter(base[:, 1])]
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    kept = base.clone()
    optimizer.step()
    assert (base != kept).all()


def test_state_that_overlaps_its_parameter(spec):
    scene = Scene(spec)
    right = scene.state[scene.state_key]
    param = scene.param
    buffer = torch.cat([param.detach().flatten(), param.new_zeros(1)])
    param.data = buffer[:-1].view(param.shape)
    scene.state[scene.state_key] = buffer[1:].view(param.shape)
    scene.refused("overlap")
    scene.state[scene.state_key] = right
    scene.works()


READS = {
    "another parameter": lambda scene, base: scene.params[1 - scene.index].detach(),
    "its parameter, shifted": lambda scene, base: base[1:6],
    "its state": lambda scene, base: next(v for v in scene.state.values() if v.shape == scene.param.shape),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("index", [0, 1])
def test_gradient_in_memory_that_is_written(spec, name, index):
    """What such a gradient is would depend on how far which thread is, or on which of torch's modes is meant. (One that
    a later parameter writes has one value in all of them.)"""
    if (name, index) == ("another parameter", 0):
        index = 1
    scene = Scene(spec, place=(0, index))
    base = torch.randn(13)
    scene.params[1 - index].data, scene.param.data = torch.randn(5), base[:5]
    for p in scene.params[:2]:
        scene.optimizer.state.pop(p, None)
        # What its constructor makes torch's Adagrad does not make in a step, before 2.12.
        scene.optimizer.state.update(spec.ours([p]).state)
        p.grad = torch.randn(5)
    for _ in range(2):
        scene.optimizer.step()
    right = scene.param.grad
    scene.param.grad = READS[name](scene, base)
    scene.refused("grad", "overlaps in memory")
    scene.param.grad = right
    scene.works()


def test_gradient_that_is_its_parameter_in_another_order(spec):
    param = torch.nn.Parameter(torch.randn(40, 40))
    optimizer = spec.ours([param], **spec.typical)
    param.grad = param.detach().t()
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="parameter 0 of group 0: grads overlaps in memory"):
        optimizer.step()
    assert torch.equal(param, before)


def test_gradient_that_is_its_parameter(spec):
    """Element by element, which no order of elements changes."""
    results = []
    for alias in (False, True):
        param = torch.nn.Parameter(torch.linspace(0.5, 2.0, 700))
        optimizer = spec.ours([param], **copy_of(spec.typical))
        for _ in range(3):
            param.grad = param.detach() if alias else param.detach().clone()
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_state_on_the_meta_device(spec):
    """Which would make the dispatcher take the step for one that only asks for shapes."""
    scene = Scene(spec)
    right = scene.state[scene.state_key]
    scene.state[scene.state_key] = right.to("meta")
    before = [p.detach().clone() for p in scene.params]
    with pytest.raises(RuntimeError, match=f"{scene.called}.*'{scene.state_key}' is on meta"):
        scene.optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(scene.params, before, strict=True))
    scene.state[scene.state_key] = right
    scene.works()


@pytest.mark.parametrize("keeping", [s for s in SPECS if s.name != "Adafactor"], ids=lambda s: s.name)
def test_state_that_is_no_tensor_is_named(keeping):
    """Adafactor's, which only some parameters have, is counted by its op."""
    scene = Scene(keeping)
    right = scene.state[scene.state_key]
    scene.state[scene.state_key] = "text"
    with pytest.raises(
        RuntimeError, match=f"{scene.called}: its state '{scene.state_key}' is 'text', expected a tensor"
    ):
        scene.optimizer.step()
    scene.state[scene.state_key] = right
    scene.works()


@pytest.mark.parametrize("size, stride", [((12, 5), (2, 1)), ((5, 4), (3, 4))], ids=str)
def test_parameter_whose_rows_overlap(spec, size, stride):
    base = torch.randn(30)
    param = torch.nn.Parameter(base.as_strided(size, stride))
    optimizer = spec.ours([param], **spec.typical)
    param.grad = torch.ones(size)
    kept = base.clone()
    with pytest.raises(RuntimeError, match="parameter 0 of group 0.*share memory"):
        optimizer.step()
    assert torch.equal(base, kept)


@pytest.mark.parametrize(
    "expanded", [lambda: torch.randn(1).expand(6), lambda: torch.randn(2).repeat(3).as_strided((6,), (0,))]
)
def test_expanded_parameter(spec, expanded):
    scene = Scene(spec, steps=0)
    scene.param.data = expanded()
    scene.param.grad = torch.ones(6)
    scene.refused("memory")
    scene.param.data = torch.randn(6)
    scene.works()


def test_expanded_state(spec):
    scene = Scene(spec)
    right = scene.state[scene.state_key]
    scene.state[scene.state_key] = torch.ones(1).expand(6)
    scene.refused("memory")
    scene.state[scene.state_key] = right
    scene.works()


HYPERS = ("lr", "weight_decay", "eps", "momentum", "dampening", "alpha", "lr_decay")


@pytest.mark.parametrize("lr_spec", READS_LR, ids=lambda spec: spec.name)
@pytest.mark.parametrize("group_index", [0, 1])
def test_nan_hyper_parameters(lr_spec, group_index):
    scene = Scene(lr_spec)
    group = scene.optimizer.param_groups[group_index]
    for key in (k for k in HYPERS if k in group):
        right = group[key]
        for wrong in (math.nan, torch.tensor(math.nan, device="cpu")):
            group[key] = (wrong, 1e-3) if isinstance(right, tuple) else wrong
            before = snapshot(scene.optimizer)
            with pytest.raises(ValueError, match=f"^group {group_index}: .*{key}.*NaN"):
                scene.optimizer.step()
            assert snapshot(scene.optimizer) == before, key
        group[key] = right
    if "betas" in group:
        right = group["betas"]
        for which in (0, 1):
            group["betas"] = tuple(math.nan if i == which else b for i, b in enumerate(right))
            before = snapshot(scene.optimizer)
            with pytest.raises(ValueError, match=rf"^group {group_index}: .*betas\[{which}\] is NaN"):
                scene.optimizer.step()
            assert snapshot(scene.optimizer) == before
        group["betas"] = right
    scene.works()


# Options that hold several numbers.
SEVERAL = [
    (s, key)
    for s in SPECS
    for key, value in s.ours(make_params(), **s.typical).defaults.items()
    if isinstance(value, tuple)
]


@pytest.mark.parametrize("several, key", SEVERAL, ids=[f"{s.name}-{key}" for s, key in SEVERAL])
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("group_index", [0, 1])
def test_options_of_several_values(several, key, steps, group_index):
    """Too many, too few, none; a list serves as a tuple does."""
    scene = Scene(several, steps=steps)
    group = scene.optimizer.param_groups[group_index]
    right = group[key]
    wrongs = [
        ((*right, right[-1]), ValueError, f"has {len(right) + 1} values"),
        (right[:1], ValueError, "has 1 values"),
    ]
    for wrong, error, words in (*wrongs, (0.9, TypeError, "is 0.9")):
        group[key] = wrong
        before = snapshot(scene.optimizer)
        with pytest.raises(error, match=f"{key} of group {group_index} {words}, expected {len(right)}"):
            scene.optimizer.step()
        assert snapshot(scene.optimizer) == before
    group[key] = list(right)
    scene.works()


@pytest.mark.parametrize("wrong", [(0.9,), (0.9, 0.99, 0.999)], ids=["one", "three"])
@pytest.mark.parametrize("own", [s for s, key in SEVERAL if key == "betas" and not s.in_torch], ids=lambda s: s.name)
def test_constructors_of_this_package_count_betas(own, wrong):
    with pytest.raises(ValueError, match="expected 2 values"):
        own.ours(make_params(), betas=wrong)


@pytest.mark.parametrize("lr_spec", READS_LR, ids=lambda spec: spec.name)
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("wrong", ["fast", None, [0.1], torch.tensor([0.1, 0.2])], ids=repr)
def test_lr_that_is_no_number(lr_spec, steps, wrong):
    scene = Scene(lr_spec, steps=steps)
    right, scene.group["lr"] = scene.group["lr"], wrong
    before = snapshot(scene.optimizer)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        scene.optimizer.step()
    assert snapshot(scene.optimizer) == before
    scene.group["lr"] = right
    scene.works()


@pytest.mark.parametrize("lr_spec", READS_LR, ids=lambda spec: spec.name)
@pytest.mark.parametrize("options", TENSOR_LRS, ids=["scalar", "one-double", "one-by-one"])
def test_tensor_lr_that_turns_nan(lr_spec, options):
    scene = Scene(lr_spec, options={**lr_spec.typical, **options})
    lr = scene.optimizer.param_groups[1]["lr"]
    lr.fill_(math.nan)
    before = snapshot(scene.optimizer)
    with pytest.raises(ValueError, match="lr.*NaN"):
        scene.optimizer.step()
    assert snapshot(scene.optimizer) == before
    lr.fill_(0.1)
    scene.works()


def test_missing_option(spec):
    """A key lost from a group, in the second group."""
    scene = Scene(spec)
    key = "maximize" if spec.name == "Rprop" else "weight_decay"
    right = scene.group.pop(key)
    before = snapshot(scene.optimizer)
    with pytest.raises(KeyError, match=key):
        scene.optimizer.step()
    assert snapshot(scene.optimizer) == before
    scene.group[key] = right
    scene.works()


def test_inference_parameter_outside_inference_mode(spec):
    with torch.inference_mode():
        frozen = torch.randn(6)
    scene = Scene(spec, steps=0)
    scene.optimizer.param_groups[1]["params"][1] = frozen
    scene.params[3] = frozen
    if spec.name == "Adagrad":
        scene.optimizer.state[frozen] = {"step": torch.tensor(0.0), "sum": torch.zeros(6)}
    with torch.inference_mode():
        frozen.grad = torch.ones(6)
    scene.refused("inference")


def test_exceptions_from_closure_and_hooks(spec):
    scene = Scene(spec)
    before = snapshot(scene.optimizer)

    def closure():
        raise LookupError("from the closure")

    def hook(*_):
        raise LookupError("from the hook")

    with pytest.raises(LookupError, match="closure"):
        scene.optimizer.step(closure)
    assert snapshot(scene.optimizer) == before
    handle = scene.optimizer.register_step_pre_hook(hook)
    with pytest.raises(LookupError, match="hook"):
        scene.optimizer.step()
    handle.remove()
    assert snapshot(scene.optimizer) == before
    scene.works()


# Faults from below: any operation of torch may fail, for want of memory for one.


class Fault(Exception):
    pass


class PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@scenes()
def test_names_survive_a_mode(spec, place, named, steps):
    """Which hands on what the op raises, but not which tensor it was about."""
    scene = Scene(spec, place, named, steps)
    right, kept = scene.param.grad, scene.param.data
    scene.param.data = torch.zeros(9)
    scene.param.grad = torch.zeros(9)
    scene.param.data = kept
    with PassThrough():
        scene.refused("grad", "[9]", str(list(kept.shape)))
        scene.param.grad = right
        scene.works()


def test_names_survive_a_mode_in_an_average():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    model[1].weight.data = torch.zeros(5, 5)
    for mode in (nullcontext(), PassThrough()):
        with mode, pytest.raises((RuntimeError, ValueError), match="1.weight"):
            averaged.update_parameters(model)


class FailAt(TorchDispatchMode):
    """Raises instead of running the n-th operation."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "profiler":  # the profiler's own marks are not the step's
            if self.left == 0:
                raise Fault(str(func))
            self.left -= 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "third step"])
def test_faults_at_every_operation(spec, steps):
    """Whichever operation of a step fails, up to the first that writes, nothing has changed; then the step succeeds."""
    for dtype in filter(spec.takes, (torch.float32, torch.complex64)):
        scene = Scene(spec, steps=steps, dtype=dtype)
        failures = 0
        while True:
            before = snapshot(scene.optimizer)
            try:
                with FailAt(failures):
                    scene.optimizer.step()
                break
            except Fault as fault:
                failures += 1
                if "optim_ext" in str(fault) and snapshot(scene.optimizer) != before:
                    break  # the second group's op, made to fail after the first has run
                assert snapshot(scene.optimizer) == before, str(fault)
        assert failures > 0
    scene = Scene(spec, steps=steps)
    with pytest.raises(Fault), FailAt(0):
        scene.optimizer.step()
    scene.works()


def test_failed_first_step_makes_no_state(spec):
    """State that was being made when the step failed is not left behind, half-made or whole."""
    scene = Scene(spec, steps=0)
    keys = {id(p): set(e) for p, e in scene.optimizer.state.items()}
    scene.param.data = torch.zeros(3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shape"):
            scene.optimizer.step()
        assert {id(p): set(e) for p, e in scene.optimizer.state.items()} == keys
