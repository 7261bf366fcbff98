"""What it takes to keep bfloat16 parameters exactly, and state in fewer bits: bytes really held, time beside torch's
fused float32 step, and where a constant gradient and weight decay alone take a parameter.

    python benchmarks/precision.py --threads 1
    python benchmarks/precision.py --codecs

All ways step in turns in one process; the time is the median of the ratios to torch in the same round.

``--codecs`` is a test of what state in few bits does to an update, beside bitsandbytes and torchao where these are
installed (benchmarks/requirements.txt). Float32 parameters take steps of AdamW with gradients whose sizes are spread evenly
in their logarithms, neighbours in memory mixed. For each spread (the largest size over the smallest) the table has how much
further than with float32 state the tenth of elements with the smallest gradients moves on average, and in brackets by how
much each of them is off on average; and the time of a step.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import optim_ext

WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, q8 state": (torch.float32, {"state_precision": "q8"}),
    "bf16 alone": (torch.bfloat16, {}),
    "master": (torch.bfloat16, {"param_precision": "master"}),
    "remainder": (torch.bfloat16, {"param_precision": "remainder"}),
    "remainder, bf16 state": (torch.bfloat16, {"param_precision": "remainder", "state_precision": "bf16"}),
    "remainder, q8 state": (torch.bfloat16, {"param_precision": "remainder", "state_precision": "q8"}),
    "kahan": (torch.bfloat16, {"param_precision": "kahan"}),
    "stochastic": (torch.bfloat16, {"param_precision": "stochastic"}),
    "stochastic, bf16 state": (torch.bfloat16, {"param_precision": "stochastic", "state_precision": "bf16"}),
    "stochastic, q8 state": (torch.bfloat16, {"param_precision": "stochastic", "state_precision": "q8"}),
}


def optimizer_of(dtype: torch.dtype, rows: int, **options: Any) -> torch.optim.Optimizer:
    param = torch.nn.Parameter(torch.randn(rows, 1024).to(dtype))
    param.grad = torch.randn(rows, 1024).to(dtype)
    return optim_ext.AdamW([param], lr=1e-4, **options)


def bytes_held(optimizer: torch.optim.Optimizer) -> float:
    """For each element: parameter, gradient and state."""
    (param,) = optimizer.param_groups[0]["params"]
    tensors = [param, param.grad, *(value for value in optimizer.state[param].values() if value.numel() > 8)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / param.numel()


def ends(way: str, rate: float, decay: float, gradient: float) -> float:
    """Where 1000 steps take a parameter of ones, on average."""
    dtype, options = WAYS[way]
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = optim_ext.AdamW([param], lr=rate, weight_decay=decay, **options)
    param.grad = torch.full_like(param, gradient)
    for _ in range(1000):
        optimizer.step()
    return param.float().mean().item()


def measure(rows: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Bytes an element and time in units of torch's."""
    ours = {way: optimizer_of(dtype, rows, **options) for way, (dtype, options) in WAYS.items()}
    param = torch.nn.Parameter(torch.randn(rows, 1024))
    param.grad = torch.randn(rows, 1024)
    theirs = torch.optim.AdamW([param], lr=1e-4, fused=True)
    ratios: dict[str, list[float]] = {way: [] for way in ours}
    for index in range(rounds + 2):
        times = {}
        for way, optimizer in [("torch", theirs), *ours.items()]:
            start = time.perf_counter()
            optimizer.step()
            times[way] = time.perf_counter() - start
        for way in ours:
            if index >= 2:
                ratios[way].append(times[way] / times["torch"])
    return {way: (bytes_held(ours[way]), statistics.median(ratios[way])) for way in ours}


Maker = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

SPREADS = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
CODEC_STEPS = 200


