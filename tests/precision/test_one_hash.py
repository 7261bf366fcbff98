"""Every way to keep parameters and state, in every class that takes it, has the same bits on each instruction set, on any
number of threads, and in a run that was saved and loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import optim_ext

pytestmark = pytest.mark.about_the_cpu("its instruction sets and threads are compared")

# ATEN_CPU_CAPABILITY is read once per process. Torch's random numbers differ between instruction sets, NumPy's do not.
CHILD = """
import functools, hashlib, io, json, sys
import numpy, torch
from kept import MUON, TAKING, WAYS, everything, name_of
from lockstep import copy_of
from optim_ext import _C

SHAPES = ((129, 1000), (64, 100), (17, 33), (7,), ())

@functools.cache
def tensors(seed):
    numbers = numpy.random.default_rng(seed)
    return [torch.from_numpy(numpy.asarray(numbers.standard_normal(shape))).bfloat16() for shape in SHAPES]

def rows_of(grad, step):
    index = torch.from_numpy(numpy.random.default_rng(step).integers(0, len(grad), (1, 9)))
    return torch.sparse_coo_tensor(index, grad[:9], grad.shape, check_invariants=False)

def train(optimizer, params, steps, by_rows):
    for step in steps:
        for p, grad in zip(params, tensors(10 + step)):  # matrices come first
            p.grad = rows_of(grad, step) if by_rows and grad.dim() == 2 else grad
        optimizer.step()

def through_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)

def digest(spec, way, threads, resumed, **rows):
    torch.set_num_threads(threads)
    params = [torch.nn.Parameter(value.clone()) for value in tensors(1) if spec is not MUON or value.dim() == 2]
    optimizer = spec.ours(params, **copy_of(spec.typical), **way, **rows)
    train(optimizer, params, range(2), bool(rows))
    if resumed:
        saved = through_file({"params": [p.detach() for p in params], "state": optimizer.state_dict()})
        params = [torch.nn.Parameter(p) for p in saved["params"]]
        optimizer = spec.ours(params, **copy_of(spec.typical), **way, **rows)
        optimizer.load_state_dict(saved["state"])
    train(optimizer, params, range(2, 4), bool(rows))
    found = hashlib.sha256()
    for one in everything(optimizer):
        found.update(one.numpy().tobytes())
    return found.hexdigest()

digests = {
    f"{spec.name} {name_of(way)}": [digest(spec, way, *run) for run in ((1, False), (3, True))]
    for spec in TAKING for way in WAYS
} | {
    f"rows of {spec.name} {name_of(way)}": [digest(spec, way, *run, lazy_rows=True) for run in ((1, False), (3, True))]
    for spec in TAKING if spec.name == "AdamW" for way in WAYS
}
json.dump({"isa": _C.isa(), "digests": digests}, sys.stdout)
"""


def capabilities():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}
    needs = {"avx2": (" avx2",), "avx512": (" avx512vl", " avx512bw")}
    return {name: isa for name, isa in found.items() if all(flag in flags for flag in needs.get(name, ()))}


def run_on(capability):
    tests = Path(__file__).parents[1]
    path = [str(tests), str(Path(optim_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def baseline():
    return run_on("default")


def test_threads_and_a_restart_change_no_bit(baseline):
    assert baseline["isa"] == "baseline"
    assert [name for name, found in baseline["digests"].items() if len(set(found)) != 1] == []


def test_ways_differ(baseline):
    """A hash of what is the same for all would prove nothing. (State is float32 beside 16 bits unless it is asked to be less.)"""
    assert len({found[0] for name, found in baseline["digests"].items() if name.startswith("AdamW ")}) == 12


@pytest.mark.parametrize("capability", [name for name in capabilities() if name != "default"])
def test_instruction_sets_change_no_bit(baseline, capability):
    found = run_on(capability)
    assert found["isa"] == capabilities()[capability]
    assert found["digests"] == baseline["digests"]
