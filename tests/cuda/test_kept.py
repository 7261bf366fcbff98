"""Parameters and state of CUDA tensors that are kept in other ways than torch keeps them: the bits of the CPU."""

import copy

import pytest
import torch
from kept import LAZY, NAMES_OF_TAKING_SPARSE, NOT_ASKED, TAKING, TAKING_SPARSE, WAYS, everything, name_of, shapes_for
from lockstep import bits, copy_of, random

import optim_ext
from optim_ext._precision import values
from optim_ext._precision.options import CODES
from optim_ext.swa_utils import AveragedModel, get_ema_multi_avg_fn

# Rows that end with a block of 64 or in the midst of one, or of 8 elements; more than a block of threads has at a time.
SHAPES = ((), (7,), (0,), (3, 5), (17, 33), (64, 100), (40, 192), (70, 3, 40), (20, 1032))
# Of all ways, those that have everything in some company; the others differ by what lies where.
FEW = [
    way
    for way in WAYS
    if tuple(way.values())
    in {("master", "native"), ("remainder", "q8"), ("kahan", "bf16"), ("stochastic", "native"), ("stochastic", "q8")}
]
ADAMW = next(spec for spec in TAKING if spec.name == "AdamW")


@pytest.fixture(params=TAKING, ids=lambda spec: spec.name)
def taking(request):
    return request.param


@pytest.fixture(params=WAYS, ids=name_of)
def way(request):
    return request.param


@pytest.fixture(params=FEW, ids=name_of)
def one_of_few(request):
    return request.param


def parameter(shape, dtype, seed, device, view=False):
    """With gaps and its dimensions in another order, if it is a view."""
    value = random(shape, dtype, seed, device)
    if view and value.dim() >= 2:
        room = torch.zeros(*(size + 3 for size in shape), dtype=dtype, device=device)
        part = room[tuple(slice(size) for size in shape)]
        value = part.copy_(value)
        if value.dim() > 2:  # the first dimension stays outermost
            value = value.transpose(1, 2).contiguous().transpose(1, 2)
    return torch.nn.Parameter(value)


def make(spec, way, device, shapes=SHAPES, dtype=torch.bfloat16, views=(), **options):
    taken = shapes_for(spec, shapes)
    params = [parameter(shape, dtype, i, device, i in views) for i, shape in enumerate(shapes) if shape in taken]
    return spec.ours(params, **copy_of(spec.typical, device), **way, min_q8_size=64, **options), params


def of_shape(params, *shape):
    return next(p for p in params if p.shape == shape)


def give_grads(params, step, turned=()):
    """Of any order of memory."""
    for i, p in enumerate(params):
        grad = random(p.shape, torch.bfloat16, 1000 * (step + 1) + i, p.device).to(p.dtype)
        p.grad = grad.mT.contiguous().mT if i in turned and grad.dim() > 1 else grad


def one_nan(p, entry, key):
    """With one kind of NaN: which one comes of arithmetic is the processor's to say, its sign included."""
    if key.endswith(CODES):  # of a block that is NaN as a whole the codes mean nothing
        entry = {name: value.cpu() for name, value in entry.items() if name.startswith(key.removesuffix(CODES))}
        value = values.state_value(p.detach().cpu(), entry, key.removesuffix(CODES))
    else:
        value = p.detach() if key == "" else entry[key]
    is_real = value.is_floating_point()
    return torch.where(value.isnan(), torch.full_like(value, float("nan")), value) if is_real else value


def assert_same_bits(on_gpu, on_cpu, seen=lambda p, entry, key: p if key == "" else entry[key]):
    mine, others = ([p for group in o.param_groups for p in group["params"]] for o in (on_gpu, on_cpu))
    for index, (p, other) in enumerate(zip(mine, others, strict=True)):
        entry, its = on_gpu.state[p], on_cpu.state[other]
        assert entry.keys() == its.keys()
        for key in ("", *its):
            found, expected = (torch.as_tensor(one) for one in (seen(p, entry, key), seen(other, its, key)))
            assert bits(found) == bits(expected), (index, key)


def compare(spec, way, device, steps=3, before_step=None, turned=(), seen=None, **made):
    (on_gpu, params), (on_cpu, others) = (make(spec, way, where, **made) for where in (device, "cpu"))
    for step in range(steps):
        for optimizer, its in ((on_gpu, params), (on_cpu, others)):
            give_grads(its, step, turned)
            if before_step is not None:
                before_step(optimizer, its, step)
            optimizer.step()
    assert_same_bits(on_gpu, on_cpu, *([seen] if seen else []))
    assert all(p.is_cuda for p in params)
    return on_gpu


def test_the_bits_of_the_cpu(taking, way, device):
    optimizer = compare(taking, way, device)
    kept = {key for entry in optimizer.state.values() for key in entry}
    rounds = taking.name not in ("ASGD", "Adafactor")
    assert any(key.endswith("::q8") for key in kept) == (way["state_precision"] == "q8" and rounds)


