"""The same bytes for any number of threads, any instruction set, and any split of the tensors."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from lockstep import bits, copy_of, give_grads, make_params, random, twin

import optim_ext

ROOT = Path(__file__).resolve().parents[2]
# Larger than one thread's share, ragged, and short: every way the work can be dealt out.
SHAPES = ((300, 301), (3,), (65537,), (), (255,), (257, 3), (1 << 15,), (0,), (1000, 7))


@cache
def start_and_gradients(dtype, shapes, strided):
    """What every run of these begins with, and the gradients of its steps."""
    params = make_params(shapes, dtype)
    if strided:
        for param in params:
            if param.dim() == 2:
                param.data = param.data.t().contiguous().t()
    gradients = []
    for step in range(3):
        give_grads(params, step)
        given = [param.grad for param in params]
        gradients.append([torch.stack([grad, grad], -1)[..., 0] for grad in given] if strided else given)
    return params, gradients


def run(spec, options, dtype, shapes=SHAPES, strided=False):
    start, gradients = start_and_gradients(dtype, shapes, strided)
    params = twin(start)
    optimizer = spec.ours(params, **copy_of(options))
    for given in gradients:
        for param, grad in zip(params, given, strict=True):
            param.grad = grad
        optimizer.step()
    state = [value for param in params for _, value in sorted(optimizer.state.get(param, {}).items())]
    return [bits(tensor) for tensor in (*params, *state)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_threads(spec, dtype, strided, threads):
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(run(spec, {**spec.typical, **spec.half_options}, dtype, strided=strided))
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_for_every_option_set(case, dtype, threads):
    results = []
    for count in (1, 2):
        threads(count)
        results.append(run(case.spec, case.options, dtype, shapes=((40000,), (7,), (300, 33))))
    assert results[0] == results[1]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_threads_of_a_clipped_step(dtype, norm_type, threads):
    """Norm and clipped step; gradients long enough for several threads and tiles, and some strided."""
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        params = make_params(SHAPES, dtype)
        optimizer = optim_ext.AdamW(params, lr=0.1)
        give_grads(params, 0)
        params[0].grad = params[0].grad.t().contiguous().t()
        norm = optimizer.clip_grad_norm(0.5, norm_type)
        optimizer.step()
        each = torch.ops.optim_ext.norms([p.grad for p in params], norm_type=norm_type)
        results.append([bits(tensor) for tensor in (norm, each, *params)])
    assert all(result == results[0] for result in results[1:])


def test_norm_of_a_split_tensor():
    """Not the same sum, as it is taken in another order, but the same once rounded to float."""
    whole = random((sum(PIECES),), torch.float32, 1)
    norms = [torch.ops.optim_ext.grad_norm(list(parts))[0] for parts in ([whole], whole.split(list(PIECES)))]
    assert bits(norms[0]) == bits(norms[1])


PIECES = (1, 3, 64, 100, 255, 256, 257, 1000, 4096)


@pytest.mark.only_for(lambda spec: not spec.whole_tensors, reason="what a tensor is enters the formula")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_splits(variant, dtype):
    """One tensor, and the same elements as many smaller ones at odd offsets, give the same bytes."""
    total = sum(PIECES)
    whole = torch.nn.Parameter(random((total,), dtype, 1))
    pieces = [torch.nn.Parameter(piece.clone()) for piece in whole.detach().split(list(PIECES))]
    views = [torch.nn.Parameter(view) for view in whole.detach().clone().split(list(PIECES))]
    runs = [[whole], pieces, views]
    for params in runs:
        optimizer = variant.spec.ours(params, **copy_of(variant.options))
        for step in range(3):
            grad = random((total,), dtype, 10 + step)
            for param, part in zip(params, grad.split([p.numel() for p in params]), strict=True):
                param.grad = part.clone() if params is pieces else part
            optimizer.step()
    joined = [bits(torch.cat([p.detach() for p in params])) for params in runs]
    assert joined[1] == joined[0] and joined[2] == joined[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_the_same_numbers(spec, dtype):
    """Element by element, a strided walk computes what the dense one does."""
    dense = torch.nn.Parameter(random((90, 70), dtype, 1))
    strided = torch.nn.Parameter(torch.stack([dense.detach()] * 3, -1)[..., 1])
    transposed = torch.nn.Parameter(dense.detach().t().contiguous().t())
    params = [dense, strided, transposed]
    for param in params:
        optimizer = spec.ours([param], **spec.typical)
        for step in range(3):
            param.grad = random((90, 70), dtype, 10 + step)
            optimizer.step()
    assert bits(strided) == bits(dense) and bits(transposed) == bits(dense)


# Instruction sets: ATEN_CPU_CAPABILITY is read once per process, so each gets a process of its own. The input comes from
# NumPy, because torch's random numbers differ between instruction sets.

CHILD = """
import functools, hashlib, json, sys
import numpy, torch
import optim_ext
from optim_ext import _C
from specs import cases
from lockstep import copy_of, bits

