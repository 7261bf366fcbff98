"""What ``python -m optim_ext`` tells of an installation: versions, devices and switches, and a self-test of a few seconds."""

from __future__ import annotations

import functools
import inspect
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

import optim_ext
from optim_ext._doctor import openmp_runtimes
from optim_ext._formulas import FORMULAS, ByFormula
from optim_ext._load import _C

# Largest difference from torch.optim or the formula in float64, relative to the largest parameter, that STEPS roundings may explain.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
STEPS = 5
SHAPES: list[tuple[int, ...]] = [(), (7,), (33, 65), (0, 3)]
OWN_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "Adafactor": [(), (7,), (33, 65), (3, 4, 5)],  # torch's divides by zero where there is no element
    "Muon": [(33, 65), (65, 33)],  # takes matrices only
    "SparseAdam": [(7,), (33, 65)],  # takes sparse gradients only
}


class Tested(NamedTuple):
    """One optimizer under one set of options, compared with torch's or with its formula."""

    case: str
    compared_with: str
    difference: float
    good: bool

    def __str__(self) -> str:
        verdict = "ok  " if self.good else "FAIL"
        return f"self-test {verdict} {self.case}: differs from {self.compared_with} by {self.difference:.1e}"


def facts() -> dict[str, Any]:
    """Everything but the self-test, as numbers, strings, lists and dicts."""
    return {
        "version": optim_ext.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": {str(device): _device_name(device) for device in _devices()},
        "cpu_code": _C.isa(),
        "cpu_capability_asked": os.environ.get("ATEN_CPU_CAPABILITY", "unset"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "openmp": openmp_runtimes(),
        "kernels": dict(_kernels()),
        "build": optim_ext.build_info(),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The facts as they are printed."""
    yield f"optim_ext {found['version']}, torch {found['torch']}, Python {found['python']}"
    yield f"system    {found['system']}"
    for device, name in found["devices"].items():
        yield f"device    {device}: {name}"
    yield f"CPU code  {found['cpu_code']} (ATEN_CPU_CAPABILITY={found['cpu_capability_asked']})"
    openmp = ", ".join(found["openmp"]) or "none"
    yield f"threads   {found['threads']} of {found['cores']} cores, OpenMP: {openmp}"
    for name, keys in found["kernels"].items():
        yield f"kernels   {name}: {', '.join(keys)}"
    for key, value in found["build"].items():
        yield f"build     {key}: {value}"


def self_test() -> Iterator[Tested]:
    """Every optimizer on every device, in the precisions of TOLERANCE."""
    for device in _devices():
        for ours, theirs, options in _cases():
            for dtype, tolerance in TOLERANCE.items():
                if theirs is torch.optim.Muon:  # which orthogonalizes in bfloat16, whatever the parameters are
                    tolerance = TOLERANCE[torch.bfloat16]
                path, difference = _compare(ours, theirs, options, dtype, device)
                chosen = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
                case = f"{ours.__name__}({chosen}) {str(dtype).split('.')[-1]} on {device}, {path}"
                other = "its formula" if ours.__name__ in FORMULAS else "torch.optim"
                yield Tested(case, other, difference, difference <= tolerance)  # false for NaN too


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if optim_ext.build_info()["cuda"] is not None:
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return devices


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _kernels() -> Iterator[tuple[str, list[str]]]:
    """Every op of this build with the dispatch keys it has a kernel for."""
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("optim_ext::"):
            keys = ("CPU", "CUDA", "Meta")
            yield name, [key for key in keys if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]


def _cases() -> Iterator[tuple[Callable[..., Optimizer], Callable[..., Optimizer], dict[str, object]]]:
    """The optimizers of ours with torch's twin or, where torch has none, their formula: as they come and with each switch
    their constructors have."""
    switches: dict[str, dict[str, object]] = {
        "amsgrad": {"amsgrad": True},
        "centered": {"centered": True},
        "momentum": {"momentum": 0.9},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "lr_decay": {"lr_decay": 0.1},
        "weight_decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True},
    }
    for name, ours in sorted(vars(optim_ext).items()):
        theirs = functools.partial(ByFormula, ours=ours) if name in FORMULAS else getattr(torch.optim, name, None)
        is_optimizer = isinstance(ours, type) and issubclass(ours, Optimizer)
        if not is_optimizer or theirs is None or ours is theirs:
            continue
        accepted = inspect.signature(ours).parameters
        for options in ({}, *(options for switch, options in switches.items() if switch in accepted)):
            yield ours, theirs, options


def _compare(
    ours: Callable[..., Optimizer],
    theirs: Callable[..., Optimizer],
    options: dict[str, object],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[str, float]:
    """The path ours takes, and how far a few steps of it in `dtype` end from torch's in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[torch.Tensor]:
        shapes = OWN_SHAPES.get(ours.__name__, SHAPES)
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]

    params = draw()
    twins = [p.to(torch.float64, copy=True) for p in params]
    steppers = ours(params, lr=0.01, **options), theirs(twins, lr=0.01, **options)
    for _ in range(STEPS):
        for p, twin, grad in zip(params, twins, draw(), strict=True):
            if theirs is torch.optim.SparseAdam:  # every second row
                rows = torch.arange(0, len(p), 2, device=device)
                grad = torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape, check_invariants=False)
            p.grad, twin.grad = grad, grad.double()
        for stepper in steppers:
            stepper.step(lambda: 1.0)
    path = "native" if all(report.native for report in optim_ext.explain(steppers[0])) else "torch's path"
    ends, expected = (torch.cat([p.double().flatten() for p in end]) for end in (params, twins))
    return path, float((ends - expected).abs().max() / expected.abs().max())  # torch's max() keeps a NaN
