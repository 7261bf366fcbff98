"""What a step costs on the host here, against another checkout of optim_ext: for changes that are to make it cheaper.

    git worktree add ../before COMMIT && (cd ../before && python setup.py build_ext --inplace)
    python benchmarks/against_commit.py ../before            # host time, a minute and a half
    python benchmarks/against_commit.py ../before --bench    # every cell of step_time.py instead, some ten minutes

Two builds cannot be loaded into one process, so two processes take turns, one case at a time: each round runs the case
here, there, and where torch has a rival its fused step here, in an order that changes from round to round. What is
printed are medians of the rounds and the median of the ratios within rounds, which neighbours of the machine disturb
least. Every case of `CASES` is small on purpose: memory bandwidth plays no part in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, SECONDS = 15, 0.15
SMALL, MIXED = [(64,)] * 1000, [(64, 64), (64,)] * 500

Stepper = Callable[[], Any]


def parameters(shapes: list[tuple[int, ...]]) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return params


def adamw(package: Any, shapes: list[tuple[int, ...]], groups: int = 1, **options: Any) -> Stepper:
    params = parameters(shapes)
    size = len(params) // groups
    return package.AdamW(
        [{"params": params[g * size : (g + 1) * size]} for g in range(groups)], lr=1e-4, **options
    ).step


def one_each(package: Any, shapes: list[tuple[int, ...]], **options: Any) -> Stepper:
    """An optimizer for every parameter, as hooks that step within the backward pass have."""
    optimizers = [package.AdamW([p], lr=1e-4, **options) for p in parameters(shapes)]

    def step_all() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step_all


def in_turn(package: Any, count: int, **options: Any) -> Stepper:
    """Optimizers of 500 small tensors each that step one after the other."""
    optimizers = [package.AdamW(parameters([(4,)] * 500), lr=1e-4, **options) for _ in range(count)]

    def step_all() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step_all


def lbfgs(package: Any, numel: int, history: int) -> Stepper:
    """Iterations on an ill-conditioned quadratic, whose closure costs next to nothing."""
    import torch

    x = torch.nn.Parameter(torch.ones(numel))
    scale = torch.logspace(0, 5, numel)
    optimizer = package.LBFGS([x], lr=1e-3, max_iter=1, history_size=history, tolerance_grad=0.0, tolerance_change=0.0)

    def closure() -> Any:
        with torch.no_grad():
            x.grad = scale * x
            return 0.5 * torch.dot(x, x.grad)

    for _ in range(history + 1):
        optimizer.step(closure)
    return lambda: optimizer.step(closure)


# name -> how a package makes the step, and whether torch's fused optimizer is asked too
CASES: dict[str, tuple[Callable[..., Stepper], bool]] = {
    "AdamW, 1000 x 64": (lambda package, **options: adamw(package, SMALL, **options), True),
    "AdamW, 1000 x 64 in eight groups": (lambda package, **options: adamw(package, SMALL, 8, **options), True),
    "AdamW, 1000 x (64 x 64 and 64)": (lambda package, **options: adamw(package, MIXED, **options), True),
    "AdamW, 10 x 64": (lambda package, **options: adamw(package, [(64,)] * 10, **options), True),
    "1000 optimizers of one parameter": (lambda package, **options: one_each(package, SMALL, **options), True),
    "24 optimizers in turn": (lambda package, **options: in_turn(package, 24, **options), True),
    "L-BFGS, n = 10,000, m = 100": (lambda package: lbfgs(package, 10_000, 100), False),
}


def of_step_time(case_key: str, algorithm_key: str) -> Callable[..., Stepper]:
    def make(package: Any) -> Stepper:
        import step_time
        import torch

        algorithm = step_time.ALGORITHMS[algorithm_key]
        tensors = step_time.Tensors(step_time.CASES[case_key], torch.device("cpu"))
        optimizer = getattr(package, algorithm.class_name)(tensors.parameters(), **algorithm.options)
        turn = 0

        def step() -> None:
            nonlocal turn
            step_time.hand_out(tensors.gradients[turn % 2], optimizer)
            turn += 1
            optimizer.step()

        return step

    return make


BENCH_CASES = ("gpt2", "matrices", "resnet50", "small-mixed", "small-vectors", "hidden-matrices", "embedding")


def bench_cases() -> dict[str, tuple[Callable[..., Stepper], bool]]:
    """The cells of step_time.py. Its table has the rivals."""
    import step_time

    return {
        f"{step_time.CASES[case].title}: {step_time.ALGORITHMS[algorithm].title}": (
            of_step_time(case, algorithm),
            False,
        )
        for case in BENCH_CASES
        for algorithm in step_time.CASES[case].required
    }


def serve(cases: dict[str, tuple[Callable[..., Stepper], bool]]) -> None:
    """Answer lines `case|who|seconds` with the seconds one step takes, for a parent that takes turns."""
    import torch

    import optim_ext

    steps: dict[tuple[str, str], Stepper] = {}
    for line in sys.stdin:
        case, who, seconds = line.rstrip("\n").split("|")
        if (case, who) not in steps:
            steps.clear()  # one case at a time, so that the others' memory is no neighbour
            make, _ = cases[case]
            steps[case, who] = make(torch.optim, fused=True) if who == "torch" else make(optim_ext)
            for _ in range(3):
                steps[case, who]()
        step = steps[case, who]
        count, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < float(seconds):
            step()
            count += 1
        print(spent / count, flush=True)


class Worker:
    """A process with the optim_ext of one checkout."""

    def __init__(self, checkout: Path, bench: bool):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", *(["--bench"] if bench else [])]
        self.process = subprocess.Popen(
            command, env=environment, cwd=checkout, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def time(self, case: str, who: str, seconds: float) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(f"{case}|{who}|{seconds}", file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="a checkout that has been built in place")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output-dir", type=Path, default=Path("bench_results"))
    parser.add_argument("--bench", action="store_true", help="the cells of step_time.py")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = bench_cases() if arguments.bench else CASES
    if arguments.serve:
        return serve(cases)
    if arguments.before is None:
        parser.error("name the other checkout")
    before = arguments.before.resolve()
    results = {}
    print(f"{'case':56} {'here':>10} {'before':>10} {'torch':>10} {'before/here':>12} {'torch/here':>11}")
    for case, (_, has_rival) in cases.items():
        if arguments.only not in case:
            continue
        checkouts = {"here": ROOT, "before": before} | ({"torch": ROOT} if has_rival else {})
        workers = {who: Worker(checkout, arguments.bench) for who, checkout in checkouts.items()}
        times: dict[str, list[float]] = {who: [] for who in workers}
        order = list(workers)
        for _ in range(arguments.rounds):
            for who in order:
                times[who].append(workers[who].time(case, "torch" if who == "torch" else "ours", SECONDS))
            order = [*order[1:], order[0]]
        for worker in workers.values():
            worker.process.terminate()
        median = {who: statistics.median(of) for who, of in times.items()}
        ratio = {
            who: statistics.median(a / b for a, b in zip(of, times["here"], strict=True)) for who, of in times.items()
        }
        results[case] = {"seconds": median, "ratio to here": ratio}
        shown = [f"{1e6 * median[who]:8.1f}us" if who in median else " " * 10 for who in ("here", "before", "torch")]
        ratios = [f"{ratio['before']:12.2f}", f"{ratio['torch']:11.2f}" if "torch" in ratio else " " * 11]
        print(case.ljust(56), *shown, *ratios, flush=True)
    arguments.output_dir.mkdir(exist_ok=True)
    (arguments.output_dir / "against_commit.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