def test_memory_in_any_order(taking, way, device):
    """Parameters with gaps and in another order, gradients in a third one."""
    compare(taking, way, device, views=(3, 4, 5, 7), turned=(4, 6))


@pytest.mark.parametrize("way", [way for way in WAYS if way["param_precision"] in ("master", "kahan")], ids=name_of)
def test_half_precision_of_the_other_kind(taking, way, device):
    compare(taking, way, device, dtype=torch.float16, views=(4,))


@pytest.mark.parametrize("state", ["bf16", "q8"])
def test_parameters_in_float32(taking, state, device):
    compare(taking, {"state_precision": state}, device, dtype=torch.float32, views=(5,), turned=(6,))


def test_scaled_steps_and_one_that_is_skipped(taking, one_of_few, device):
    """As GradScaler tells them, on the device."""

    def told(optimizer, params, step):
        optimizer._step_supports_amp_scaling = True
        where = params[0].device
        optimizer.grad_scale = torch.tensor(4.0, device=where)
        optimizer.found_inf = torch.tensor(float(step == 1), device=where)
        if step == 1:
            of_shape(params, 64, 100).grad[0] = float("inf")

    compare(taking, one_of_few, device, steps=4, before_step=told, shapes=SHAPES[1:])


def test_skipped_steps_draw_nothing(taking, one_of_few, device):
    def told(optimizer, params, step):
        if step == 0:
            optimizer.set_grad_policy(max_norm=1.0, skip_nonfinite=True)
        if step == 2:
            of_shape(params, 64, 100).grad[3, 4] = float("nan")

    compare(taking, one_of_few, device, steps=4, before_step=told)


def test_infinities_and_nans(taking, one_of_few, device):
    def spoil(optimizer, params, step):
        if step == 1:
            of_shape(params, 64, 100).grad[3, 4] = float("nan")
            of_shape(params, 40, 192).grad[0, 1] = float("-inf")
        if step == 0:
            with torch.no_grad():
                of_shape(params, 17, 33)[1, 2] = float("inf")
                of_shape(params, 17, 33)[2, 2] = float("nan")

    compare(taking, one_of_few, device, before_step=spoil, views=(5,), seen=one_nan)


@pytest.mark.parametrize("masters", [False, True])
def test_averages(way, masters, device):
    found = []
    for where in (device, torch.device("cpu")):
        model = torch.nn.Linear(100, 64, dtype=torch.bfloat16, device=where)
        with torch.no_grad():
            model.weight.copy_(random((64, 100), torch.bfloat16, 5, where))
            model.bias.copy_(random((64,), torch.bfloat16, 6, where))
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), dtype=torch.float32)
        optimizer = optim_ext.AdamW(model.parameters(), **way)
        optimizer.average_into(average, masters=masters)
        for step in range(4):
            give_grads(list(model.parameters()), step)
            optimizer.step()
        found.append(([bits(p) for p in average.parameters()], everything(optimizer)))
    (averages, state), (others, other_state) = found
    assert averages == others
    assert all(torch.equal(one.cpu(), other) for one, other in zip(state, other_state, strict=True))


def test_nothing_waits_for_the_device(taking, one_of_few, device, no_sync):
    optimizer, params = make(taking, one_of_few, device)
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    give_grads(params, 2)
    with no_sync:
        optimizer.step()


@pytest.mark.parametrize(
    "captured", [spec for spec in TAKING if spec.name not in ("LAMB", "Adafactor")], ids=lambda spec: spec.name
)
def test_a_graph_draws_other_words_at_every_replay(captured, one_of_few, device):
    """Not LAMB and Adafactor, which count steps on the host."""
    (on_gpu, params), (on_cpu, others) = (
        make(captured, one_of_few, device, **captured.device_steps),
        make(captured, one_of_few, "cpu"),
    )
    for p in params:
        p.grad = torch.zeros_like(p)
    graph = None
    for step in range(6):
        give_grads(others, step)
        torch._foreach_copy_([p.grad for p in params], [p.grad for p in others])
        on_cpu.step()
        if graph is None:
            on_gpu.step()
            if step == 2:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    on_gpu.step()
        else:
            graph.replay()
    assert_same_bits(on_gpu, on_cpu)


