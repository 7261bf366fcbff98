"""Time of one L-BFGS iteration: optim_ext.LBFGS beside torch.optim.LBFGS, the closure's own time taken off.

    python benchmarks/lbfgs.py                  # every row, a few minutes on two cores
    python benchmarks/lbfgs.py --quick --case 10k
    python benchmarks/lbfgs.py --device cuda    # on a GPU, which is waited for before and after each closure

Both run in one process on the same quadratic, with a full history and without line search; turns of some iterations
alternate, and a ratio is the median of the ratios of neighbouring turns. The closure only computes a gradient; its time
is measured inside it. The memory limit is 16 bytes for each element of each pair: two readings of two float32 vectors. It
is measured by a loop that reads the very rows of the history and computes nothing. Writes lbfgs.json to --output-dir.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import optim_ext
from optim_ext import _C


@dataclass(frozen=True)
class Case:
    title: str
    sizes: tuple[int, ...]
    history_size: int
    required: float
    baseline: str = "torch"  # or our own float32 history
    limit: bool = False


CASES = {
    "10k": Case("n = 10,000, m = 100", (10_000,), 100, 5.0),
    "100k": Case("n = 100,000, m = 100", (100_000,), 100, 2.0),
    "1M": Case("n = 1M, m = 100", (1_000_000,), 100, 1.2, limit=True),
    "1M-short": Case("n = 1M, m = 10", (1_000_000,), 10, 1.4, limit=True),
    "10M-short": Case("n = 10M, m = 10", (10_000_000,), 10, 2.0, limit=True),
    "many": Case("1000 parameters of 100, m = 20", (100,) * 1000, 20, 5.0),
    "1M-bf16": Case("n = 1M, m = 100, bfloat16 history over float32", (1_000_000,), 100, 1.6, baseline="float32"),
}


class Runner:
    """One optimizer on an ill-conditioned quadratic; every turn is one step of several iterations."""

    def __init__(
        self, cls: type[torch.optim.LBFGS], case: Case, iterations: int, device: torch.device, **options: object
    ) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(size, device=device)) for size in case.sizes]
        generator = torch.Generator().manual_seed(0)
        curvatures = [torch.rand(size, generator=generator).pow_(3).mul_(100).add_(1e-2) for size in case.sizes]
        self.curvatures = [tensor.to(device) for tensor in curvatures]
        self.centres = [torch.randn(size, generator=generator).to(device) for size in case.sizes]
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.optimizer = cls(
            self.params, lr=0.5, max_iter=iterations, max_eval=10**9, history_size=case.history_size,
            tolerance_grad=-1, tolerance_change=-1, **options,
        )  # fmt: skip
        self.away = 0.0
        self.calls = 0

    def closure(self) -> float:
        self.wait()
        begin = time.perf_counter()
        with torch.no_grad():
            grads = [p.grad for p in self.params]
            torch._foreach_copy_(grads, self.params)
            torch._foreach_sub_(grads, self.centres)
            torch._foreach_mul_(grads, self.curvatures)
        self.wait()
        self.calls += 1
        self.away += time.perf_counter() - begin
        return float(self.calls)

    def turn(self) -> float:
        """Seconds per iteration, without the closure."""
        self.away, calls = 0.0, self.calls
        begin = time.perf_counter()
        self.optimizer.step(self.closure)
        self.wait()
        return (time.perf_counter() - begin - self.away) / max(1, self.calls - calls)

    @property
    def pairs(self) -> int:
        return len(self.optimizer.state[self.params[0]]["old_dirs"])

    @property
    def rows(self) -> list[Tensor]:
        state = self.optimizer.state[self.params[0]]
        return [*state["old_dirs"], *state["old_stps"]]


def reader(rows: list[Tensor]) -> Callable[[], float]:
    """Seconds to read the rows twice, once along each of them."""
    from memory_limit import ReadLoop

    loop = ReadLoop(rows)

    def read() -> float:
        begin = time.perf_counter()
        loop()
        loop()
        return time.perf_counter() - begin

    return read


def measure(name: str, case: Case, rounds: int, iterations: int, device: torch.device) -> dict:
    ours_options = {"history_dtype": torch.bfloat16} if case.baseline == "float32" else {}
    baseline = optim_ext.LBFGS if case.baseline == "float32" else torch.optim.LBFGS
    runners = [
        Runner(cls, case, iterations, device, **options)
        for cls, options in ((baseline, {}), (optim_ext.LBFGS, ours_options))
    ]
    for runner in runners:
        runner.turn()
        while runner.pairs < case.history_size:
            runner.turn()
    turns: list[list[float]] = [[], []]
    limit: list[float] = []
    read = reader(runners[1].rows) if case.limit and device.type == "cpu" else None
    for index in range(rounds):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            turns[which].append(runners[which].turn())
        if read is not None:
            limit.append(read())
    ours_ms = 1e3 * statistics.median(turns[1])  # the other times are this one times their ratio to it, turn by turn
    ratio = statistics.median(a / b for a, b in zip(*turns, strict=True))
    of_limit = statistics.median(a / b for a, b in zip(limit, turns[1], strict=True)) if limit else None
    row = {
        "case": name, **asdict(case), "sizes": [len(case.sizes), case.sizes[0]], "rounds": rounds,
        "baseline_ms": ours_ms * ratio, "ours_ms": ours_ms, "ratio": ratio,
        "limit_ms": None if of_limit is None else ours_ms * of_limit, "of_limit": of_limit,
    }  # fmt: skip
    share = f"{row['of_limit']:8.0%}" if limit else " " * 8
    print(
        f"{case.title:48s} {row['baseline_ms']:10.3f} {row['ours_ms']:10.3f} {ratio:7.2f}x {case.required:7.1f}x"
        f" {share}  {'met' if ratio >= case.required else 'missed'}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU (default 2)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="three rounds, for a first look")
    parser.add_argument("--output-dir", type=Path, default=Path("bench_results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} threads, {_C.isa()}"
    print(f"torch {torch.__version__}, {where}")
    print(
        f"{'ms per iteration':48s} {'baseline':>10s} {'optim_ext':>10s} {'ratio':>8s} {'needed':>8s} {'of limit':>8s}"
    )
    rows = []
    for name in options.case:
        elements = sum(CASES[name].sizes) * CASES[name].history_size
        iterations = 20 if elements <= 4_000_000 else 5
        rows.append(measure(name, CASES[name], 3 if options.quick else options.rounds, iterations, device))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    document = {"torch": str(torch.__version__), "where": where, "threads": options.threads, "rows": rows}
    (options.output_dir / "lbfgs.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
