"""The op average_: torch's lerp to the bit, for every pairing of dtypes and layouts; bad input; steps with averages."""

import sys
from pathlib import Path

import pytest
import torch
from lockstep import bits, make_params, random
from specs import SPECS
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent))

from test_opcheck import op_of, sample

average_ = torch.ops.optim_ext.average_.default
REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((3, 5), (257,), (), (0,), (40, 33))


def double(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torchs_lerp(dtype, weight):
    averages, params = ([p.detach() for p in make_params(SHAPES, dtype, seed)] for seed in (0, 50))
    expected = [torch.lerp(a, p, weight) for a, p in zip(averages, params, strict=True)]
    average_(averages, params, weight=double(weight))
    for found, value in zip(averages, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("param_dtype", REAL, ids=str)
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_every_pairing_of_dtypes(dtype, param_dtype):
    """Computed in float, in double where one is double, and rounded once."""
    averages, params = (
        [random(shape, kind, seed + i) for i, shape in enumerate(SHAPES)]
        for kind, seed in ((dtype, 0), (param_dtype, 9))
    )
    wide = torch.float64 if torch.float64 in (dtype, param_dtype) else torch.float32
    expected = [torch.lerp(a.to(wide), p.to(wide), 0.25).to(dtype) for a, p in zip(averages, params, strict=True)]
    average_(averages, params, weight=double(0.25))
    for found, value in zip(averages, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


def test_complex_is_averaged_by_parts():
    averages, params = (random((4, 3), torch.complex64, seed) for seed in (0, 1))
    parts = torch.view_as_real(averages).clone()
    average_([averages], [params], weight=double(0.2))
    average_([parts], [torch.view_as_real(params)], weight=double(0.2))
    assert torch.equal(torch.view_as_real(averages), parts)


@pytest.mark.parametrize("swapped", [False, True])
def test_strides(swapped):
    dense, strided = random((6, 10), torch.float32, 1), random((10, 12), torch.float32, 2).t()[::2]
    average, param = (strided, dense) if swapped else (dense, strided)
    expected = torch.lerp(average, param, 0.25)
    average_([average], [param], weight=double(0.25))
    assert torch.equal(average, expected)


def test_weight_one_copies_whatever_was_there():
    average = torch.tensor([float("nan"), float("inf"), 1.0, 2.0, -float("inf")])
    param = torch.tensor([1.0, 2.0, float("nan"), -0.0, float("inf")])
    average_([average], [param], weight=double(1.0))
    assert bits(average) == bits(param)


@pytest.mark.parametrize("flag, changes", [(0.0, True), (1.0, False)])
def test_found_inf(flag, changes):
    average, param = torch.zeros(3), torch.ones(3)
    average_([average], [param], weight=double(0.5), found_inf=torch.tensor(flag))
    assert average.tolist() == [0.5 * changes] * 3


def test_parameters_are_only_read_and_autograd_is_told():
    average, param = torch.zeros(3), torch.ones(3)
    before = average._version, param._version
    average_([average], [param], weight=double(0.5))
    assert average._version == before[0] + 1 and param._version == before[1]


BAD = {
    "shape": ([torch.zeros(3), torch.zeros(4)], [torch.ones(3), torch.ones(5)], r"averages\[1\] has shape \[4\]"),
    "kind": ([torch.zeros(3)], [torch.ones(3, dtype=torch.complex64)], r"averages\[0\] has dtype Float"),
    "integers": ([torch.zeros(3)], [torch.ones(3, dtype=torch.long)], r"params\[0\] has dtype Long"),
    "expanded": ([torch.zeros(1).expand(4)], [torch.ones(4)], r"averages\[0\] has elements that share memory"),
    "lengths": ([torch.zeros(4)], [torch.ones(4)] * 2, "equally long"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lists(name):
    averages, params, problem = BAD[name]
    kept = [bits(a) for a in averages]
    with pytest.raises((RuntimeError, ValueError), match=problem):
        average_(averages, params, weight=double(0.5))
    assert [bits(a) for a in averages] == kept


def test_averages_that_overlap_are_updated_in_turn():
    average = torch.zeros(6)
    average_([average[:4], average[2:]], [torch.ones(4), torch.ones(4)], weight=double(0.5))
    assert average.tolist() == [0.5, 0.5, 0.75, 0.75, 0.5, 0.5]


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), float("inf")])
def test_bad_weight(weight):
    average = torch.zeros(3)
    with pytest.raises(ValueError, match="weight is"):
        average_([average], [torch.ones(3)], weight=double(weight))
    assert average.tolist() == [0, 0, 0]


def test_same_bits_for_any_number_of_threads():
    averages, params = (random((70001,), torch.float32, seed) for seed in (0, 1))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        copy = averages.clone()
        average_([copy], [params], weight=double(0.37))
        found.append(bits(copy))
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_opcheck(dtype):
    averages, params = ([random(s, dtype, seed + i) for i, s in enumerate(SHAPES)] for seed in (0, 9))
    torch.library.opcheck(average_, (averages, params), {"weight": double(0.5), "found_inf": torch.tensor(0.0)})


def test_fake():
    with FakeTensorMode():
        assert average_([torch.zeros(3)], [torch.ones(3)], weight=torch.zeros(())) is None


# --- averages as part of a step

ROWS = [spec for spec in SPECS if spec.name in ("SGD", "AdamW", "RMSprop", "Adagrad")]  # one of each shape of list


def step_sample(row, dtype=torch.float32, average_dtype=None, strided=False):
    lists, keywords = sample(row, row.typical, dtype, ((300, 41), (5000,), (), (7, 3)))
    averages = [random(p.shape, average_dtype or dtype, 70 + i) for i, p in enumerate(lists[0])]
    if strided:
        averages[0] = averages[0].t().contiguous().t()
        lists[0][3] = lists[0][3].t().contiguous().t()
        lists[1][0] = torch.stack([lists[1][0]] * 2, -1)[..., 0]
    return lists, keywords, averages


def clones(tensors):
    return [
        t.clone() if t.is_contiguous() else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)
        for t in tensors
    ]


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("average_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_in_the_step_equals_after_it(row, dtype, average_dtype, strided):
    lists, keywords, averages = step_sample(row, dtype, average_dtype, strided)
    other_lists, other_averages = [clones(one) for one in lists], clones(averages)
    op_of(row)(*lists, **keywords, averages=averages, average_weight=double(0.3))
    op_of(row)(*other_lists, **keywords)
    average_(other_averages, other_lists[0], weight=double(0.3))
    for mine, other in zip((*lists, averages), (*other_lists, other_averages), strict=True):
        assert [bits(t) for t in mine] == [bits(t) for t in other]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_step_opcheck(row):
    lists, keywords, averages = step_sample(row)
    torch.library.opcheck(op_of(row), tuple(lists), {**keywords, "averages": averages, "average_weight": double(0.3)})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_bad_averages_of_a_step(row):
    def refused(problem, error=RuntimeError, **change):
        lists, keywords, averages = step_sample(row)
        kept = [bits(t) for one in (*lists, averages) for t in one]
        with pytest.raises(error, match=problem):
            op_of(row)(*lists, **keywords, **{"averages": averages, "average_weight": double(0.3), **change})
        assert [bits(t) for one in (*lists, averages) for t in one] == kept

    shapes = [(300, 41), (5000,), (), (7, 3)]
    zeros = [torch.zeros(shape) for shape in shapes]
    refused("equally long", ValueError, averages=zeros[:2])
    refused(r"averages\[3\] has shape", averages=[*zeros[:3], torch.zeros(3, 7)])
    refused(r"averages\[0\] has dtype", averages=[zeros[0].to(torch.complex64), *zeros[1:]])
    refused("average_weight must be", ValueError, average_weight=None)
    refused("average_weight is", ValueError, average_weight=double(1.5))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_average_that_is_the_parameter_is_refused(row):
    lists, keywords, _ = step_sample(row)
    kept = [bits(t) for one in lists for t in one]
    with pytest.raises(RuntimeError, match="overlaps in memory"):
        op_of(row)(*lists, **keywords, averages=lists[0], average_weight=double(0.3))
    assert [bits(t) for one in lists for t in one] == kept


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_skipped_step_leaves_the_average(row):
    lists, keywords, averages = step_sample(row)
    kept = [bits(t) for t in averages]
    op_of(row)(*lists, **keywords, averages=averages, average_weight=double(0.3), found_inf=torch.tensor(1.0))
    assert [bits(t) for t in averages] == kept


def test_every_step_op_takes_averages():
    for row in SPECS:
        names = [argument.name for argument in op_of(row)._schema.arguments]
        assert names[-3:] == ["averages", "average_weight", "companions"]
