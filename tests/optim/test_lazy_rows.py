"""lazy_rows=True: sparse gradients step the rows they hold, as dense ones step all rows, and leave the others alone."""

import copy

import pytest
import torch
from lockstep import bits, copy_of, native_ops, random
from specs import SPECS
from torch import nn

import optim_ext
from optim_ext._tables import TABLES
from optim_ext.checkpoints import to_torch_state_dict

ROWS, WIDTH = 40, 6
ELEMENT_WISE = [spec for spec in SPECS if TABLES[spec.op].is_element_wise and spec.name != "SparseAdam"]
OTHERS = [spec for spec in SPECS if not TABLES[spec.op].is_element_wise]
# Dampening begins with a row's first step where a dense step begins without it: see below.
CASES = [
    (spec, options)
    for spec in ELEMENT_WISE
    for options in (spec.typical, *spec.grid)
    if not options.get("dampening") and not options.get("capturable") and not options.get("differentiable")
]
IDS = [f"{spec.name}-{number}" for number, (spec, _) in enumerate(CASES)]
lazy_cases = pytest.mark.parametrize(("spec", "options"), CASES, ids=IDS)


def sparse(step, shape=(ROWS, WIDTH), dtype=torch.float32, count=9):
    """A gradient of a few rows, some of them twice."""
    index = torch.randint(shape[0], (1, count), generator=torch.Generator().manual_seed(step))
    values = random((count, *shape[1:]), dtype, 100 + step)
    return torch.sparse_coo_tensor(index.to(values.device), values, shape, check_invariants=False)


def table(dtype=torch.float32, shape=(ROWS, WIDTH)):
    return nn.Parameter(random(shape, dtype, 1))


def is_of_rows(value):
    return isinstance(value, torch.Tensor) and value.shape[:1] == (ROWS,)


def lazy_twin(param, optimizer, grad):
    """The step by its definition: a dense one, and the rows that the gradient does not hold put back."""
    summed = grad.coalesce()
    held = torch.zeros(ROWS, dtype=torch.bool, device=param.device)
    held[summed.indices()[0]] = True
    before = (
        param.detach().clone(),
        {key: value.clone() for key, value in optimizer.state[param].items() if is_of_rows(value)},
    )
    param.grad = summed.to_dense()
    optimizer.step()
    with torch.no_grad():
        param[~held] = before[0][~held]
        for key, value in optimizer.state[param].items():
            if is_of_rows(value):
                # What a first step makes begins as the class has it, for the rows that are not held as well.
                value[~held] = before[1][key][~held] if key in before[1] else first_value(optimizer, key)
    return param


def first_value(optimizer, key):
    """What state that a first step makes begins with."""
    return float(optimizer.param_groups[0]["lr"]) if key == "step_size" else 0.0


@lazy_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_is_the_dense_one_for_the_rows_held(spec, options, dtype):
    ours, theirs = table(dtype), table(dtype)
    lazy = spec.ours([ours], **copy_of(options), lazy_rows=True)
    dense = spec.ours([theirs], **copy_of(options))
    for step in range(4):
        ours.grad = sparse(step, dtype=dtype)
        assert native_ops(lazy.step) == [f"optim_ext::{spec.op}"]
        lazy_twin(theirs, dense, sparse(step, dtype=dtype))
        assert bits(ours) == bits(theirs)
        mine, other = lazy.state[ours], dense.state[theirs]
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("spec", ELEMENT_WISE, ids=lambda spec: spec.name)
def test_dense_and_sparse_gradients_in_one_group(spec):
    shapes = [(ROWS, WIDTH), (5, 7), (3,)]
    mixed, alone = ([nn.Parameter(random(shape, torch.float32, i)) for i, shape in enumerate(shapes)] for _ in range(2))
    together = spec.ours(mixed, **copy_of(spec.typical), lazy_rows=True)
    one_by_one = [spec.ours([p], **copy_of(spec.typical), lazy_rows=i == 0) for i, p in enumerate(alone)]
    for step in range(3):
        for params in (mixed, alone):
            params[0].grad = sparse(step)
            for i, p in enumerate(params[1:]):
                p.grad = random(p.shape, p.dtype, 50 * step + i)
        assert native_ops(together.step) == [f"optim_ext::{spec.op}"]
        for optimizer in one_by_one:
            optimizer.step()
    assert [bits(p) for p in mixed] == [bits(p) for p in alone]


