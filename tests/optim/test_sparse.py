"""Sparse gradients: only the rows they hold are read and written, with torch's results."""

import copy
import warnings

import pytest
import torch
from lockstep import bits, native_ops
from torch import nn

import optim_ext

SHAPES = [  # shape of the parameter, sparse dimensions of its gradient
    ((6, 3), 1),
    ((6, 40), 1),
    ((5,), 1),
    ((4, 5, 20), 2),
    ((4, 5), 2),
    ((4, 2, 3, 10), 1),
]
ROWS = [
    ("SparseAdam", {}),
    ("SparseAdam", {"maximize": True, "betas": (0.5, 0.8), "eps": 1e-3}),
    ("SparseAdam", {"lr": torch.tensor(0.1, dtype=torch.float64)}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True, "dampening": 0.5}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    ("Adagrad", {"lr": 0.1, "maximize": True, "initial_accumulator_value": 0.2}),
]
EVERY = [("SparseAdam", {"lr": 0.1}), ("SGD", {"lr": 0.1}), ("Adagrad", {"lr": 0.1})]


def sparse(shape, sparse_dim, count, dtype, seed=0):
    """An uncoalesced gradient of `count` random indices, among them repeated ones."""
    generator = torch.Generator().manual_seed(seed)
    indices = [torch.randint(size, (count,), generator=generator) for size in shape[:sparse_dim]]
    values = torch.randn((count, *shape[sparse_dim:]), generator=generator, dtype=torch.float64).to(dtype)
    return torch.sparse_coo_tensor(torch.stack(indices), values, shape, check_invariants=False)


def pair(name, options, params):
    twins = [p.clone() for p in params]
    make = [getattr(library, name) for library in (optim_ext, torch.optim)]
    return make[0](params, **copy.copy(options)), make[1](twins, **copy.copy(options)), twins


def same_state(ours, theirs):
    mine, other = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert mine.keys() == other.keys()
    for index, entries in other.items():
        assert mine[index].keys() == entries.keys()
        for key, value in entries.items():
            assert type(mine[index][key]) is type(value)
            torch.testing.assert_close(mine[index][key], value)


@pytest.mark.parametrize(("shape", "sparse_dim"), SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options"), ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torch(name, options, shape, sparse_dim, dtype):
    params = [torch.randn(shape, dtype=dtype)]
    ours, theirs, twins = pair(name, options, params)
    coalesced, as_it_comes = torch.Tensor.coalesce, torch.Tensor.clone
    forms = (coalesced, as_it_comes, coalesced, as_it_comes, coalesced)
    for step, (count, form) in enumerate(zip((3, 0, 7, 1, 12), forms, strict=True)):
        grad = sparse(shape, sparse_dim, count, dtype, step)
        before = grad._values().clone()
        for own, one in ((params, ours), (twins, theirs)):
            own[0].grad = form(grad)
            one.step()
        assert torch.equal(grad._values(), before)
        torch.testing.assert_close(params, twins)
        same_state(ours, theirs)
    params[0].grad = sparse(shape, sparse_dim, 3, dtype)
    assert optim_ext.explain(ours)[0].native
    assert native_ops(ours.step) == [f"optim_ext::{ours._op}"]


@pytest.mark.parametrize(("name", "options"), EVERY, ids=str)
def test_only_the_rows_that_are_held_are_touched(name, options):
    param = torch.full((50, 20), 2.0)
    optimizer = getattr(optim_ext, name)([param], **options)
    param.grad = torch.sparse_coo_tensor(torch.tensor([[7, 3, 7]]), torch.ones(3, 20), (50, 20))
    optimizer.step()
    touched = (param != 2).any(1).nonzero().flatten().tolist()
    assert touched == [3, 7]
    for key, value in optimizer.state[param].items():
        if key in ("exp_avg", "exp_avg_sq", "sum"):
            assert (value != 0).any(1).nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize(("name", "options"), EVERY, ids=str)
@pytest.mark.parametrize("wrong", [-1, 6, 2**40])
@pytest.mark.parametrize("coalesced", [False, True])
def test_index_out_of_range_is_refused_before_any_write(name, options, wrong, coalesced):
    params = [torch.ones(4, 3), torch.ones(6, 3)]
    optimizer = getattr(optim_ext, name)([{"params": params[:1]}, {"params": params[1:]}], **options)
    for step in range(2):
        for i, param in enumerate(params):
            param.grad = sparse(tuple(param.shape), 1, 4, torch.float32, 10 * step + i)
            param.grad = param.grad.coalesce() if coalesced else param.grad
        if step == 1:
            params[1].grad._indices()[0, 0] = wrong
        before = [bits(p) for p in params], copy.deepcopy(optimizer.state_dict()["state"])
        if step == 0:
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match=f"parameter 0 of group 1: grads has index {wrong} in dimension 0"):
            optimizer.step()
        assert [bits(p) for p in params] == before[0]
        for index, entries in optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[1][index][key]))
    params[1].grad = sparse((6, 3), 1, 2, torch.float32)
    optimizer.step()


