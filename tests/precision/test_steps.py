"""Steps of parameters that are kept more exactly than their 16 bits, and of state in fewer bits than theirs."""

import copy
import math

import pytest
import torch
from kept import MUON, SHAPES, TAKING, WAYS, everything, give_grads, make, name_of, same, train, value_of
from lockstep import copy_of, random

import optim_ext as optim
from optim_ext._precision import values
from optim_ext._tables import TABLES
from optim_ext.swa_utils import AveragedModel, get_ema_multi_avg_fn

ADAMW = next(spec for spec in TAKING if spec.name == "AdamW")
PAIRS = ("master", "remainder", "kahan")


@pytest.fixture(params=TAKING, ids=lambda spec: spec.name)
def taking(request):
    return request.param


@pytest.fixture(params=WAYS, ids=name_of)
def way(request):
    return request.param


# So many steps at such a rate move ones by a tenth. (Muon spreads a step over the matrix.)
TENTH = {"AdamW": (1000, 1e-4), "Adafactor": (200, 5e-4), "Muon": (200, 5 * 93e-4)}


def one_parameter(name="AdamW", dtype=torch.bfloat16, **options):
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    return getattr(optim, name)([p], **options), p


def test_in_its_own_precision_one_never_moves():
    optimizer, p = one_parameter(lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.eq(1.0).all()


def moved_by_a_tenth(name, **options):
    steps, lr = TENTH[name]
    optimizer, p = one_parameter(name, lr=lr, weight_decay=0.0, **options)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer, p


@pytest.fixture(scope="module", params=TENTH)
def moved_in_float32(request):
    """A class, and where a float32 parameter of ones comes to."""
    value = moved_by_a_tenth(request.param, dtype=torch.float32)[1].mean().item()
    assert 0.88 < value < 0.92
    return request.param, value


def test_one_moves_to_nine_tenths_in_every_way(way, moved_in_float32):
    name, expected = moved_in_float32
    optimizer, p = moved_by_a_tenth(name, **way)
    off = 2e-3 if way["state_precision"] == "q8" else 1e-3
    assert value_of(optimizer, p).mean().item() == pytest.approx(expected, abs=off)
    assert p.float().mean().item() == pytest.approx(expected, abs=4e-3)


@pytest.mark.parametrize("name", TENTH)
def test_decay_alone_shrinks_one_in_every_way(way, name):
    steps, _ = TENTH[name]
    optimizer, p = one_parameter(name, lr=10 / steps, weight_decay=1e-2, **way)
    for _ in range(steps):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert value_of(optimizer, p).mean().item() == pytest.approx(math.exp(-0.1), abs=4e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_master_has_the_bits_of_a_float32_parameter(taking, dtype):
    """Also its state: the rule sees float32, and the gradient widened."""
    optimizer, params = make(taking, {"param_precision": "master"}, dtype=dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    reference = taking.ours(wide, **taking.typical)
    for step in range(6):
        give_grads(params, step)
        for p, other in zip(params, wide, strict=True):
            other.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for p, other in zip(params, wide, strict=True):
        assert torch.equal(optimizer.state[p]["master_param"], other)
        assert torch.equal(p, other.to(dtype))
        for key, value in reference.state[other].items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("state", ["fp32", "bf16", "q8"])
def test_a_rule_sees_what_is_kept(taking, state):
    """A step is that of a float32 parameter with what the state says: norms of whole tensors, too, are those of the master."""
    optimizer, (p,) = make(taking, {"param_precision": "master", "state_precision": state}, shapes=((64, 100),))
    train(optimizer, [p], 2)
    for step in range(2, 5):
        entry = optimizer.state[p]
        wide = torch.nn.Parameter(entry["master_param"].clone())
        reference = taking.ours([wide], **copy_of(taking.typical))
        plain = {key: copy.deepcopy(value) for key, value in entry.items() if not values.is_ours(key)}
        seen = {key: values.state_value(p, entry, key) for key in TABLES[taking.op].places}
        reference.state[wide] = plain | {key: value.float().clone() for key, value in seen.items() if value is not None}
        give_grads([p], step)
        wide.grad = p.grad.float()
        optimizer.step()
        reference.step()
        assert torch.equal(entry["master_param"], wide)


def test_a_remainder_is_its_master_bit_for_bit(taking):
    ours, params = make(taking, {"param_precision": "remainder"})
    theirs, others = make(taking, {"param_precision": "master"})
    for step in range(20):
        train(ours, params, 1, step)
        train(theirs, others, 1, step)
        for p, other in zip(params, others, strict=True):
            assert torch.equal(value_of(ours, p), theirs.state[other]["master_param"])


def test_a_remainder_is_its_master_over_ten_thousand_steps():
    ours, params = make(next(s for s in TAKING if s.name == "AdamW"), {"param_precision": "remainder"}, {}, [(96,)])
    theirs, others = make(next(s for s in TAKING if s.name == "AdamW"), {"param_precision": "master"}, {}, [(96,)])
    grads = [random((96,), torch.bfloat16, seed) for seed in range(50)]
    for step in range(10_000):
        params[0].grad = others[0].grad = grads[step % 50]
        ours.step()
        theirs.step()
    assert torch.equal(value_of(ours, params[0]), theirs.state[others[0]]["master_param"])


def test_what_somebody_writes_to_a_parameter_counts():
    """A master that is older than its parameter does not overwrite it."""
    for precision in PAIRS:
        optimizer, p = one_parameter(lr=1e-4, weight_decay=0.0, param_precision=precision)
        p.grad = torch.ones_like(p)
        optimizer.step()
        with torch.no_grad():
            p.fill_(3.0)
        optimizer.step()
        assert value_of(optimizer, p).mean().item() == pytest.approx(3.0, abs=0.02), precision


def test_the_same_bits_on_any_number_of_threads(taking, way):
    shapes = (*SHAPES, (300, 100), (129, 1000))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            optimizer, params = make(taking, way, shapes=shapes)
            train(optimizer, params, 3)
            found.append(everything(optimizer))
    finally:
        torch.set_num_threads(before)
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_the_same_bits_for_gradients_in_any_order_of_memory(taking, way):
    shapes = ((40, 120), (64, 100))
    found = []
    for transposed in (False, True):
        optimizer, params = make(taking, way, shapes=shapes)
        for step in range(3):
            give_grads(params, step)
            for p in params:
                p.grad = p.grad.t().contiguous().t() if transposed else p.grad
            optimizer.step()
        found.append(everything(optimizer))
    assert same(*found)


def test_parameters_that_are_views_keep_their_values(taking, way):
    """A view with gaps has the bits of a parameter of its own."""
    found = []
    for gaps in (False, True):
        value = random((40, 60), torch.bfloat16, 1)
        storage = torch.zeros(40, 70, dtype=torch.bfloat16)
        storage[:, :60] = value
        p = torch.nn.Parameter(storage[:, :60] if gaps else value)
        optimizer = taking.ours([p], **taking.typical, **way, min_q8_size=1)
        train(optimizer, [p], 3)
        found.append(everything(optimizer))
        assert storage[:, 60:].eq(0).all()
    assert same(*found)


def test_parameters_that_overlap_go_in_turns(taking):
    """With what lies beside each of them."""
    found = []
    for together in (True, False):
        memory = random((40, 20), torch.bfloat16, 1)
        params = [torch.nn.Parameter(memory[:24]), torch.nn.Parameter(memory[16:])]
        groups = [params] if together else [params[:1], params[1:]]
        optimizers = [taking.ours(group, **copy_of(taking.typical), param_precision="kahan") for group in groups]
        for step in range(3):
            give_grads(params, step)
            for optimizer in optimizers:
                optimizer.step()
        found.append([bits for optimizer in optimizers for bits in everything(optimizer)])
    assert same(*found)


def test_clipping_and_skipping_in_every_way(taking, way):
    """Half a gradient by clipping is half a gradient, and a skipped step draws no words and changes no bit."""
    clipped, params = make(taking, way, shapes=((64, 100),))
    halved, others = make(taking, way, shapes=((64, 100),))
    clipped.set_grad_policy(max_norm=1e30, skip_nonfinite=True)
    for step in range(3):
        train(clipped, params, 1, step)
        train(halved, others, 1, step)
        before = everything(clipped)
        params[0].grad = torch.full_like(params[0], math.inf)
        clipped.step()
        assert same(before, everything(clipped))
    assert same(everything(clipped), everything(halved))


def test_gradscaler_hands_the_rule_the_unrounded_gradient():
    p, q = (torch.nn.Parameter(random((64, 100), torch.bfloat16, 3)) for _ in range(2))
    ours = optim.AdamW([p], fused=True, param_precision="master")
    wide = torch.nn.Parameter(q.detach().float())
    reference = optim.AdamW([wide], fused=True)
    for step in range(3):
        p.grad = random(p.shape, torch.bfloat16, step)
        wide.grad = p.grad.float()
        for optimizer in (ours, reference):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
            optimizer.step()
    assert torch.equal(ours.state[p]["master_param"], wide)


def test_gradients_are_unscaled_in_place_once(taking, way):
    """Also by rules that sweep twice: those of GradScaler are divided by four, and the step is that of what is left."""
    scaled, params = make(taking, way, shapes=((64, 100), (7,)))
    plain, others = make(taking, way, shapes=((64, 100), (7,)))
    scaled._step_supports_amp_scaling = True
    for step in range(3):
        give_grads(params, step)
        give_grads(others, step)
        for p in params:
            p.grad.mul_(4)
        scaled.grad_scale, scaled.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        scaled.step()
        plain.step()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, others, strict=True))
    assert same(everything(scaled), everything(plain))


@pytest.mark.parametrize("name", TENTH)
def test_averages_follow_the_parameters_bit_for_bit(way, name):
    def run(inside):
        model = torch.nn.Linear(100, 64, bias=name != MUON.name, dtype=torch.bfloat16)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(random(p.shape, torch.bfloat16, 5 + i))
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = getattr(optim, name)(model.parameters(), **way)
        if inside:
            optimizer.average_into(averaged)
        for step in range(4):
            give_grads(list(model.parameters()), step)
            optimizer.step()
            if not inside:
                averaged.update_parameters(model)
        return [p.detach().view(torch.uint8) for p in averaged.parameters()], everything(optimizer)

    (ours, state), (theirs, other_state) = run(True), run(False)
    assert same(ours, theirs) and same(state, other_state)


def test_only_some_parameters_have_gradients(way):
    """Those without one get no state, and the others the bits they have alone."""
    spec = next(s for s in TAKING if s.name == "AdamW")
    optimizer, params = make(spec, way, shapes=((64, 100), (7,), (64, 100)))
    alone, others = make(spec, way, shapes=((64, 100), (7,), (64, 100)))
    for step in range(3):
        give_grads(params, step)
        give_grads(others, step)
        if step == 1:
            params[1].grad = None
        else:
            params[0].grad = None
        others[0].grad = params[0].grad
        others[1].grad = params[1].grad
        optimizer.step()
        alone.step()
    assert same(everything(optimizer), everything(alone))


def test_a_dtype_without_lack_of_precision_is_left_alone():
    params = [
        torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.complex64)
    ]
    optimizer = optim.AdamW(params, param_precision="remainder")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert {key for entry in optimizer.state.values() for key in entry} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("precision", ["master", "stochastic", "native"])