@pytest.mark.parametrize("spec", ELEMENT_WISE, ids=lambda spec: spec.name)
def test_a_gradient_may_be_sparse_in_one_step_and_dense_in_the_next(spec):
    ours, theirs = table(), table()
    lazy = spec.ours([ours], **copy_of(spec.typical), lazy_rows=True)
    dense = spec.ours([theirs], **copy_of(spec.typical))
    for step in range(4):
        if step % 2:
            ours.grad, theirs.grad = (random(p.shape, p.dtype, step) for p in (ours, theirs))
            dense.step()
        else:
            ours.grad = sparse(step)
            lazy_twin(theirs, dense, sparse(step))
        lazy.step()
    assert bits(ours) == bits(theirs)


def test_dampening_applies_to_the_first_step_of_a_row():
    param = nn.Parameter(torch.zeros(3, 1))
    optimizer = optim_ext.SGD([param], lr=1.0, momentum=0.5, dampening=0.25, lazy_rows=True)
    for row in (0, 2, 0):
        param.grad = torch.sparse_coo_tensor([[row]], [[1.0]], (3, 1), check_invariants=False)
        optimizer.step()
    assert param.flatten().tolist() == [-(0.75 + (0.375 + 0.75)), 0.0, -0.75]


def test_decay_is_lazy():
    param = nn.Parameter(torch.ones(3, 1))
    optimizer = optim_ext.SGD([param], lr=0.5, weight_decay=0.5, lazy_rows=True)
    param.grad = torch.sparse_coo_tensor([[1]], [[0.0]], (3, 1), check_invariants=False)
    optimizer.step()
    assert param.flatten().tolist() == [1.0, 0.75, 1.0]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_an_embedding_learns(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(8, 1))
    optimizer = getattr(optim_ext, name)(model.parameters(), lr=0.02, weight_decay=1e-3, lazy_rows=True)
    words = torch.randint(20, (64, 2))
    wanted = (words.sum(1, keepdim=True) % 2).float()
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(words), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("spec", ELEMENT_WISE, ids=lambda spec: spec.name)
def test_clipping_and_skipping(spec):
    ours, theirs = table(), table()
    policy = {"max_norm": 0.5, "skip_nonfinite": True}
    lazy = spec.ours([ours], **copy_of(spec.typical), lazy_rows=True, **policy)
    dense = spec.ours([theirs], **copy_of(spec.typical), **policy)
    for step in range(3):
        grad = sparse(step).coalesce()
        ours.grad = grad.clone()
        if step == 1:
            ours.grad._values()[0, 0] = float("nan")
            before = bits(ours)
            lazy.step()
            assert bits(ours) == before and lazy.last_step_skipped
            continue
        lazy.step()
        lazy_twin(theirs, dense, grad)
        torch.testing.assert_close(lazy.last_norm, grad.values().norm())
    torch.testing.assert_close(ours, theirs)


