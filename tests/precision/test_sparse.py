"""Sparse gradients of parameters and state that are kept in other ways: the rows they hold are stepped as dense gradients
step all rows, in every bit, and what belongs to the others stays as it is."""

import copy
import io
import math

import pytest
import torch
from kept import (
    LAZY,
    NAMES_OF_TAKING_SPARSE,
    NOT_ASKED,
    SPARSE_ADAM,
    TAKING_SPARSE,
    WAYS,
    everything,
    name_of,
    same,
    value_of,
)
from lockstep import copy_of, native_ops, random
from optim.test_lazy_rows import ROWS, lazy_twin
from torch import nn

import optim_ext
from optim_ext import checkpoints
from optim_ext.swa_utils import AveragedModel, get_ema_multi_avg_fn

WIDTH = 100  # a block and a part of one
ADAMW = next(spec for spec in LAZY if spec.name == "AdamW")

by_way = pytest.mark.parametrize("way", WAYS, ids=name_of)
every_class = pytest.mark.parametrize("spec", TAKING_SPARSE, ids=NAMES_OF_TAKING_SPARSE)


def sparse(step, shape=(ROWS, WIDTH), dims=1, count=9):
    """Some rows, some of them twice: of whole numbers, so that sums are exact in bfloat16 too."""
    generator = torch.Generator().manual_seed(step)
    index = torch.zeros(dims, count, dtype=torch.int64)
    for row, size in zip(index, shape[:dims], strict=True):
        row.copy_(torch.randint(size, (count,), generator=generator))
    values = torch.randint(-4, 5, (count, *shape[dims:]), generator=generator).bfloat16()
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=False)


def dense(step, shape=(ROWS, WIDTH)):
    return random(shape, torch.bfloat16, 300 + step)


def make(spec, way, lazy=True, shape=(ROWS, WIDTH), dtype=torch.bfloat16):
    p = nn.Parameter(random(shape, torch.bfloat16, 1).to(dtype))
    options = {"lazy_rows": True} if lazy and spec not in NOT_ASKED else {}
    return spec.ours([p], **copy_of(spec.typical), **options, **way, min_q8_size=1), p


def train(optimizer, p, steps, first=0):
    for step in range(first, first + steps):
        p.grad = sparse(step, tuple(p.shape))
        optimizer.step()


@by_way
@pytest.mark.parametrize("spec", LAZY, ids=lambda spec: spec.name)
def test_the_rows_held_are_stepped_as_by_a_dense_gradient(spec, way):
    (lazy, ours), (other, theirs) = make(spec, way), make(spec, way, lazy=False)
    for optimizer, p in ((lazy, ours), (other, theirs)):
        p.grad = dense(0)
        optimizer.step()
    for step in range(1, 5):
        ours.grad = sparse(step)
        assert native_ops(lazy.step) == [f"optim_ext::{spec.op}"]
        lazy_twin(theirs, other, sparse(step))
        assert same(everything(lazy), everything(other))


@pytest.mark.parametrize("precision", ["master", "remainder"])
@every_class
def test_a_master_has_the_bits_of_a_float32_parameter(spec, precision):
    """From the first step on; repeated rows are summed in float32."""
    (kept, ours), (wide, theirs) = make(spec, {"param_precision": precision}), make(spec, {}, dtype=torch.float32)
    for step in range(5):
        grad = torch.sparse_coo_tensor(sparse(step)._indices(), dense(step)[:9], ours.shape, check_invariants=False)
        ours.grad, theirs.grad = (grad.coalesce() if step == 3 else grad), grad.float()
        if step == 3:
            theirs.grad = ours.grad.float()
        kept.step()
        wide.step()
        assert torch.equal(value_of(kept, ours), theirs)
    for key, value in wide.state[theirs].items():
        assert torch.equal(torch.as_tensor(kept.state[ours][key]), torch.as_tensor(value)), key


@by_way
@every_class
def test_nothing_else_is_touched(spec, way):
    optimizer, p = make(spec, way)
    train(optimizer, p, 1)
    before = {key: v.clone() for key, v in {**optimizer.state[p], "": p.detach()}.items() if torch.is_tensor(v)}
    ones = torch.ones(3, WIDTH, dtype=torch.bfloat16)
    p.grad = torch.sparse_coo_tensor([[7, 3, 7]], ones, p.shape, check_invariants=False)
    optimizer.step()
    for key, value in {**optimizer.state[p], "": p.detach()}.items():
        if torch.is_tensor(value) and value.shape[:1] == (ROWS,):
            bits = [one.contiguous().view(torch.uint8).view(ROWS, -1) for one in (value, before[key])]
            assert set((bits[0] != bits[1]).any(1).nonzero().flatten().tolist()) <= {3, 7}, key
    assert not torch.equal(p, before[""])


@by_way
@every_class
def test_the_same_bits_on_any_number_of_threads_and_after_a_restart(spec, way):
    found, before = [], torch.get_num_threads()
    try:
        for threads, resumed in ((1, False), (3, True)):
            torch.set_num_threads(threads)
            optimizer, p = make(spec, way, shape=(ROWS, 2500))
            train(optimizer, p, 2)
            if resumed:
                file = io.BytesIO()
                torch.save((p.detach(), optimizer.state_dict()), file)
                file.seek(0)
                value, saved = torch.load(file, weights_only=True)
                optimizer, p = make(spec, way, shape=(ROWS, 2500))
                with torch.no_grad():
                    p.copy_(value)
                optimizer.load_state_dict(saved)
            train(optimizer, p, 2, 2)
            found.append(everything(optimizer))
    finally:
        torch.set_num_threads(before)
    assert same(*found)


