"""``python -m optim_ext``: a report to paste into a bug report, ending in a self-test of a few seconds.

The exit status is 1 where the self-test finds an optimizer that differs from torch.optim's or, where torch has none, from
its formula.

``python -m optim_ext compile pkg.mod:Name [option=value ...]``: compiles a rule ahead.

``python -m optim_ext memory FILE.py:factory [option=value ...]``: the bytes that a model and its optimizer will take.

``python -m optim_ext run script.py [arguments]`` or ``run -m module``: runs a program whose ``torch.optim`` is this package.
"""

import functools
import inspect
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator

import torch
from torch.optim import Optimizer

import optim_ext
from optim_ext._formulas import FORMULAS, ByFormula
from optim_ext._load import _C
from optim_ext._memory import memory_command
from optim_ext._rules.command import compile_rules
from optim_ext._run import run

# Largest difference from torch.optim or the formula in float64, relative to the largest parameter, that STEPS roundings may explain.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}
STEPS = 5
SHAPES: list[tuple[int, ...]] = [(), (7,), (33, 65), (0, 3)]
OWN_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "Adafactor": [(), (7,), (33, 65), (3, 4, 5)],  # torch's divides by zero where there is no element
    "Muon": [(33, 65), (65, 33)],  # takes matrices only
    "SparseAdam": [(7,), (33, 65)],  # takes sparse gradients only
}


def main() -> int:
    if sys.argv[1:2] == ["compile"]:
        return compile_rules(sys.argv[2:])
    if sys.argv[1:2] == ["memory"]:
        return memory_command(sys.argv[2:])
    if sys.argv[1:2] == ["run"]:
        return run(sys.argv[2:])
    print(f"optim_ext {optim_ext.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"system    {platform.platform()}")
    for device in _devices():
        print(f"device    {device}: {_device_name(device)}")
    print(f"CPU code  {_C.isa()} (ATEN_CPU_CAPABILITY={os.environ.get('ATEN_CPU_CAPABILITY', 'unset')})")
    print(f"threads   {torch.get_num_threads()} of {os.cpu_count()} cores, OpenMP: {', '.join(_openmp_runtimes())}")
    for name, keys in _kernels():
        print(f"kernels   {name}: {', '.join(keys)}")
    for key, value in optim_ext.build_info().items():
        print(f"build     {key}: {value}")
    failures = 0
    for device in _devices():
        for ours, theirs, options in _cases():
            for dtype, tolerance in TOLERANCE.items():
                if theirs is torch.optim.Muon:  # which orthogonalizes in bfloat16, whatever the parameters are
                    tolerance = TOLERANCE[torch.bfloat16]
                path, difference = _compare(ours, theirs, options, dtype, device)
                good = difference <= tolerance  # false for NaN too
                failures += not good
                chosen = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
                line = f"{ours.__name__}({chosen}) {str(dtype).split('.')[-1]} on {device}, {path}"
                other = "its formula" if ours.__name__ in FORMULAS else "torch.optim"
                print(f"self-test {'ok  ' if good else 'FAIL'} {line}: differs from {other} by {difference:.1e}")
    print(f"self-test {'passed' if failures == 0 else f'failed {failures} times'}")
    return int(failures > 0)


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


def _openmp_runtimes() -> list[str]:
    """The OpenMP runtimes loaded into this process; more than one of them means threads that fight each other."""
    try:
        with open("/proc/self/maps") as lines:
            paths = {line.split()[-1] for line in lines if re.search(r"lib(g|i|)omp", line)}
    except OSError:
        return ["unknown"]
    return sorted(paths) or ["none"]


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


if __name__ == "__main__":
    sys.exit(main())
