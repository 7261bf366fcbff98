"""Rules written in Python beside the built-in classes: steps, first steps, and what compiling takes.

    python benchmarks/rules.py --threads 1

AdamW written as a rule, interpreted and compiled, and AdaBelief, against built-in AdamW, in turns, by medians of pairs; the
same AdaBelief as torch's operations on lists (foreach), alone and through torch.compile with --compiled, and that of
pytorch_optimizer where it is installed. Seconds of compiling are those of the processor, in an empty cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import Shape, gpt2, small_vectors
from torch import Tensor

import optim_ext
from optim_ext._rules.compiler import compile_now
from optim_ext.math import lerp, sqrt


def adamw(param, grad, exp_avg, exp_avg_sq, *, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):  # type: ignore[no-untyped-def]
    exp_avg = lerp(exp_avg, grad, 1 - betas[0])
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad * grad
    denom = sqrt(exp_avg_sq) * (1 / sqrt(1 - betas[1] ** step)) + eps
    return (1 - lr * weight_decay) * param - lr / (1 - betas[0] ** step) * (exp_avg / denom), exp_avg, exp_avg_sq


def adabelief(param, grad, exp_avg, exp_avg_var, *, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-16):  # type: ignore[no-untyped-def]
    exp_avg = lerp(exp_avg, grad, 1 - betas[0])
    exp_avg_var = betas[1] * exp_avg_var + (1 - betas[1]) * (grad - exp_avg) ** 2 + eps
    denom = sqrt(exp_avg_var) / sqrt(1 - betas[1] ** step) + eps
    return param - lr / (1 - betas[0] ** step) * (exp_avg / denom), exp_avg, exp_avg_var


class ForeachAdaBelief(torch.optim.Optimizer):
    """The same in torch's operations on lists."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        for p in params:
            if p not in self.state:
                self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        m, v = ([self.state[p][key] for p in params] for key in ("m", "v"))
        self.count += 1
        torch._foreach_lerp_(m, grads, 0.1)
        diff = torch._foreach_sub(grads, m)
        torch._foreach_mul_(v, 0.999)
        torch._foreach_addcmul_(v, diff, diff, 0.001)
        torch._foreach_add_(v, 1e-16)
        denom = torch._foreach_sqrt(v)
        torch._foreach_div_(denom, (1 - 0.999**self.count) ** 0.5)
        torch._foreach_add_(denom, 1e-16)
        torch._foreach_addcdiv_(params, m, denom, -1e-3 / (1 - 0.9**self.count))


def made(function: Callable[..., Any], backend: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return optim_ext.rule(("exp_avg", "exp_avg_sq" if function is adamw else "exp_avg_var"), backend=backend)(function)


def candidates(compiled_foreach: bool) -> dict[str, Callable[[list[Tensor]], Callable[[], Any]]]:
    found: dict[str, Callable[[list[Tensor]], Callable[[], Any]]] = {
        "AdamW, rule, compiled": lambda params: made(adamw, "compiled")(params).step,
        "AdamW, rule, interpreted": lambda params: made(adamw, "interpreted")(params).step,
        "AdaBelief, rule, compiled": lambda params: made(adabelief, "compiled")(params).step,
        "AdaBelief, rule, interpreted": lambda params: made(adabelief, "interpreted")(params).step,
        "AdaBelief, foreach": lambda params: ForeachAdaBelief(params).step,
    }
    if compiled_foreach:
        found["AdaBelief, foreach, torch.compile"] = lambda params: torch.compile(ForeachAdaBelief(params).step)
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import AdaBelief

        found["AdaBelief, pytorch_optimizer"] = lambda params: AdaBelief(params).step
    return found


def parameters(shapes: list[Shape]) -> list[Tensor]:
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def seconds(step: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - began) / repeats


def compare(shapes: list[Shape], rounds: int, repeats: int, compiled_foreach: bool) -> None:
    built_in = optim_ext.AdamW(parameters(shapes)).step
    steps = {name: make(parameters(shapes)) for name, make in candidates(compiled_foreach).items()}
    for step in (built_in, *steps.values()):
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    own = []
    for _ in range(rounds):
        for name, step in steps.items():
            own.append(seconds(built_in, repeats))
            times[name].append(seconds(step, repeats) / own[-1])
    print(f"  built-in AdamW: {1e3 * statistics.median(own):.3f} ms")
    for name, ratios in times.items():
        print(f"  {name:34} {statistics.median(ratios):6.2f} x")


def processor_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def compiling() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o700)
        os.environ["OPTIM_EXT_CACHE"] = folder
        torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # torch imports its compiler with the first optimizer
        began = time.perf_counter()
        params = parameters([(1000,)])
        first = made(adamw, "interpreted")(params)
        first.step()
        print(f"from the decorator to the end of the first step: {1e3 * (time.perf_counter() - began):.1f} ms")
        for what in ("compiling", "loading from the cache"):
            rule: Any = made(adamw, "interpreted")
            variant = rule._variant_with({})
            variant.compiled = False
            used, began = processor_seconds(), time.perf_counter()
            compile_now(variant)
            print(f"{what}: {processor_seconds() - used:.2f} s of the processor, {time.perf_counter() - began:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true", help="measure torch.compile over foreach, too")
    parser.add_argument("--small", action="store_true", help="leave out the 124M parameters of GPT-2")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("OPTIM_EXT_CACHE", os.path.join(tempfile.gettempdir(), f"optim_ext-benchmark-{os.geteuid()}"))
    cases: list[tuple[str, list[Shape], int]] = [
        ("1000 tensors of 64", small_vectors(), 20),
        ("one tensor of 65,536, in the cache", [(65536,)], 100),
    ]
    if not arguments.small:
        cases.append(("GPT-2, 124M", gpt2(), 1))
    for name, shapes, repeats in cases:
        print(f"{name}, {arguments.threads} thread(s)")
        compare(shapes, arguments.rounds, repeats, arguments.compiled)
    compiling()


if __name__ == "__main__":
    main()