@functools.cache
def tensors(seed, dtype):
    numbers = numpy.random.default_rng(seed)
    shapes = ((1000,), (17, 31), (5,), (), (300, 70))
    return [torch.from_numpy(numpy.asarray(numbers.standard_normal(shape))).to(dtype) for shape in shapes]

digests = {}
for case in cases():
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    for dtype in filter(case.spec.takes, dtypes):
        params = [torch.nn.Parameter(t.clone()) for t in tensors(1, dtype)]
        params[4].data = params[4].data.t()
        optimizer = case.spec.ours(params, **copy_of(case.options))
        for step in range(3):
            for param, grad in zip(params, tensors(10 + step, dtype)):
                param.grad = grad.t() if grad.shape == (300, 70) else grad
            optimizer.step()
        digest = hashlib.sha256()
        for tensor in [p.detach() for p in params] + [v for p in params for _, v in sorted(optimizer.state.get(p, {}).items())]:
            digest.update(bits(tensor)[2])
        digests[case.id + str(dtype)] = digest.hexdigest()
for name, options in (("SparseAdam", {"lr": 0.1}), ("SGD", {"lr": 0.1}), ("Adagrad", {"lr": 0.1})):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        table = torch.nn.Parameter(tensors(1, dtype)[4].clone())
        optimizer = getattr(optim_ext, name)([table], **options)
        for step in range(3):
            rows = numpy.random.default_rng(step).integers(0, 40, 300)  # of which many are there more than once
            table.grad = torch.sparse_coo_tensor(torch.from_numpy(rows)[None], tensors(10 + step, dtype)[4], table.shape)
            optimizer.step()
        digest = hashlib.sha256(bits(table.detach())[2])
        digests[f"sparse {name} {dtype}"] = digest.hexdigest()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
    for norm_type in (1.0, 2.0, float("inf")):
        grads = tensors(1, dtype) + [tensors(2, dtype)[4].t()[::2]]
        norm, _, _ = torch.ops.optim_ext.grad_norm(grads, norm_type=norm_type)
        each = torch.ops.optim_ext.norms(grads, norm_type=norm_type)
        digests[f"norm {norm_type} {dtype}"] = repr((norm.item(), each.tolist()))
json.dump({"isa": _C.isa(), "digests": digests}, sys.stdout)
"""


def capabilities():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if " avx2" not in flags:
        return ["default"]
    return ["default", "avx2", *(["avx512"] if " avx512vl" in flags and " avx512bw" in flags else [])]


def in_process(code, **environment):
    path = os.pathsep.join(
        [str(ROOT / "tests"), str(Path(optim_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.only_where(len(capabilities()) > 1, reason="there are instruction sets to compare")
def test_instruction_sets():
    available = capabilities()
    results = {name: in_process(CHILD, ATEN_CPU_CAPABILITY=name, OMP_NUM_THREADS="1") for name in available}
    expected = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}
    assert {name: result["isa"] for name, result in results.items()} == {name: expected[name] for name in available}
    first = results["default"]["digests"]
    for name in available[1:]:
        differing = [key for key, digest in results[name]["digests"].items() if digest != first[key]]
        assert differing == [], f"{name} differs from the baseline"