def test_a_default_that_depends_on_the_dtype_is_that_of_what_the_rule_sees(precision):
    """Adafactor's eps: of float32, unless the parameter is native."""
    found = []
    for eps in (None, torch.finfo(torch.bfloat16 if precision == "native" else torch.float32).eps):
        p = torch.nn.Parameter(random((17, 33), torch.bfloat16, 1))
        optimizer = optim.Adafactor([p], lr=0.1, eps=(eps, 1e-3), param_precision=precision)
        for step in range(3):
            p.grad = random(p.shape, torch.bfloat16, step) * 1e-4
            optimizer.step()
        found.append(everything(optimizer))
    assert same(*found)


def test_auto_chooses_by_dtype():
    params = [
        torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    optimizer = optim.AdamW(params, param_precision="auto")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert ["param_remainder" in optimizer.state[p] for p in params] == [True, False, False]
    assert ["master_param" in optimizer.state[p] for p in params] == [False, True, False]


def resumed(optimizer, params, steps, first):
    """What an optimizer makes of the same state that has taken no step itself."""
    params = copy.deepcopy(params)
    names = ("param_precision", "state_precision")
    kept = {name: optimizer.defaults[name] for name in names if name in optimizer.defaults}
    other = optim.AdamW(params, **kept)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, params, steps, first)
    return everything(other)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32, torch.float16)])