@by_way
def test_gradients_that_are_sparse_in_other_dimensions(way):
    """In none, or in two where blocks do not reach across what an index selects."""
    cases = [((ROWS, WIDTH), 0, 1), ((ROWS, 2, 64), 2, 30), ((ROWS,), 1, 9)]
    if way["state_precision"] != "q8":
        cases.append(((ROWS, 3, 2), 2, 30))
    for shape, dims, count in cases:
        optimizer, p = make(ADAMW, way, shape=shape)
        p.grad = dense(0, shape)
        optimizer.step()
        for step in range(1, 4):
            before, other = copy.deepcopy(optimizer), copy.deepcopy(optimizer)
            grad = sparse(step, shape, dims, count)
            p.grad, other.param_groups[0]["params"][0].grad = grad, grad.to_dense()
            optimizer.step()
            other.step()
            held = torch.zeros(shape, dtype=torch.bool)
            held[tuple(grad._indices())] = True
            for mine, theirs, old in zip(*map(of_its_shape, (optimizer, other, before)), strict=True):
                assert torch.equal(mine[held], theirs[held]) and torch.equal(mine[~held], old[~held])


def of_its_shape(optimizer):
    """A parameter, and what of its state has an element for each of its own."""
    (p,) = optimizer.param_groups[0]["params"]
    return [p.detach(), *(value for value in optimizer.state[p].values() if value.shape == p.shape)]


def test_blocks_that_reach_across_rows_are_refused_before_anything_is_written():
    optimizer, p = make(ADAMW, {"param_precision": "remainder", "state_precision": "q8"}, shape=(ROWS, 3, 5))
    p.grad = dense(0, p.shape)
    optimizer.step()
    before = everything(optimizer)
    p.grad = sparse(1, tuple(p.shape), 2)
    with pytest.raises(
        RuntimeError, match=r"parameter 0 of group 0: grads is sparse in rows of 5 elements, which cut the"
    ):
        optimizer.step()
    assert same(before, everything(optimizer))
    p.grad = sparse(1, tuple(p.shape), 1)
    optimizer.step()


@by_way
def test_sparse_adam_goes_to_torch_and_comes_from_it(way):
    optimizer, p = make(SPARSE_ADAM, way)
    train(optimizer, p, 3)
    wide = nn.Parameter(dict(optimizer.master_params())["0.0"])
    theirs = torch.optim.SparseAdam([wide])
    theirs.load_state_dict(checkpoints.to_torch_state_dict(optimizer))
    assert set(theirs.state[wide]) == {"step", "exp_avg", "exp_avg_sq"} and theirs.state[wide]["step"] == 3
    wide.grad = sparse(3).float()
    theirs.step()
    back, q = make(SPARSE_ADAM, way)
    back.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        q.copy_(wide)
    train(back, q, 1, 4)
    assert back.state[q]["step"] == 5
    assert set(back.state[q]) == set(optimizer.state[p])


@by_way
def test_an_average_of_masters_follows(way):
    optimizer, p = make(ADAMW, way)
    model = nn.ParameterList([p])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), dtype=torch.float32)
    optimizer.average_into(averaged, model, masters=True)
    expected = None
    for step in range(3):
        train(optimizer, p, 1, step)
        value = value_of(optimizer, p).clone()
        expected = value if expected is None else expected.lerp(value, 0.5)
    torch.testing.assert_close(averaged.module[0].detach(), expected)


@by_way
def test_clipping_and_skipping(way):
    clipped, p = make(ADAMW, way)
    plain, q = make(ADAMW, way)
    clipped.set_grad_policy(max_norm=1e30, skip_nonfinite=True)
    for step in range(3):
        train(clipped, p, 1, step)
        train(plain, q, 1, step)
        before = everything(clipped)
        p.grad = sparse(step) * math.inf
        clipped.step()
        assert same(before, everything(clipped))
    assert same(everything(clipped), everything(plain))


def test_explain():
    optimizer, p = make(SPARSE_ADAM, {"param_precision": "remainder", "state_precision": "q8"})
    p.grad = sparse(0)
    (report,) = optim_ext.explain(optimizer)
    assert report.native and "1 bfloat16 parameters: remainder, exp_avg and exp_avg_sq q8" in report.reason


def test_memory_is_what_a_step_leaves():
    """But for gradients, whose size is known only when they are there."""
    table = optim_ext.memory([make(SPARSE_ADAM, {})[1]], optim_ext.SparseAdam, min_q8_size=1)
    assert "bytes without gradients, which are sparse" in str(table)
    for row in table.rows:
        way = {"param_precision": row.param_precision, "state_precision": row.state_precision}
        optimizer, p = make(SPARSE_ADAM, way)
        train(optimizer, p, 1)
        state = sum(value.nbytes for value in optimizer.state[p].values() if torch.is_tensor(value))
        (group,) = row.groups
        assert (group.params, group.grads, group.state) == (p.nbytes, 0, state), way