def codecs() -> dict[str, Maker]:
    """Optimizers that keep state in few bits: ours, and those of packages that are here."""
    found: dict[str, Maker] = {
        "optim_ext q8": lambda p: optim_ext.AdamW(p, weight_decay=0.0, state_precision="q8"),
        "optim_ext bf16": lambda p: optim_ext.AdamW(p, weight_decay=0.0, state_precision="bf16"),
    }
    others = [
        ("bitsandbytes", "bitsandbytes.optim", ["AdamW8bit"]),
        ("torchao", "torchao.optim", ["AdamW8bit", "AdamW4bit", "AdamWFp8"]),
    ]
    for package, module, names in others:
        try:
            classes = importlib.import_module(module)
        except ImportError as error:
            print(f"without {package}: {error}")
            continue
        for name in names:
            found[f"{package} {name}"] = functools.partial(getattr(classes, name), weight_decay=0.0)
    return found


def gradients(spread: float, rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """How large each element's gradients are, and the gradients of some steps, of one sign but for noise."""
    draws = torch.Generator().manual_seed(0)
    sizes = spread ** -torch.rand(rows, 1024, generator=draws)
    return sizes, [sizes * (1 + torch.randn(rows, 1024, generator=draws)) for _ in range(8)]


def ways(makers: dict[str, Maker], grads: list[torch.Tensor]) -> dict[str, tuple[torch.Tensor, list[float]]]:
    """How far the steps of each optimizer take each element, and the times of its steps. They step in turns."""
    params = {name: torch.nn.Parameter(torch.zeros_like(grads[0])) for name in makers}
    optimizers = {name: make([params[name]]) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in makers}
    for index in range(CODEC_STEPS):
        for name, optimizer in optimizers.items():
            params[name].grad = grads[index % len(grads)]
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    return {name: (params[name].detach(), times[name]) for name in makers}


def print_codecs(rows: int) -> None:
    usual = "torch"
    makers = {usual: lambda p: torch.optim.AdamW(p, weight_decay=0.0, fused=True), **codecs()}
    cells: dict[str, list[str]] = {name: [] for name in makers}
    ratios: dict[str, list[float]] = {name: [] for name in makers}
    for spread in SPREADS:
        sizes, grads = gradients(spread, rows)
        small = sizes <= sizes.flatten().kthvalue(sizes.numel() // 10).values
        found = ways(makers, grads)
        right, base = found[usual]
        for name, (moved, times) in found.items():
            further = moved[small].mean() / right[small].mean() - 1
            each = ((moved - right) / right)[small].abs().mean()
            cells[name].append(f"{100 * further.item():+.1f} % ({100 * each.item():.1f} %)")
            ratios[name] += [mine / other for mine, other in zip(times, base, strict=True)]
    print(f"AdamW, {rows * 1024:,} float32 parameters, {CODEC_STEPS} steps, torch {torch.__version__}")
    print("| state | " + " | ".join(f"{spread:g}" for spread in SPREADS) + " | time / torch fused float32 |")
    print("|---" * (len(SPREADS) + 2) + "|")
    for name, row in cells.items():
        if name != usual:
            print(f"| {name} | {' | '.join(row)} | {statistics.median(ratios[name]):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=16_384, help="of 1024 parameters each")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--codecs", action="store_true", help="what state in few bits does, beside other packages")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.codecs:
        return print_codecs(min(arguments.rows, 1024))
    found = measure(arguments.rows, arguments.rounds)
    print(f"AdamW, {arguments.rows * 1024:,} parameters, {arguments.threads} threads, torch {torch.__version__}")
    print("| way | bytes | time / torch fused float32 | 1.0 moves to 0.9 | decay alone gives 0.90483 |")
    print("|---|---|---|---|---|")
    for way, (held, ratio) in found.items():
        moved, decayed = ends(way, 1e-4, 0.0, 1.0), ends(way, 1e-2, 1e-2, 0.0)
        print(f"| {way} | {held:.2f} | {ratio:.2f} | {moved:.4f} | {decayed:.5f} |")


if __name__ == "__main__":
    main()