def test_sparse_adam_refuses_dense_gradients_in_torchs_words():
    for library in (torch.optim, optim_ext):
        params = [torch.zeros(3, 2), torch.zeros(3, 2)]
        optimizer = library.SparseAdam(params)
        params[0].grad = sparse((3, 2), 1, 2, torch.float32)
        params[1].grad = torch.ones(3, 2)
        with pytest.raises(
            RuntimeError, match="SparseAdam does not support dense gradients, please consider Adam instead"
        ):
            optimizer.step()
    assert not optimizer.state and not params[0].any()


def test_sparse_adam_refuses_a_dense_gradient_at_a_later_step():
    params = [torch.zeros(3, 2), torch.zeros(3, 2)]
    optimizer = optim_ext.SparseAdam(params)
    for step in range(3):
        params[0].grad = sparse((3, 2), 1, 2, torch.float32, step)
        params[1].grad = torch.ones(3, 2) if step == 2 else params[0].grad
        if step < 2:
            optimizer.step()
    before = [bits(p) for p in params]
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        optimizer.step()
    assert [bits(p) for p in params] == before
    assert [optimizer.state[p]["step"] for p in params] == [2, 2]


def test_sparse_adam_counts_its_steps_in_the_state():
    """As Python numbers, one for each parameter; what is put there counts from then on."""
    params = [torch.zeros(3, 2, dtype=torch.float64) for _ in range(2)]
    ours, theirs, twins = pair("SparseAdam", {"lr": 0.1}, params)
    for step, second_is_frozen in enumerate((True, False) * 3):
        for own, one in ((params, ours), (twins, theirs)):
            for p in own:
                p.grad = sparse((3, 2), 1, 2, torch.float64, step)
            if second_is_frozen:
                own[1].grad = None
            if step == 4:
                one.state[own[0]]["step"] = 1000
            one.step()
        torch.testing.assert_close(params, twins)
        same_state(ours, theirs)
    assert [ours.state[p]["step"] for p in params] == [1002, 3]
    for wrong, error in ((-1, RuntimeError), ("three", RuntimeError), (None, RuntimeError)):
        ours.state[params[0]]["step"] = wrong
        before = [bits(p) for p in params]
        with pytest.raises(error):
            ours.step()
        assert [bits(p) for p in params] == before
        assert [ours.state[p]["step"] for p in params] == [wrong, 3]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_sparse_adam_steps_a_parameter_as_often_as_it_occurs():
    params = [torch.randn(4, 3, dtype=torch.float64)]
    twins = [params[0].clone()]
    ours, theirs = optim_ext.SparseAdam(params * 2, lr=0.1), torch.optim.SparseAdam(twins * 2, lr=0.1)
    for step in range(3):
        for own, one in ((params, ours), (twins, theirs)):
            own[0].grad = sparse((4, 3), 1, 3, torch.float64, step)
            one.step()
        torch.testing.assert_close(params, twins)
        assert ours.state[params[0]]["step"] == theirs.state[twins[0]]["step"]


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ([torch.zeros(3).to_sparse()], {}),
        ([torch.zeros(3, dtype=torch.complex64)], {}),
        ([torch.zeros(3)], {"betas": (1.0, 0.0)}),
        ([torch.zeros(3)], {"lr": 0.0}),
    ],
)
def test_sparse_adam_is_validated_as_torchs(params, options):
    messages = []
    for library in (torch.optim, optim_ext):
        with pytest.raises(ValueError) as caught:
            library.SparseAdam(params, **options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("to_ours", [True, False])
def test_sparse_adam_checkpoints_go_both_ways(to_ours):
    params = [torch.randn(6, 3, dtype=torch.float64)]
    ours, theirs, twins = pair("SparseAdam", {"lr": 0.1}, params)
    source, target = (theirs, ours) if to_ours else (ours, theirs)
    own = source.param_groups[0]["params"]
    for step in range(3):
        own[0].grad = sparse((6, 3), 1, 4, torch.float64, step)
        source.step()
    with torch.no_grad():
        target.param_groups[0]["params"][0].copy_(own[0])
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for step in range(3, 6):
        for one, values in ((ours, params), (theirs, twins)):
            values[0].grad = sparse((6, 3), 1, 4, torch.float64, step)
            one.step()
        torch.testing.assert_close(params, twins)
        same_state(ours, theirs)


def test_strided_tables_take_torchs_path():
    """A table that is not contiguous: torch's code, and the same result."""
    params = [torch.randn(3, 6, dtype=torch.float64).t()]
    ours, theirs, twins = pair("SGD", {"lr": 0.1}, params)
    for own in (params, twins):
        own[0].grad = sparse((6, 3), 1, 4, torch.float64)
    report = optim_ext.explain(ours)[0]
    assert not report.native and "not contiguous" in report.reason
    for one in (ours, theirs):
        one.step()
    torch.testing.assert_close(params, twins)


def added_up(grad, dtype):
    """The coalesced gradient, each row the sum of its values in the order they come in, computed in ``dtype``."""
    sums = {}
    for place, value in zip(zip(*grad._indices().tolist(), strict=True), grad._values().to(dtype), strict=True):
        sums[place] = sums[place] + value if place in sums else value.clone()
    places = sorted(sums)
    indices, values = torch.tensor(places).T, torch.stack([sums[place] for place in places])
    return torch.sparse_coo_tensor(indices, values, grad.shape, is_coalesced=True, check_invariants=False)


@pytest.mark.about_the_cpu("on a GPU torch's coalesce() adds them up")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "sparse_dim"), [((37, 5, 7), 1), ((37, 5, 7), 2), ((185,), 1), ((9, 300), 1)], ids=str
)
@pytest.mark.parametrize("count", [1, 2, 40, 3000])
def test_repeated_rows_are_added_up_in_order(count, shape, sparse_dim, dtype):
    """The same bits as the sums taken one after the other, for halves in float32, and torch's result."""
    grad = sparse(shape, sparse_dim, count, dtype, seed=count)
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    for name, options in EVERY:
        params = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(3)]
        params[1].grad_dtype = computed_in
        for param, own in zip(params, (grad, added_up(grad, computed_in), grad.coalesce()), strict=True):
            optimizer = getattr(optim_ext, name)([param], **options)
            for _ in range(2):
                param.grad = own
                optimizer.step()
            assert optim_ext.explain(optimizer)[0].native
        assert torch.equal(params[0], params[1]), name
        if dtype.itemsize >= 4:
            torch.testing.assert_close(params[0], params[2])


