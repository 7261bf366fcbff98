"""AveragedModel: torch's own class as the twin, float64 as the judge, and what torch's class does not have."""

import copy
import io
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
from device import DEVICE, ON_CPU
from lockstep import bits, native_ops
from torch import nn
from torch.optim import swa_utils as theirs

from optim_ext import swa_utils as ours
from optim_ext._averaging.rules import Ema, Mean

FUNCTIONS = {
    "default": lambda module: {},
    "swa": lambda module: {"avg_fn": module.get_swa_avg_fn()},
    "swa multi": lambda module: {"multi_avg_fn": module.get_swa_multi_avg_fn()},
    "ema": lambda module: {"avg_fn": module.get_ema_avg_fn(0.9)},
    "ema multi": lambda module: {"multi_avg_fn": module.get_ema_multi_avg_fn(0.9)},
    "own": lambda module: {"avg_fn": lambda average, param, n: 0.7 * average + 0.3 * param},
    "own multi": lambda module: {
        "multi_avg_fn": lambda averages, params, n: torch._foreach_lerp_(averages, params, 0.3)
    },
}


def in_lists(function):
    """Whether torch averages all tensors in one call: by default so on other devices than the CPU."""
    return "multi" in function or (function == "default" and not ON_CPU)


def network(dtype=torch.float32, norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    tied = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(4, 6), norm(6), nn.ReLU(), tied, tied, nn.Linear(6, 2)).to(dtype)


