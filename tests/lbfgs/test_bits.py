"""The same bytes for any number of threads and any instruction set, and in agreement with plain double arithmetic."""

import copy
import hashlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from device import DEVICE

import optim_ext
from optim_ext import _C

ROOT = Path(__file__).resolve().parents[2]
OPS = torch.ops.optim_ext
SIZES = (1, 7, 8, 1023, 1024, 1025, 5000, 40_001)
KINDS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.bfloat16),
]


def vectors(count, n, dtype, seed=0):
    numbers = numpy.random.default_rng(seed).standard_normal((count, n))
    return [torch.from_numpy(row.copy()).to(DEVICE, dtype) for row in numbers]


def one_iteration(n, dtype, row_dtype, count, metric=False):
    """All ops on one history: every tensor and result they give."""
    old_dirs, old_stps = vectors(count, n, row_dtype, 1), vectors(count, n, row_dtype, 2)
    grad, prev_grad, d = vectors(3, n, dtype, 3)
    weights = vectors(1, n, dtype, 4)[0].abs() if metric else None
    y, s = torch.empty(n, dtype=row_dtype), torch.empty(n, dtype=row_dtype)
    dots = OPS.lbfgs_pair_(y, s, grad, prev_grad, d, old_dirs, old_stps, metric=weights, t=0.37)
    single = OPS.lbfgs_dots(grad, old_dirs, old_stps, metric=weights)
    coefficients = torch.from_numpy(numpy.random.default_rng(5).standard_normal(1 + 2 * count))
    out = torch.empty(n, dtype=dtype)
    norms = OPS.lbfgs_combine_(out, grad, old_dirs, old_stps, coefficients=coefficients, metric=weights)
    params = [p.clone() for p in (grad[: n // 2].bfloat16(), grad[n // 2 :].double())]
    OPS.lbfgs_displace_(params, d, origin=prev_grad, t=0.21)
    flat = torch.empty(n, dtype=dtype)
    OPS.lbfgs_gather_(flat, params, [0, n // 2], negate=True)
    return [y, s, dots, single, out, norms, *params, flat], (
        old_dirs,
        old_stps,
        grad,
        prev_grad,
        d,
        weights,
        coefficients,
    )


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def everything():
    return {
        f"{n} {dtype} {row_dtype} {count} {metric}": digest(one_iteration(n, dtype, row_dtype, count, metric)[0])
        for n in SIZES
        for dtype, row_dtype in KINDS
        for count, metric in ((0, False), (1, True), (5, False), (19, True))
    }


@pytest.mark.parametrize(("dtype", "row_dtype"), KINDS, ids=str)
@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("count", [0, 1, 4, 9, 21])
@pytest.mark.parametrize("n", SIZES[:-1])
def test_numbers(dtype, row_dtype, n, count, metric):
    found, given = one_iteration(n, dtype, row_dtype, count, metric)
    y, s, dots, single, out, norms = found[:6]
    old_dirs, old_stps, grad, prev_grad, d, weights, coefficients = given
    assert torch.equal(y, (grad - prev_grad).to(row_dtype)) and torch.equal(s, (d * 0.37).to(row_dtype))
    w = weights.double() if metric else torch.ones(n, dtype=torch.float64)
    dirs, stps = (torch.stack([*rows, new]).double() for rows, new in ((old_dirs, y), (old_stps, s)))
    with_both = torch.stack([grad.double(), y.double()], 1)
    expected = torch.cat([(dirs * w) @ with_both, stps @ with_both]).reshape(-1)
    scale = 1e-14 * n
    torch.testing.assert_close(dots, expected, rtol=1e-12, atol=scale)
    torch.testing.assert_close(
        single, torch.cat([(dirs[:-1] * w) @ grad.double(), stps[:-1] @ grad.double()]), rtol=1e-12, atol=scale
    )
    if row_dtype == torch.bfloat16:  # their coefficients have 45 bits
        mantissa, exponent = torch.frexp(coefficients[1:])
        coefficients[1:] = torch.ldexp(torch.round(mantissa * 2**45) / 2**45, exponent)
    coefficients = coefficients.to(DEVICE)
    combined = w * (coefficients[0] * grad.double() + dirs[:-1].T @ coefficients[1 : 1 + count])
    combined = combined + stps[:-1].T @ coefficients[1 + count :]
    torch.testing.assert_close(out, combined.to(dtype), rtol=1e-12 if dtype == torch.float64 else 2e-7, atol=1e-13)
    largest, total, product = norms.tolist()
    assert largest == out.abs().max().item()
    assert total == pytest.approx(out.double().abs().sum().item(), rel=1e-12)
    assert product == pytest.approx((out.double() @ grad.double()).item(), rel=1e-9, abs=scale)


@pytest.mark.about_the_cpu("whose large vectors are allocated together")
def test_vectors_of_one_block_are_tensors_in_their_own_right():
    numel, count = 1024 * 1024, 5  # of a size that would put all of them into the same places of a cache
    vectors = _C.vectors_of_one_block(count, numel, torch.float32)
    for value, vector in enumerate(vectors):
        vector.fill_(value)
    assert all(vector.is_contiguous() and vector.shape == (numel,) for vector in vectors)
    assert all((vector == value).all() for value, vector in enumerate(vectors))
    assert len({vector.data_ptr() % 4096 for vector in vectors}) == count
    assert all(vector.untyped_storage().nbytes() == 4 * numel for vector in vectors)
    last = vectors.pop()
    copied = copy.deepcopy(last)
    file = io.BytesIO()
    torch.save(last, file)
    assert file.tell() < 4 * numel + 10_000
    del vectors  # the block lives on with what is left of it
    assert (last == count - 1).all() and torch.equal(last, copied)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), copied)


@pytest.mark.about_the_cpu("whose large vectors are allocated together")
def test_no_room():
    assert _C.vectors_of_one_block(0, 100, torch.float64) == []
    assert [v.numel() for v in _C.vectors_of_one_block(3, 0, torch.bfloat16)] == [0, 0, 0]
    with pytest.raises(ValueError, match="-1 vectors"):
        _C.vectors_of_one_block(-1, 100, torch.float32)
    with pytest.raises(RuntimeError, match="memory"):
        _C.vectors_of_one_block(1 << 30, 1 << 30, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 7, 8, 1023, 1024, 1029])
def test_norms_of_what_is_not_finite(bad, at):
    vector = torch.zeros(1030)
    vector[at] = bad
    largest = OPS.lbfgs_norms(vector).tolist()[0]
    assert largest == abs(bad) or (largest != largest and bad != bad)


@pytest.mark.about_the_cpu("a GPU has its own")
def test_threads():
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    assert all(result == results[0] for result in results[1:])


CHILD = """
import json, sys
import torch
torch.set_num_threads(2)
from optim_ext import _C
import test_bits
json.dump({"isa": _C.isa(), "digests": test_bits.everything()}, sys.stdout)
"""


CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


@pytest.mark.about_the_cpu("its instruction sets")
@pytest.mark.only_where(" avx2" in CPU_FLAGS, reason="there are instruction sets to compare")
def test_instruction_sets():
    expected = {"default": "baseline", "avx2": "avx2"} | ({"avx512": "avx512"} if " avx512vl" in CPU_FLAGS else {})
    results = {}
    for name in expected:
        folders = [*Path(__file__).parents[:2], Path(optim_ext.__file__).parents[1]]
        path = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": name, "PYTHONPATH": os.pathsep.join(path)}
        done = subprocess.run(
            [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        results[name] = json.loads(done.stdout)
    assert {name: result["isa"] for name, result in results.items()} == expected
    for name, result in results.items():
        differing = [key for key, value in result["digests"].items() if value != results["default"]["digests"][key]]
        assert differing == [], f"{name} differs from the baseline"


def test_a_history_from_elsewhere_gives_the_same_dots():
    """Dot products taken one iteration at a time, with the oldest pair dropped again and again, are those taken all at
    once, to the bit."""
    n, size = 3000, 6
    kept, state, param = history_of(n), {}, torch.zeros(n, requires_grad=True)

    def go_on(history, state, grad, anew=False):
        param.grad = grad.clone()
        here = history.evaluate([param], False, False)
        found = history.depart([param], here, size, anew, 1.0, None, False, None, -math.inf, False)
        history.save(state, 1.0, 0.0, size, not anew)
        return found

    for index, grad in enumerate(vectors(40, n, torch.float32, 1)):
        before = copy.deepcopy(state)
        found = go_on(kept, state, grad, anew=index == 0)
        if index > 0:
            other = history_of(n)
            assert other.load(before, size) and other.pairs == min(index - 1, size)
            assert go_on(other, before, grad) == found
            for key, value in state.items():
                for ours, theirs in zip(listed(value), listed(before[key]), strict=True):
                    assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert kept.pairs == size


def history_of(n):
    return _C.LbfgsHistory([0], n, torch.float32, torch.float32, DEVICE, 6, None, [])


@pytest.mark.parametrize("counted", [0, 1024, 3072, 5000])
def test_sums_of_what_is_counted(counted):
    """Those of the vectors' beginnings, to the bit; what is written is the whole."""
    n, dtype = 5000, torch.float32
    whole, given = one_iteration(n, dtype, dtype, 5, metric=True)
    old_dirs, old_stps, grad, prev_grad, d, weights, coefficients = given

    def run(count, **counted):
        dirs, stps = ([row[:count] for row in rows] for rows in (old_dirs, old_stps))
        of = {"metric": weights[:count], **counted}
        y, s, out = (torch.empty(count) for _ in range(3))
        pair = OPS.lbfgs_pair_(y, s, grad[:count], prev_grad[:count], d[:count], dirs, stps, t=0.37, **of)
        dots = OPS.lbfgs_dots(grad[:count], dirs, stps, **of)
        norms = OPS.lbfgs_combine_(out, grad[:count], dirs, stps, coefficients=coefficients, **of)
        return [pair, dots, norms, OPS.lbfgs_norms(d[:count], grad[:count], **counted)], [y, s, out]

    sums, written = run(n, counted=counted)
    wanted, _ = run(counted)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(sums, wanted, strict=True))
    assert torch.equal(written[0], whole[0]) and torch.equal(written[1], whole[1]) and torch.equal(written[2], whole[4])


@pytest.mark.parametrize("counted", [-1024, 1000, 6000, 5001])
def test_what_is_counted_is_whole_tiles(counted):
    with pytest.raises(ValueError, match="multiple of 1024"):
        OPS.lbfgs_norms(torch.ones(5000), counted=counted)


def listed(value):
    return value if isinstance(value, list) else [value]


def test_opcheck():
    n = 33
    rows, more = vectors(4, n, torch.float32, 1), vectors(5, n, torch.float32, 2)
    y, s, out = (torch.empty(n) for _ in range(3))
    coefficients = torch.ones(5, dtype=torch.float64, device="cpu")
    samples = {
        "lbfgs_gather_": ((out, [more[0][:20], more[1][:13]], [0, 20]), {}),
        "lbfgs_displace_": (([more[0].clone()], more[1]), {"t": 0.5, "origin": more[2]}),
        "lbfgs_norms": ((more[0], more[1]), {}),
        "lbfgs_dots": ((more[0], rows[:2], rows[2:]), {}),
        "lbfgs_pair_": ((y, s, *more[:3], rows[:2], rows[2:]), {"t": 0.5}),
        "lbfgs_combine_": ((out, more[0], rows[:2], rows[2:]), {"coefficients": coefficients}),
    }
    for name, (arguments, keywords) in samples.items():
        torch.library.opcheck(getattr(OPS, name).default, arguments, keywords)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grad": torch.ones(9)}, "dense vector of"),
        ({"d": torch.ones(8, dtype=torch.float64)}, "d has dtype"),
        ({"prev_grad": torch.ones(4, 2)[:, 0]}, "dense vector"),
        ({"old_dirs": [torch.ones(8)]}, "equally long"),
        ({"y": torch.ones(8, dtype=torch.float16), "s": torch.ones(8, dtype=torch.float16)}, "dtype"),
        ({"grad": torch.ones(8, dtype=torch.int64)}, "expected Float or Double"),
    ],
    ids=str,
)
def test_bad_vectors(change, words):
    names = ("y", "s", "grad", "prev_grad", "d")
    given = {name: torch.full((8,), 7.0) for name in names} | {"old_dirs": [], "old_stps": []} | change
    with pytest.raises((RuntimeError, ValueError), match=words):
        OPS.lbfgs_pair_(*given.values(), t=1.0)
    assert all((given[name] == (7 if name not in change else change[name])).all() for name in names)