def test_averages_follow():
    param = table()
    model = nn.ParameterList([param])
    averaged = optim_ext.swa_utils.AveragedModel(model, multi_avg_fn=optim_ext.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    optimizer = optim_ext.Adam([param], lr=0.1, lazy_rows=True)
    optimizer.average_into(averaged, model)
    expected = param.detach().clone()
    for step in range(3):
        param.grad = sparse(step)
        optimizer.step()
        expected.lerp_(param.detach(), 0.5)
    torch.testing.assert_close(averaged.module[0], expected)


def test_without_the_option_torchs_words_remain():
    for name in ("Adam", "AdamW", "RMSprop", "NAdam"):
        errors = []
        for library in (torch.optim, optim_ext):
            param = table()
            param.grad = sparse(0)
            with pytest.raises(RuntimeError) as error:
                getattr(library, name)([param]).step()
            errors.append(str(error.value))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("spec", OTHERS, ids=lambda spec: spec.name)
def test_whole_tensors_are_refused(spec):
    with pytest.raises(ValueError, match=f"{spec.name} takes dense gradients only: it does not take lazy_rows"):
        spec.ours([table()], lazy_rows=True)


def test_bad_values_and_places():
    with pytest.raises(ValueError, match="group 0: lazy_rows is 1, expected True or False"):
        optim_ext.Adam([table()], lazy_rows=1)
    with pytest.raises(ValueError, match="SparseAdam steps the rows of sparse gradients as it is"):
        optim_ext.SparseAdam([table()], lazy_rows=True)
    optimizer = optim_ext.Adam([table()])
    with pytest.raises(ValueError, match="group 1: lazy_rows is 'yes'"):
        optimizer.add_param_group({"params": [table()], "lazy_rows": "yes"})
    assert len(optimizer.param_groups) == 1


def test_it_is_an_option_of_a_group():
    lazy, strict = table(), table()
    optimizer = optim_ext.Adam([{"params": [lazy], "lazy_rows": True}, {"params": [strict]}])
    lazy.grad, strict.grad = sparse(0), sparse(0)
    before = bits(lazy)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        optimizer.step()
    assert bits(lazy) == before and not optimizer.state
    strict.grad = None
    optimizer.step()
    assert bits(lazy) != before
    assert "lazy_rows: sparse gradients step their rows" in str(optim_ext.explain(optimizer))


REFUSED = {
    "complex": (lambda: nn.Parameter(random((ROWS, 2), torch.complex64, 1)), {}, "it is sparse and complex"),
    "transposed": (lambda: nn.Parameter(random((WIDTH, ROWS), torch.float32, 1).t()), {}, "not contiguous"),
    "kept": (
        lambda: nn.Parameter(random((ROWS, WIDTH), torch.bfloat16, 1)),
        {"param_precision": "master"},
        "param_precision and state_precision do not take yet",
    ),
    "recorded": (table, {"differentiable": True}, "differentiable=True: the step itself is recorded"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_refused_before_anything_is_written(kind):
    make, options, words = REFUSED[kind]
    param, other = make(), nn.Parameter(torch.ones(3))
    param.grad = sparse(0, tuple(param.shape), param.dtype)
    other.grad = torch.ones(3)
    optimizer = optim_ext.Adam([other, param], lazy_rows=True, **options)
    before = bits(param), bits(other)
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()
    assert (bits(param), bits(other)) == before


def test_loading_keeps_the_optimizers_own_option():
    ours = table()
    optimizer = optim_ext.Adam([ours], lazy_rows=True)
    ours.grad = sparse(0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    plain = torch.optim.Adam([table()])
    plain.load_state_dict(to_torch_state_dict(optimizer))
    assert "lazy_rows" not in plain.state_dict()["param_groups"][0]
    back = optim_ext.Adam([table()], lazy_rows=True)
    back.load_state_dict(plain.state_dict())
    assert back.param_groups[0]["lazy_rows"] is True
    strict = optim_ext.Adam([table()])
    strict.load_state_dict(saved)
    assert "lazy_rows" not in strict.param_groups[0]
    for key, value in back.state_dict()["state"][0].items():
        assert torch.equal(value, saved["state"][0][key])


def test_a_rule_of_ones_own_refuses_what_torch_does_without_the_option():
    @optim_ext.rule
    def Plain(param, grad, *, lr=0.1):
        return param - lr * grad

    for options in ({}, {"differentiable": True, "lazy_rows": True}):
        param = table()
        param.grad = sparse(0)
        before = bits(param)
        with pytest.raises(
            RuntimeError, match="lazy_rows needs a native step" if options else "Plain does not support"
        ):
            Plain([param], **options).step()
        assert bits(param) == before
