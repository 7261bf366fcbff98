"""Steps on tensors that do not lie alike: views of packed buffers, gradients of another memory format.

    python benchmarks/strided.py --threads 1

Compares with the faster of torch's for-loop and foreach, in turns, by medians. Who is made and steps first matters, as
much as 10 % here (whose pages lie well, what is still in the caches), so that each is first and last. Torch's fused modes
do not count: they leave such parameters wrong (the last line says for which classes of this torch).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import optim_ext

ELEMENTS = 600_000
RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("AdamW", {"lr": 0.1}),
    ("RMSprop", {"lr": 0.1}),
]


def conv(size: int) -> Tensor:
    return torch.randn(ELEMENTS // (256 * size * size), 256, size, size)


def rows(width: int, gap: int = 14) -> Tensor:
    """Rows of a few elements, with others between them."""
    return torch.randn(ELEMENTS // width, width + gap)[:, 3 : 3 + width]


def packed(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


# Parameter and gradient.
CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "channels_last gradient, 3x3": lambda: (conv(3), packed(conv(3))),
    "channels_last gradient, 5x5": lambda: (conv(5), packed(conv(5))),
    "channels_last parameter, 3x3": lambda: (packed(conv(3)), conv(3)),
    "transposed gradient": lambda: (torch.randn(768, 768), torch.randn(768, 768).t()),
    "rows of 2": lambda: (rows(2), torch.randn(rows(2).shape)),
    "rows of 5": lambda: (rows(5), torch.randn(rows(5).shape)),
    "rows of 16": lambda: (rows(16), torch.randn(rows(16).shape)),
    "rows of 3, the gradient's too": lambda: (rows(3), rows(3, 16)),
    "a column of 14": lambda: (torch.randn(40_000, 14)[:, 3], torch.randn(40_000, 14)[:, 5]),
}


def with_strides_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride()).copy_(tensor)


def optimizer_of(
    library: Any, rule: str, pair: tuple[Tensor, Tensor], options: dict[str, Any]
) -> torch.optim.Optimizer:
    param = torch.nn.Parameter(with_strides_of(pair[0]))
    param.grad = with_strides_of(pair[1])
    optimizer: torch.optim.Optimizer = getattr(library, rule)([param], **options)
    return optimizer


def measure(rule: str, options: dict[str, Any], pair: tuple[Tensor, Tensor], rounds: int) -> dict[str, float]:
    """Milliseconds of a step."""
    modes = {
        "ours": (optim_ext, options),
        "for-loop": (torch.optim, {**options, "foreach": False}),
        "foreach": (torch.optim, {**options, "foreach": True}),
    }
    times: dict[str, list[float]] = {name: [] for name in modes}
    for names in (list(modes), list(reversed(modes))):
        optimizers = {name: optimizer_of(modes[name][0], rule, pair, modes[name][1]) for name in names}
        for index in range(rounds // 2 + 3):
            for name, optimizer in optimizers.items():
                start = time.perf_counter()
                optimizer.step()
                if index >= 3:
                    times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


def is_fused_right(rule: str) -> bool:
    results = []
    for mode in ({"fused": True}, {"foreach": False}):
        buffer = torch.arange(40.0).reshape(8, 5).clone()
        param = torch.nn.Parameter(buffer[:, 1])
        param.grad = torch.linspace(0.1, 1, 8)
        getattr(torch.optim, rule)([param], lr=0.1, **mode).step()
        results.append(buffer)
    return torch.allclose(*results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| tensors | " + " | ".join(f"{rule}{' momentum' if 'momentum' in o else ''}" for rule, o in RULES) + " |")
    print("|---|" + "---|" * len(RULES))
    for name, make in CASES.items():
        torch.manual_seed(0)
        pair = make()
        cells = []
        for rule, settings in RULES:
            found = measure(rule, settings, pair, options.rounds)
            cells.append(f"{min(found['for-loop'], found['foreach']) / found['ours']:.2f}x ({found['ours']:.2f} ms)")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    wrong = [rule for rule in ("SGD", "Adam", "AdamW", "Adagrad") if not is_fused_right(rule)]
    print(f"Torch {torch.__version__}: fused leaves strided parameters wrong in {', '.join(wrong) or 'no class'}.")


if __name__ == "__main__":
    main()
