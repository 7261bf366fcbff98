"""What it takes to keep bfloat16 parameters exactly, and state in fewer bits: bytes really held, time beside torch's
fused float32 step, and where a constant gradient and weight decay alone take a parameter.

    python benchmarks/precision.py --threads 1

All ways step in turns in one process; the time is the median of the ratios to torch in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=16_384, help="of 1024 parameters each")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(arguments.rows, arguments.rounds)
    print(f"AdamW, {arguments.rows * 1024:,} parameters, {arguments.threads} threads, torch {torch.__version__}")
    print("| way | bytes | time / torch fused float32 | 1.0 moves to 0.9 | decay alone gives 0.90483 |")
    print("|---|---|---|---|---|")
    for way, (held, ratio) in found.items():
        moved, decayed = ends(way, 1e-4, 0.0, 1.0), ends(way, 1e-2, 1e-2, 0.0)
        print(f"| {way} | {held:.2f} | {ratio:.2f} | {moved:.4f} | {decayed:.5f} |")


if __name__ == "__main__":
    main()