def test_masters_and_checkpoints_cross_devices(taking, one_of_few, device):
    """State goes from one device to the other and on with the same bits, and so do masters."""
    (on_gpu, params), (on_cpu, others) = make(taking, one_of_few, device), make(taking, one_of_few, "cpu")
    for step in range(2):
        give_grads(others, step)
        on_cpu.step()
    with torch.no_grad():
        for p, other in zip(params, others, strict=True):
            p.copy_(other)
    on_gpu.load_state_dict(copy.deepcopy(on_cpu.state_dict()))
    for step in range(2, 4):
        give_grads(params, step)
        give_grads(others, step)
        on_gpu.step()
        on_cpu.step()
    assert_same_bits(on_gpu, on_cpu)
    masters = dict(on_gpu.master_params())
    assert all(bits(masters[name]) == bits(value) for name, value in on_cpu.master_params())
    doubled = {name: value * 2 for name, value in on_cpu.master_params()}
    on_gpu.load_master_params(doubled)
    on_cpu.load_master_params(doubled)
    assert_same_bits(on_gpu, on_cpu)


def test_the_norms_of_a_step(way, device):
    found = []
    for where in (device, torch.device("cpu")):
        optimizer, params = make(ADAMW, way, where)
        give_grads(params, 0)
        optimizer.step()
        give_grads(params, 1)
        with optimizer.measure_step() as norms:
            optimizer.step()
        (group,) = norms
        found.append([float(value) for value in (group.param, group.update)])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0][1] > 0.0


# Parameters and in how many dimensions their gradients are sparse: rows that end with a block of 64, in the midst of one and
# beyond what a block of threads has; in none; in two that cut no block; of one element.
SPARSE_SHAPES = (((40, 100), 1), ((20, 192), 1), ((16, 2500), 1), ((20, 7), 0), ((20, 2, 64), 2), ((70,), 1))


def give_sparse_grads(params, step):
    """With some rows there twice, in all but one step, and once with none."""
    for i, (p, (shape, dims)) in enumerate(zip(params, SPARSE_SHAPES, strict=True)):
        generator = torch.Generator().manual_seed(100 * step + i)
        count = 1 if dims == 0 else 0 if step == 3 and i == 0 else 9
        index = torch.zeros(dims, count, dtype=torch.int64)
        for row, size in zip(index, shape[:dims], strict=True):
            row.copy_(torch.randint(size, (count,), generator=generator))
        values = random((count, *shape[dims:]), torch.bfloat16, 1000 * (step + 1) + i, torch.device("cpu"))
        grad = torch.sparse_coo_tensor(index, values, shape, check_invariants=False)
        p.grad = (grad.coalesce() if step == 2 else grad).to(p.device)


def make_sparse(spec, way, device):
    options = {} if spec in NOT_ASKED else {"lazy_rows": True}
    return make(spec, way, device, shapes=[shape for shape, _ in SPARSE_SHAPES], **options)


@pytest.mark.parametrize("spec", TAKING_SPARSE, ids=NAMES_OF_TAKING_SPARSE)
def test_rows_of_sparse_gradients(spec, way, device):
    """Some steps of state that came from the CPU; rows are summed in float32 there, too."""
    (on_gpu, params), (on_cpu, others) = (make_sparse(spec, way, where) for where in (device, "cpu"))
    for step in range(5):
        for optimizer, its in ((on_gpu, params), (on_cpu, others)):
            if step == 4 and spec not in NOT_ASKED:
                give_grads(its, step)
            else:
                give_sparse_grads(its, step)
            optimizer.step()
        assert_same_bits(on_gpu, on_cpu)
        if step == 1:
            on_gpu.load_state_dict(copy.deepcopy(on_cpu.state_dict()))


@pytest.mark.parametrize("spec", LAZY, ids=lambda spec: spec.name)
def test_sparse_steps_that_are_skipped_draw_nothing(spec, one_of_few, device):
    """Not of SparseAdam, which counts steps on the host."""
    (on_gpu, params), (on_cpu, others) = (make_sparse(spec, one_of_few, where) for where in (device, "cpu"))
    for step in range(3):
        for optimizer, its in ((on_gpu, params), (on_cpu, others)):
            give_sparse_grads(its, step)
            optimizer._step_supports_amp_scaling = True
            optimizer.found_inf = torch.tensor(float(step == 1), device=its[0].device)
            optimizer.grad_scale = None
            optimizer.step()
    assert_same_bits(on_gpu, on_cpu)
    keys = [entry["rounding_key"].tolist() for entry in on_gpu.state.values() if "rounding_key" in entry]
    assert all(draws == 2 for _, draws, _ in keys)


def test_rows_that_cut_blocks_are_refused_before_anything_is_written(device):
    for where in (device, torch.device("cpu")):
        optimizer, params = make(ADAMW, {"state_precision": "q8"}, where, shapes=[(40, 3, 5), (40, 64)], lazy_rows=True)
        give_grads(params, 0)
        optimizer.step()
        before = everything(optimizer)
        for p in params:
            p.grad = p.grad.to_sparse(2 if p is params[0] else 1)
        with pytest.raises(
            RuntimeError, match=r"parameter 0 of group 0: grads is sparse in rows of 5 elements, which cut"
        ):
            optimizer.step()
        assert all(map(torch.equal, before, everything(optimizer)))