def change(model, seed):
    """As training does: parameters, and the buffers of the norm with their integer count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
        for b in model.buffers():
            b.add_(1 if not b.is_floating_point() else 0.25 * seed)


def pair(function, model=None, **options):
    model = network() if model is None else model
    make = FUNCTIONS[function]
    return model, *(m.AveragedModel(model, **make(m), **options) for m in (ours, theirs))


def single(function, model=None, **options):
    model = network() if model is None else model
    return model, ours.AveragedModel(model, **FUNCTIONS[function](ours), **options)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_equals_torch(function, use_buffers):
    norm = nn.Identity if use_buffers and in_lists(function) else nn.BatchNorm1d  # torch divides no integers there
    model, mine, other = pair(function, network(norm=lambda n: norm(n)), use_buffers=use_buffers)
    for step in range(6):
        change(model, step)
        for averaged in (mine, other):
            averaged.update_parameters(model)
        assert mine.state_dict().keys() == other.state_dict().keys()
        for (name, a), b in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("function", ["default", "swa", "swa multi", "ema", "ema multi"])
def test_integer_buffers_are_truncated_at_each_update(function):
    model = nn.BatchNorm1d(3)
    averaged = ours.AveragedModel(model, **FUNCTIONS[function](ours), use_buffers=True)
    for count in (1, 2, 3):
        model.num_batches_tracked.fill_(count)
        averaged.update_parameters(model)
    assert averaged.module.num_batches_tracked.item() == 1
    assert averaged.n_averaged.item() == 3


@pytest.mark.parametrize("function", ["default", "swa multi", "ema", "ema multi"])
def test_one_native_call(function):
    model, mine = single(function)
    for _ in range(2):
        assert native_ops(lambda: mine.update_parameters(model)) == ["optim_ext::average_"]


def test_functions_called_by_torchs_class():
    model = network()
    for name in ("ema", "ema multi", "swa", "swa multi"):
        mixed = theirs.AveragedModel(model, **FUNCTIONS[name](ours))
        pure = theirs.AveragedModel(model, **FUNCTIONS[name](theirs))
        for step in range(4):
            change(model, step)
            for averaged in (mixed, pure):
                averaged.update_parameters(model)
        for a, b in zip(mixed.parameters(), pure.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_first_update_copies_what_is_not_finite():
    model = nn.Linear(2, 2)
    averaged = ours.AveragedModel(model)
    with torch.no_grad():
        averaged.module.weight.fill_(float("nan"))
        averaged.module.bias.fill_(float("inf"))
    averaged.update_parameters(model)
    assert all(bits(a) == bits(p) for a, p in zip(averaged.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["swa", "ema", "warm-up"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_thousand_updates(dtype, kind):
    """A float32 average against one in float64 of the very same parameters."""
    model = nn.Linear(20, 5).to(dtype)
    functions = {
        "swa": {},
        "ema": {"multi_avg_fn": ours.get_ema_multi_avg_fn(0.9999)},
        "warm-up": {"multi_avg_fn": ours.get_ema_multi_avg_fn(ours.get_warmup_decay(0.9995))},
    }
    averaged = ours.AveragedModel(model, dtype=torch.float32, **functions[kind])
    exact = [p.detach().double() for p in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    for n in range(10_000):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
        averaged.update_parameters(model)
        decay = {"swa": n / (n + 1), "ema": 0.9999, "warm-up": min(0.9995, 1 - (1 + n) ** (-2 / 3))}[kind]
        for e, p in zip(exact, model.parameters(), strict=True):
            e.lerp_(p.detach().double(), 1.0 if n == 0 else 1 - decay)
    # Each update rounds by at most 2 ** -24 of the value. 10,000 independent roundings add up to a hundred of those,
    # where all of them are remembered in full, and the largest of a hundred numbers lies within four times that.
    once = 2.0**-24
    errors = []
    for a, e in zip(averaged.parameters(), exact, strict=True):
        assert a.dtype == torch.float32
        errors.append(((a.detach().double() - e) / e).flatten())
    assert torch.cat(errors).square().mean().sqrt() < 100 * once and torch.cat(errors).abs().max() < 400 * once


def test_an_average_in_bfloat16_would_not_move():
    """Why dtype= is there: 0.001 of a small difference is less than half a unit in the last place of bfloat16."""
    model = nn.Linear(4, 4).bfloat16()
    ema = {"multi_avg_fn": ours.get_ema_multi_avg_fn(0.999)}
    narrow, wide = ours.AveragedModel(model, **ema), ours.AveragedModel(model, **ema, dtype=torch.float32)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for averaged in (narrow, wide):
        averaged.update_parameters(model)
    with torch.no_grad():
        model.weight.fill_(1.5)
    for _ in range(1000):
        for averaged in (narrow, wide):
            averaged.update_parameters(model)
    assert (narrow.module.weight == 1).all() and (wide.module.weight > 1.3).all()


@pytest.mark.parametrize(
    "model_dtype, dtype, expected",
    [
        (torch.float32, torch.float64, torch.float64),
        (torch.float16, torch.float32, torch.float32),
        (torch.complex64, torch.float64, torch.complex128),
        (torch.float32, None, torch.float32),
    ],
    ids=str,
)
def test_dtype(model_dtype, dtype, expected):
    model = nn.Linear(3, 3).to(model_dtype)
    averaged = ours.AveragedModel(model, dtype=dtype)
    assert {p.dtype for p in averaged.parameters()} == {expected}
    for _ in range(3):
        averaged.update_parameters(model)
    for a, p in zip(averaged.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.to(p.dtype), p)


def test_dtype_keeps_ties_and_serves_functions_of_the_user():
    model = network(torch.bfloat16, norm=lambda n: nn.Identity())
    averaged = ours.AveragedModel(model, dtype=torch.float32, **FUNCTIONS["own multi"](ours))
    assert averaged.module[3].weight is averaged.module[4].weight
    for step in range(2):
        change(model, step)
        averaged.update_parameters(model)
    assert averaged.module[0].weight.dtype == torch.float32


# --- copying and swapping


def test_copy_to():
    model, averaged = single("default", network(torch.bfloat16), dtype=torch.float32)
    for step in range(3):
        change(model, step)
        averaged.update_parameters(model)
    target = network(torch.bfloat16)
    averaged.copy_to(target)
    for a, t in zip(averaged.module.state_dict().values(), target.state_dict().values(), strict=True):
        assert torch.equal(a.to(t.dtype), t)
    with pytest.raises(ValueError, match="'weight' of the model has shape"):
        averaged_line = ours.AveragedModel(nn.Linear(2, 2))
        averaged_line.copy_to(nn.Linear(3, 2))


@pytest.mark.parametrize("fails", [False, True])
def test_swap_into(fails):
    model, averaged = single("default", network(torch.bfloat16), dtype=torch.float32)
    for step in range(3):
        change(model, step)
        averaged.update_parameters(model)
    own = {name: bits(t) for name, t in model.state_dict().items()}
    average = {name: bits(t) for name, t in averaged.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    with pytest.raises(KeyError) if fails else nullcontext(), averaged.swap_into(model) as swapped:
        assert swapped is model
        for a, p in zip(averaged.module.parameters(), model.parameters(), strict=True):
            assert torch.equal(a.bfloat16(), p)
        model(torch.ones(4, 4, dtype=torch.bfloat16))  # in training mode: the norm's buffers change
        if fails:
            raise KeyError
    assert {name: bits(t) for name, t in model.state_dict().items()} == own
    assert {name: bits(t) for name, t in averaged.state_dict().items()} == average
    assert [id(p) for p in model.parameters()] == identities


def test_swap_into_another_model_changes_nothing():
    averaged, other = ours.AveragedModel(nn.Linear(2, 2)), nn.Linear(3, 2)
    kept = [bits(p) for p in other.parameters()]
    with pytest.raises(ValueError, match="has shape"), averaged.swap_into(other):
        raise AssertionError("not reached")
    assert [bits(p) for p in other.parameters()] == kept


# --- when and how much


def test_update_every():
    model = nn.Linear(1, 1)
    averaged = ours.AveragedModel(model, update_every=3)
    seen = []
    for step in range(7):
        with torch.no_grad():
            model.weight.fill_(step)
        averaged.update_parameters(model)
        seen.append((averaged.n_averaged.item(), averaged.module.weight.item()))
    assert seen == [(1, 0), (1, 0), (1, 0), (2, 1.5), (2, 1.5), (2, 1.5), (3, 3.0)]


def test_decay_as_a_function():
    asked = []

    def decay(n):
        asked.append(n)
        return n / 10

    model = nn.Linear(1, 1)
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(decay))
    expected = 0.0
    for step in range(5):
        with torch.no_grad():
            model.weight.fill_(step)
        averaged.update_parameters(model)
        expected = step if step == 0 else step / 10 * expected + (1 - step / 10) * step
    assert asked == [1, 2, 3, 4]
    assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_named_decays():
    warm = ours.get_warmup_decay(0.99, gamma=2.0, power=0.75)
    assert warm(0) == 0 and warm(4) == pytest.approx(1 - 3**-0.75) and warm(10**6) == 0.99
    assert warm(torch.tensor(4.0, dtype=torch.float64)).item() == pytest.approx(warm(4))
    assert warm(torch.tensor(1e6)).item() == pytest.approx(0.99)
    power = ours.get_power_decay(6.94)
    assert power(0) == 0 and power(9) == pytest.approx(0.9**7.94)
    assert power(torch.tensor(9.0, dtype=torch.float64)).item() == pytest.approx(power(9))


def test_weight_on_a_device_is_the_weight_on_the_host():
    """The form used where the count lives on a GPU, in tensor operations only."""
    rules = (Mean(), Ema(0.9), Ema(ours.get_warmup_decay()), Ema(lambda n: 1 - 1 / (n + 1)))
    for rule in rules:
        for n in (1, 2, 1000):
            on_device = rule.weight(torch.tensor(float(n), dtype=torch.float64))
            assert float(on_device) == pytest.approx(rule.weight(n), rel=1e-12)


# --- checkpoints and copies


@pytest.mark.parametrize("options", [{}, {"use_buffers": True}], ids=["", "buffers"])
def test_checkpoints_both_ways(options):
    norm = nn.Identity if options and in_lists("default") else nn.BatchNorm1d
    model, mine, other = pair("default", network(norm=lambda n: norm(n)), **options)
    for step in range(3):
        change(model, step)
        mine.update_parameters(model)
    file = io.BytesIO()
    torch.save(mine.state_dict(), file)
    file.seek(0)
    assert not any(other.load_state_dict(torch.load(file)))
    back = ours.AveragedModel(model, **options)
    assert not any(back.load_state_dict(other.state_dict()))
    change(model, 3)
    for averaged in (mine, other, back):
        averaged.update_parameters(model)
    for a, b, c in zip(
        mine.state_dict().values(), other.state_dict().values(), back.state_dict().values(), strict=True
    ):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_calls_between_updates_survive_a_checkpoint():
    model = nn.Linear(1, 1)
    averaged = ours.AveragedModel(model, update_every=3)
    for _ in range(2):
        averaged.update_parameters(model)
    file = io.BytesIO()
    torch.save({"averaged": averaged.state_dict()}, file)
    file.seek(0)
    resumed = ours.AveragedModel(model, update_every=3)
    resumed.load_state_dict(torch.load(file)["averaged"])
    for a in (averaged, resumed):
        a.update_parameters(model)
        a.update_parameters(model)
    assert averaged.n_averaged.item() == resumed.n_averaged.item() == 2
    assert not any(theirs.AveragedModel(model).load_state_dict(averaged.state_dict()))


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("function", ["default", "ema multi", "swa"])
def test_copies(function, how):
    model, averaged = single(function, update_every=2, dtype=torch.float64)
    for step in range(3):
        change(model, step)
        averaged.update_parameters(model)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(averaged))
    elif how == "deepcopy":
        twin = copy.deepcopy(averaged)
    else:
        file = io.BytesIO()
        torch.save(averaged, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for step in range(3, 6):
        change(model, step)
        for a in (averaged, twin):
            a.update_parameters(model)
    assert [bits(t) for t in averaged.state_dict().values()] == [bits(t) for t in twin.state_dict().values()]
    assert averaged.n_averaged.data_ptr() != twin.n_averaged.data_ptr()


# --- what changes between updates is seen


def test_replaced_tensors_are_followed():
    model, averaged, twin = pair("ema multi")

    def check():
        for a in (averaged, twin):
            a.update_parameters(model)
        for a, b in zip(averaged.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)

    check()
    model[0].weight = nn.Parameter(torch.ones(6, 4))
    check()
    model[0].weight.data = torch.full((6, 4), 2.0)
    check()
    model[1].running_mean = torch.full((6,), 3.0)
    check()
    model[5] = nn.Linear(6, 2)
    check()
    for a in (averaged, twin):
        a.module[0].bias = nn.Parameter(torch.zeros(6))
    check()
    model.half()
    model.float()
    check()
    other = network()
    change(other, 9)
    model = other
    check()
    averaged.use_buffers = twin.use_buffers = True
    model = nn.Sequential(*model[:1], nn.Identity(), *model[2:])
    averaged, twin = (m.AveragedModel(model, **FUNCTIONS["ema multi"](m)) for m in (ours, theirs))
    check()


def test_modules_that_list_their_parameters_themselves():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))

        def named_parameters(self, *args, **kwargs):
            yield from reversed(list(super().named_parameters(*args, **kwargs)))

    model = Reversed()
    averaged = ours.AveragedModel(model)
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            model.a.fill_(value)
            model.b.fill_(-value)
        averaged.update_parameters(model)
    assert averaged.module.a.tolist() == [3, 3] and averaged.module.b.tolist() == [-3, -3, -3]


def test_the_model_is_not_kept_alive():
    import gc

    model, averaged = single("default")
    averaged.update_parameters(model)
    gone = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_replaced_tensors_are_not_kept_alive():
    model, averaged = single("default")
    averaged.update_parameters(model)
    gone = [weakref.ref(own) for root in (model, averaged.module) for own in root.parameters()]
    for root in (model, averaged.module):
        for module in root.modules():
            for name, own in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(own.detach().clone()))
    del own
    assert [ref() for ref in gone] == [None] * len(gone)
    averaged.update_parameters(model)


def test_a_wrapped_model_is_averaged_by_order():
    model, averaged = single("default")
    averaged.update_parameters(model)
    wrapper = nn.ModuleDict({"module": model})
    change(model, 1)
    averaged.update_parameters(wrapper)
    assert averaged.n_averaged.item() == 2


# --- bad input


def refused(averaged, model, problem):
    kept = [bits(t) for t in averaged.state_dict().values()]
    with pytest.raises(ValueError, match=problem):
        averaged.update_parameters(model)
    assert [bits(t) for t in averaged.state_dict().values()] == kept


@pytest.mark.parametrize("function", ["default", "ema multi", "own"])
def test_models_that_do_not_match(function):
    def averaged(model, **options):
        return ours.AveragedModel(model, **FUNCTIONS[function](ours), **options)

    refused(
        averaged(nn.Linear(2, 2)), nn.Linear(2, 2, bias=False), "2 parameters and the model 1; 'bias' of the average"
    )
    refused(
        averaged(nn.Linear(2, 2)), nn.Linear(2, 3), r"'weight' of the model has shape \(3, 2\), its average \(2, 2\)"
    )
    refused(
        averaged(nn.Linear(2, 2)), nn.Linear(2, 2).to(torch.complex64), "'weight' of the model is of torch.complex64"
    )
    refused(
        averaged(nn.Linear(2, 2)),
        nn.Linear(2, 2, device="meta"),
        f"'weight': the model's is on meta, its average on {DEVICE}",
    )
    bare = nn.BatchNorm1d(2, track_running_stats=False)
    refused(averaged(nn.BatchNorm1d(2)), bare, "3 buffers and the model 0; 'num_batches_tracked'")


@pytest.mark.parametrize("every", [0, -1, 1.5, "2"])
def test_update_every_is_checked(every):
    with pytest.raises(ValueError, match="update_every must be a positive whole number"):
        ours.AveragedModel(nn.Linear(1, 1), update_every=every)


def test_options_are_checked():
    with pytest.raises(ValueError, match="dtype must be a floating point type"):
        ours.AveragedModel(nn.Linear(1, 1), dtype=torch.long)
    with pytest.raises(AssertionError, match="Only one of avg_fn and multi_avg_fn"):
        ours.AveragedModel(nn.Linear(1, 1), avg_fn=ours.get_swa_avg_fn(), multi_avg_fn=ours.get_swa_multi_avg_fn())
    for make in (ours.get_ema_avg_fn, ours.get_ema_multi_avg_fn, ours.get_warmup_decay):
        for decay in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="Invalid decay value"):
                make(decay)
    for arguments in ({"gamma": 0.0}, {"power": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            ours.get_warmup_decay(**arguments)
    with pytest.raises(ValueError, match="gamma must be positive"):
        ours.get_power_decay(0.0)


def test_a_decay_function_out_of_range_writes_nothing():
    model = nn.Linear(2, 2)
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(lambda n: 2 - 1 / n))
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    refused(averaged, model, "Invalid decay value 1.5")
    assert averaged.n_averaged.item() == 2


def test_the_rest_is_torchs():
    assert ours.SWALR is theirs.SWALR and ours.update_bn is theirs.update_bn
    assert set(theirs.__all__) <= set(ours.__all__)
    assert issubclass(ours.AveragedModel, theirs.AveragedModel)