def test_a_module_may_be_given_another_dtype_between_steps(dtypes):
    params = [torch.nn.Parameter(random((64, 100), dtypes[0], i)) for i in range(2)]
    optimizer = optim.AdamW(params, param_precision="auto", state_precision="q8")
    for number, dtype in enumerate(dtypes):
        for p in params:
            p.grad = None
            p.data = p.data.to(dtype)
        expected = resumed(optimizer, params, 3, 3 * number)
        train(optimizer, params, 3, 3 * number)
        assert same(everything(optimizer), expected)
        assert ("param_remainder" in optimizer.state[params[0]]) == (dtype is torch.bfloat16)


def test_a_parameter_may_be_laid_out_otherwise_between_steps(way):
    params = [torch.nn.Parameter(random((64, 100), torch.bfloat16, 0))]
    optimizer = optim.AdamW(params, **way)
    train(optimizer, params, 3)
    params[0].data = params[0].data.t().contiguous().t()
    expected = resumed(optimizer, params, 3, 3)
    train(optimizer, params, 3, first=3)
    assert same(everything(optimizer), expected)


def test_a_mapping_among_the_options_may_be_written_to():
    optimizer, params = make(ADAMW, {"state_precision": {"exp_avg": "q8"}})
    train(optimizer, params, 2)
    optimizer.param_groups[0]["state_precision"]["exp_avg"] = "bf16"
    train(optimizer, params, 1, first=2)
    assert {optimizer.state[p]["exp_avg"].dtype for p in params} == {torch.bfloat16}