@pytest.mark.parametrize("rows", [1, 2, 17, 2000, 70_000])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "all the same"])
def test_rows_in_any_order(rows, order):
    """Tables of sizes that take different numbers of passes to sort, with fewer and with more values than rows."""
    for count in (1, 5, 300):
        index = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(rows))
        index = {
            "random": index,
            "ascending": index.unique(),
            "descending": index.sort(descending=True).values,
            "all the same": index[:1].expand(count),
        }[order]
        values = torch.randn(len(index), 3, dtype=torch.float64)
        params = [torch.zeros(rows, 3, dtype=torch.float64) for _ in range(2)]
        ours, theirs = optim_ext.SGD(params[:1], lr=1.0), torch.optim.SGD(params[1:], lr=1.0)
        for param, optimizer in zip(params, (ours, theirs), strict=True):
            param.grad = torch.sparse_coo_tensor(index[None], values, (rows, 3), check_invariants=False)
            optimizer.step()
        torch.testing.assert_close(*params)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads):
    """And rows swept one by one give what the walk over short rows gives."""
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            param = torch.randn(3000, 40)
            optimizer = optim_ext.SparseAdam([param], lr=0.1)
            for step in range(3):
                param.grad = sparse((3000, 40), 1, 2500 if step < 2 else 20_000, torch.float32, step)
                optimizer.step()
            results.append(param)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_embedding_trains():
    tables = [nn.Embedding(20, 8, sparse=True) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    optimizers = optim_ext.SparseAdam(tables[0].parameters()), torch.optim.SparseAdam(tables[1].parameters())
    words = torch.tensor([[1, 5, 5], [19, 0, 1]])
    for _ in range(5):
        for table, optimizer in zip(tables, optimizers, strict=True):
            optimizer.zero_grad()
            table(words).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight)


@pytest.mark.parametrize("shape", [(4,), ()], ids=str)
@pytest.mark.parametrize("name, options", EVERY)
def test_gradients_without_sparse_dimensions(name, options, shape):
    """One row, which is the whole tensor, any number of times."""
    results = []
    for package in (torch.optim, optim_ext):
        param = nn.Parameter(torch.ones(shape))
        optimizer = getattr(package, name)([param], **copy.deepcopy(options))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            values = torch.randn(2, *shape, generator=generator)
            param.grad = torch.sparse_coo_tensor(
                torch.zeros(0, 2, dtype=torch.int64), values, shape, check_invariants=False
            )
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param = torch.zeros(4, 2)
        param.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=False)
        optim_ext.SparseAdam([param]).step()