def test_state_that_a_group_has_no_use_for_waits(way):
    """As it does where torch keeps it; a checkpoint has it, too."""
    optimizer, params = make(ADAMW, way, {"amsgrad": True}, shapes=[(64, 100), (7,)])
    train(optimizer, params, 2)
    entry = optimizer.state[params[0]]
    largest = {key: value.clone() for key, value in entry.items() if key.startswith("max_exp_avg_sq")}
    optimizer.param_groups[0]["amsgrad"] = False
    train(optimizer, params, 1, first=2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert largest and all(torch.equal(optimizer.state[params[0]][key], value) for key, value in largest.items())
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, params, 1, first=3)


def test_a_group_overrides_the_constructor():
    params = [torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "param_precision": "kahan"}]
    optimizer = optim.AdamW(groups, param_precision="remainder")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert "param_remainder" in optimizer.state[params[0]] and "kahan_comp" in optimizer.state[params[1]]


def test_defaults_add_no_keys():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ours = optim.AdamW([p], param_precision="native", state_precision="native", rounding_seed=0, min_q8_size=4096)
    assert ours.state_dict() == torch.optim.AdamW([p]).state_dict()


def test_infinities_and_nans_show(way):
    optimizer, params = make(next(s for s in TAKING if s.name == "AdamW"), way, {}, ((64, 100),))
    train(optimizer, params, 1)
    params[0].grad[3, 5] = math.nan
    optimizer.step()
    assert params[0][3, 5].isnan()
    optimizer, params = make(next(s for s in TAKING if s.name == "AdamW"), way, {}, ((64, 100),))
    with torch.no_grad():
        params[0][1, 2] = math.inf
    train(optimizer, params, 3)
    assert not params[0][1, 2].isfinite()


def test_seeds_and_names_choose_the_words():
    """Other seeds give other roundings; a parameter's name, not its place, makes its words."""

    def run(seed=0, names=("a", "b"), order=(0, 1)):
        params = [torch.nn.Parameter(random((64, 64), torch.bfloat16, i)) for i in range(2)]
        named = [(names[i], params[i]) for i in order]
        optimizer = optim.AdamW(named, param_precision="stochastic", rounding_seed=seed)
        train(optimizer, params, 3)
        return [p.detach() for p in params]

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(order=(1, 0)), strict=True))
    assert not torch.equal(first[0], run(seed=1)[0])
    assert not torch.equal(first[0], run(names=("c", "b"))[0])


def test_copies_step_alike(way):
    optimizer, params = make(next(s for s in TAKING if s.name == "AdamW"), way)
    train(optimizer, params, 2)
    other = copy.deepcopy(optimizer)
    others = other.param_groups[0]["params"]
    train(optimizer, params, 2, 2)
    train(other, others, 2, 2)
    assert same(everything(optimizer), everything(other))
