"""Time of one optimizer step: optim_ext against every mode of torch.optim, and against the memory limit.

    python benchmarks/step_time.py                                   # everything, some 20 minutes on two cores
    python benchmarks/step_time.py --case resnet50 --algorithm adamw rmsprop --compiled all
    python benchmarks/step_time.py --quick                           # few repeats, for a first look
    python benchmarks/step_time.py --device cuda                     # on a GPU, about three minutes

All modes run in one process, in rounds: each round goes once through all modes, in shuffled order, so that a busy
neighbour slows them alike. A ratio is the median of the ratios within a round. The time of optim_ext is the median over
the rounds, that of any other mode this time multiplied by their ratio: times of one row belong together.
A mode's turn is one step where the tensors are large, and several steps in a row where they are small; small tensors
are then measured a second time with the caches emptied before every step, as a backward pass leaves them.
On a GPU a turn is timed by CUDA events, and small tensors are measured by the time the host takes and by launches.
torch.compile over torch's foreach mode is one more of torch's modes, where ``--compiled`` says so: by default for three
algorithms on ResNet-50, as compiling takes half a minute each. docs/performance.md explains the columns. Writes
step_time.json, step_time.png and step_time_small.png to ``--output-dir``.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import report
import shapes
import torch
from places import Cpu, Gpu
from torch import Tensor, nn

import optim_ext

OURS, LIMIT, DEEPSPEED = "optim_ext", "memory limit", "DeepSpeed"
PEER = "pytorch_optimizer"  # measured where torch has no such optimizer
PEER_MODES: dict[str, dict[str, Any]] = {PEER: {}, f"{PEER} loop": {"foreach": False}}
TORCH_MODES: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
COMPILED = "compiled"  # foreach, by torch.compile
TYPICALLY_COMPILED = {"resnet50": ("adamw", "rmsprop-centered", "nadam")}
MOST_COMPILED = 200  # tensors: more of them make graphs that take minutes to compile
REQUIRED_OF_LIMIT_FOR_OTHERS = 0.8  # algorithms that torch has no fused kernel for, or not at all
MOST_ROUNDS = 100
MOST_HOST_US = 100.0  # for a thousand small tensors on a GPU
CACHE_BYTES = 128 * 2**20  # more than the last level of any cache this is likely to meet


@dataclass(frozen=True)
class Algorithm:
    title: str
    class_name: str
    options: dict[str, Any]
    peer_class: str = ""  # its name in pytorch_optimizer, where that is another one
    peer_differs: str = ""  # how the peer's rule is another one: then the results are not compared
    precision: float | None = None  # of the movement, relative, where it is not that of the dtype


ALGORITHMS = {
    "sgd": Algorithm("SGD", "SGD", {"lr": 0.1}),
    "sgd-momentum": Algorithm("SGD momentum", "SGD", {"lr": 0.1, "momentum": 0.9}),
    "adam": Algorithm("Adam", "Adam", {"lr": 1e-3}),
    "amsgrad": Algorithm("AMSGrad", "Adam", {"lr": 1e-3, "amsgrad": True}),
    "adamw": Algorithm("AdamW", "AdamW", {"lr": 1e-3}),
    "rmsprop": Algorithm("RMSprop", "RMSprop", {"lr": 1e-3}),
    "rmsprop-centered": Algorithm(
        "RMSprop centered, momentum", "RMSprop", {"lr": 1e-3, "centered": True, "momentum": 0.9}
    ),
    "adagrad": Algorithm("Adagrad", "Adagrad", {"lr": 1e-2}),
}
OTHERS = {
    "adadelta": Algorithm("Adadelta", "Adadelta", {"lr": 1.0}),
    "adamax": Algorithm("Adamax", "Adamax", {"lr": 2e-3}),
    "nadam": Algorithm("NAdam", "NAdam", {"lr": 2e-3}),
    "radam": Algorithm("RAdam", "RAdam", {"lr": 1e-3}),
    "rprop": Algorithm("Rprop", "Rprop", {"lr": 1e-2}),
    "asgd": Algorithm("ASGD", "ASGD", {"lr": 1e-2}),
    "lion": Algorithm("Lion", "Lion", {"lr": 1e-4, "betas": (0.9, 0.99)}),
}
# Those that look at whole tensors first, which the memory limit knows nothing of.
NORMED = {
    "lamb": Algorithm(
        "LAMB",
        "LAMB",
        {"lr": 1e-3},
        peer_class="Lamb",
        peer_differs="no bias correction, norms of parameters no larger than 10",
    ),
    "lars": Algorithm(
        "LARS",
        "LARS",
        {"lr": 0.1},
        peer_differs="vectors are not scaled, and gradients are overwritten by the momentum",
    ),
    # torch adds up norms in float32: off by 0.2 % for the 38 million elements of GPT-2's embedding.
    "adafactor": Algorithm("Adafactor", "Adafactor", {"lr": 1e-2}, precision=1e-2),
}
MATRIX = {"muon": Algorithm("Muon", "Muon", {"lr": 1e-3}, precision=5e-2)}  # orthogonalizes in bfloat16
SPARSE = {
    "sparse-adam": Algorithm("SparseAdam", "SparseAdam", {"lr": 1e-3}),
    "sparse-sgd": Algorithm("SGD, sparse", "SGD", {"lr": 0.1}),
    "sparse-adagrad": Algorithm("Adagrad, sparse", "Adagrad", {"lr": 1e-2}),
}

# Required ratio of torch's best mode to ours, where the tensors are large.
LARGE = (
    dict.fromkeys(ALGORITHMS, 1.0)
    | dict.fromkeys(OTHERS, 4.0)
    | {"lamb": 1.5, "lars": 2.0, "adafactor": 2.0}
    | {
        "sgd-momentum": 1.5,
        "amsgrad": 1.3,
        "rmsprop": 3.5,
        "rmsprop-centered": 5.5,
    }
)
SMALL = dict.fromkeys(OTHERS, 8.0) | {"lamb": 3.0, "lars": 2.0, "adafactor": 2.0}
ALGORITHMS |= OTHERS | NORMED | MATRIX | SPARSE


@dataclass(frozen=True)
class Case:
    title: str
    shapes: list[shapes.Shape]
    required: dict[str, float]
    dtype: torch.dtype = torch.float32
    measures_limit: bool = False
    near_limit: bool = False  # whether it has to come near the limit (see places.py)
    small: bool = False  # fits the caches
    rows: int | None = None  # gradients are sparse and hold this many rows
    coalesced: bool = False  # each of them once, in order
    modes: tuple[str, ...] = tuple(TORCH_MODES)  # of torch's, where not all of them fit into memory side by side
    of_gpu: bool = False  # too large for most other machines


CASES = {
    "gpt2": Case("GPT-2 124M", shapes.gpt2(), LARGE, measures_limit=True, near_limit=True),
    "matrices": Case("two 4096 x 4096", shapes.two_matrices(), LARGE, measures_limit=True, near_limit=True),
    "resnet50": Case(
        "ResNet-50", shapes.resnet50(), {key: max(1.1, ratio) for key, ratio in LARGE.items()}, measures_limit=True
    ),
    "small-mixed": Case(
        "1000 tensors, 64 x 64 and 64",
        shapes.small_mixed(),
        dict.fromkeys(LARGE, 6.0) | SMALL,
        measures_limit=True,
        small=True,
    ),
    "small-vectors": Case(
        "1000 tensors of 64",
        shapes.small_vectors(),
        dict.fromkeys(LARGE, 10.0) | SMALL,
        measures_limit=True,
        small=True,
    ),
    "hidden-matrices": Case(
        "16 matrices of 256 x 256 to 1024", shapes.hidden_matrices(), {"muon": 1.0, "adafactor": 1.0}
    ),
    "small-matrices": Case(
        "200 matrices of 64 x 64", shapes.small_matrices(), {"muon": 1.0, "adafactor": 2.0}, small=True
    ),
    "embedding": Case(
        "1M x 64, 1000 rows",
        [(1_000_000, 64)],
        {"sparse-adam": 5.0, "sparse-sgd": 1.0, "sparse-adagrad": 1.0},
        rows=1000,
    ),
    "embedding-coalesced": Case(
        "1M x 64, 1000 rows, coalesced",
        [(1_000_000, 64)],
        {"sparse-adam": 5.0, "sparse-sgd": 1.0, "sparse-adagrad": 1.0},
        rows=1000,
        coalesced=True,
    ),
    "gpt2-bf16": Case(
        "GPT-2 124M, bf16",
        shapes.gpt2(),
        {"sgd-momentum": 1.0, "adamw": 1.0},
        dtype=torch.bfloat16,
        measures_limit=True,
    ),
    "billion": Case(
        "GPT-2 1.3B",
        shapes.gpt2_large(),
        {"sgd-momentum": 1.0, "adamw": 1.0, "lion": 1.0},
        measures_limit=True,
        near_limit=True,
        modes=("default", "fused"),
        of_gpu=True,
    ),
}


@dataclass
class Cell:
    """What was measured for one algorithm on one case. Times in ms, memory in MiB, one entry per mode."""

    case: str
    case_title: str
    algorithm: str
    algorithm_title: str
    rounds: int
    required_ratio: float
    required_of_limit: float | None
    ms: dict[str, float] = field(default_factory=dict)
    extra_mib: dict[str, float | None] = field(default_factory=dict)
    wrong_modes: list[str] = field(default_factory=list)
    best_torch_mode: str = ""
    compile_s: float | None = None  # what the first step of torch.compile takes
    ratio: float = 0.0
    ratio_quartiles: tuple[float, float] = (0.0, 0.0)
    gb_moved: float | None = None
    of_limit: float | None = None
    cold_ms: dict[str, float] = field(default_factory=dict)
    cold_ratio: float | None = None
    host_us: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    met: bool = False


class Tensors:
    """Initial values and two sets of gradients of a case, shared by all its algorithms and modes."""

    def __init__(self, case: Case, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(std: float) -> list[Tensor]:
            empty = [torch.empty(shape, dtype=case.dtype, device=device) for shape in case.shapes]
            return [tensor.normal_(0, std, generator=generator) for tensor in empty]

        self.values = normal(0.02)

        def sparse(shape: shapes.Shape) -> Tensor:
            indices = torch.randint(shape[0], (1, case.rows or 0), device=device, generator=generator)
            values = torch.empty(case.rows, *shape[1:], device=device).normal_(0, 0.1, generator=generator)
            grad = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)
            return grad.coalesce() if case.coalesced else grad

        if case.rows is None:
            gradients = normal(0.1)
            self.gradients = (gradients, list(torch._foreach_neg(gradients)))
        else:
            self.gradients = ([sparse(s) for s in case.shapes], [sparse(s) for s in case.shapes])

    def parameters(self) -> list[nn.Parameter]:
        return [nn.Parameter(value.clone()) for value in self.values]


def hand_out(gradients: list[Tensor], optimizer: Any) -> None:
    """Give the optimizer new gradient tensors, as a backward pass does."""
    overwrites = type(optimizer).__module__.split(".")[0] == PEER  # as some there do, so they get copies
    for p, grad in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        p.grad = grad.clone() if overwrites else grad


class Compiled:
    """An optimizer of torch's with its step compiled, which the first one waits for."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.compile_s: float | None = None
        torch._dynamo.reset()  # of all optimizers compiled before, whose number is limited

        @torch.compile
        def step() -> None:
            optimizer.step()

        self._step = step

    def step(self) -> None:
        begin = time.perf_counter()
        self._step()
        if self.compile_s is None:
            self.compile_s = time.perf_counter() - begin

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state


def is_compiled(which: str, case_key: str, algorithm_key: str) -> bool:
    """Whether a cell has the compiled mode; ``which``: none, some or all of those where it is affordable."""
    case = CASES[case_key]
    able = case.rows is None and len(case.shapes) <= MOST_COMPILED
    able &= hasattr(torch.optim, ALGORITHMS[algorithm_key].class_name)
    return able and (which == "all" or (which == "some" and algorithm_key in TYPICALLY_COMPILED.get(case_key, ())))


def make_optimizers(algorithm: Algorithm, case: Case, tensors: Tensors, with_compiled: bool = False) -> dict[str, Any]:
    ours = getattr(optim_ext, algorithm.class_name)(tensors.parameters(), **algorithm.options)
    optimizers = {OURS: ours}
    if not hasattr(torch.optim, algorithm.class_name):
        import pytorch_optimizer

        theirs = getattr(pytorch_optimizer, algorithm.peer_class or algorithm.class_name)
        for mode, flags in PEER_MODES.items():
            if flags.keys() <= inspect.signature(theirs).parameters.keys():
                optimizers[mode] = theirs(tensors.parameters(), **algorithm.options, **flags)
        return optimizers
    theirs = getattr(torch.optim, algorithm.class_name)
    for mode, flags in TORCH_MODES.items():
        refused = case.rows is not None and "fused" in flags  # torch's fused modes take no sparse gradients
        refused |= mode not in case.modes
        if flags.keys() <= inspect.signature(theirs).parameters.keys() and not refused:
            optimizers[mode] = theirs(tensors.parameters(), **algorithm.options, **flags)
    if with_compiled and "foreach" in optimizers:
        optimizers[COMPILED] = Compiled(theirs(tensors.parameters(), **algorithm.options, foreach=True))
    peer = deepspeed_class(algorithm, case)
    if peer is not None:
        optimizers[DEEPSPEED] = peer(tensors.parameters(), **algorithm.options)
    return optimizers


def deepspeed_class(algorithm: Algorithm, case: Case) -> Callable[..., Any] | None:
    """DeepSpeed's CPU optimizer for an algorithm, where there is one and it is installed and compiles."""
    if case.dtype != torch.float32 or case.rows is not None or algorithm.options.get("amsgrad"):
        return None
    if algorithm.class_name == "Adagrad":
        return DEEPSPEED_OPTIMIZERS.get("adagrad")
    adam = DEEPSPEED_OPTIMIZERS.get("adam")
    if adam is None or algorithm.class_name not in ("Adam", "AdamW"):
        return None
    # torch's default weight decay, spelled out: DeepSpeed's is 0 in both modes.
    decoupled = algorithm.class_name == "AdamW"
    return lambda params, **options: adam(
        params, adamw_mode=decoupled, weight_decay=1e-2 if decoupled else 0.0, **options
    )


def find_deepspeed() -> dict[str, Any]:
    """DeepSpeed compiles its kernels at the first use: do that now, and say why if it does not work."""
    # torch looks for ninja on the PATH, where a virtual environment that is not activated does not have it.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    try:
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        for peer in (DeepSpeedCPUAdam, DeepSpeedCPUAdagrad):
            peer([nn.Parameter(torch.zeros(1))])
    except Exception as error:  # whatever its import or its compiler raises, the benchmark goes on without it
        say_without("DeepSpeed", error)
        return {}
    return {"adam": DeepSpeedCPUAdam, "adagrad": DeepSpeedCPUAdagrad}


def without_peer(algorithm_keys: list[str]) -> list[str]:
    """The algorithms among these that cannot be measured, as only pytorch_optimizer has them and it is not there."""
    wanted = [key for key in algorithm_keys if not hasattr(torch.optim, ALGORITHMS[key].class_name)]
    try:
        if wanted:
            import pytorch_optimizer  # noqa: F401
    except Exception as error:  # as for DeepSpeed
        say_without(f"{PEER}, so without {', '.join(ALGORITHMS[key].title for key in wanted)}", error)
        return wanted
    return []


def say_without(what: str, error: Exception) -> None:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    print(f"Without {what} (pip install -r benchmarks/requirements.txt): {reason}", file=sys.stderr)


DEEPSPEED_OPTIMIZERS: dict[str, Any] = {}


def share_memory(optimizers: dict[str, Any]) -> None:
    """Let all modes work on the parameters and state of ours, each with its own step counters and other numbers.

    Where the system happens to put two equal tensors makes some of the difference that is to be measured here.
    """
    ours = optimizers[OURS]
    for optimizer in optimizers.values():
        pairs = zip(optimizer.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True)
        for p, shared in pairs if optimizer is not ours else ():
            p.data = shared.data
            state = optimizer.state.get(p, {})
            for key, tensor in ours.state.get(shared, {}).items():
                alike = key in state and isinstance(tensor, Tensor) and tensor.shape == shared.shape
                if alike and state[key].dtype == tensor.dtype:
                    state[key].set_(tensor)  # the same objects as before, by which compiled code knows them


def state_lists(optimizer: Any) -> list[list[Tensor]]:
    """The optimizer's element-wise state, one list over the parameters per kind of state."""
    params = optimizer.param_groups[0]["params"]
    kinds = [
        key
        for key, value in optimizer.state.get(params[0], {}).items()
        if isinstance(value, Tensor) and value.shape == params[0].shape
    ]
    return [[optimizer.state[p][kind] for p in params] for kind in kinds]


def measure(
    case_key: str,
    algorithm_key: str,
    tensors: Tensors,
    repeats: int,
    seconds: float,
    place: Cpu | Gpu,
    with_compiled: bool = False,
) -> Cell:
    case, algorithm = CASES[case_key], ALGORITHMS[algorithm_key]
    on_gpu = isinstance(place, Gpu)
    optimizers = make_optimizers(algorithm, case, tensors, with_compiled)
    calls: dict[str, Callable[[], Any]] = {mode: optimizer.step for mode, optimizer in optimizers.items()}
    extra = {}
    for mode, optimizer in optimizers.items():
        hand_out(tensors.gradients[0], optimizer)
        optimizer.step()  # makes the state
        extra[mode] = place.extra_mib(optimizer.step)
    wrong = [] if algorithm.peer_differs else wrong_modes(optimizers, tensors.values, case.dtype, algorithm.precision)
    if OURS in wrong:
        raise RuntimeError(f"{case_key}, {algorithm_key}: optim_ext moved the parameters elsewhere than torch")
    share_memory(optimizers)
    not_native = [str(group) for group in optim_ext.explain(optimizers[OURS]) if not group.native]
    if not_native:
        raise RuntimeError(f"optim_ext does not run natively: {not_native}")
    bytes_moved = None
    if case.measures_limit:
        params = [p.data for p in optimizers[OURS].param_groups[0]["params"]]
        loop = place.limit(tensors.gradients[0], [params, *state_lists(optimizers[OURS])])
        calls[LIMIT], bytes_moved = loop, loop.bytes

    def new_gradients(turn: int) -> None:
        for optimizer in optimizers.values():
            hand_out(tensors.gradients[turn % 2], optimizer)

    samples = in_rounds(calls, new_gradients, repeats, seconds, lambda call: place.turn(call, case.small))
    cold, host_us, launches = {}, {}, {}
    if case.small and isinstance(place, Gpu):
        host_us = place.host_us(calls)
        launches = {mode: place.launches(call) for mode, call in calls.items()}
    elif case.small:
        lines = torch.zeros(CACHE_BYTES, dtype=torch.uint8)
        cold = in_rounds(
            calls, new_gradients, repeats, seconds, lambda call: place.turn(call, False, lambda: lines.add_(1))
        )

    ms = times_together(samples)
    rivals = [mode for mode in (*TORCH_MODES, COMPILED, *PEER_MODES) if mode in ms and mode not in wrong]
    best = min(rivals, key=lambda mode: ms[mode])
    ratios = paired_ratios(samples, best)
    cell = Cell(
        case=case_key,
        case_title=case.title,
        algorithm=algorithm_key,
        algorithm_title=algorithm.title,
        rounds=len(ratios),
        required_ratio=1.0 if on_gpu else case.required[algorithm_key],
        required_of_limit=(
            None
            if not case.near_limit or algorithm_key in NORMED
            else min(place.required_of_limit, REQUIRED_OF_LIMIT_FOR_OTHERS)
            if algorithm_key in OTHERS
            else place.required_of_limit
        ),
        ms=ms,
        extra_mib=extra,
        wrong_modes=wrong,
        best_torch_mode=best,
        compile_s=optimizers[COMPILED].compile_s if COMPILED in optimizers else None,
        host_us=host_us,
        launches=launches,
        ratio=statistics.median(ratios),
    )
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [cell.ratio] * 3
    cell.ratio_quartiles = (quartiles[0], quartiles[2])
    if bytes_moved is not None:
        cell.gb_moved = bytes_moved / 1e9
        cell.of_limit = statistics.median(paired_ratios(samples, LIMIT))
    if cold:
        cell.cold_ms = times_together(cold)
        cell.cold_ratio = min(cell.cold_ms[mode] for mode in rivals) / cell.cold_ms[OURS]
    cell.met = (
        cell.ratio >= cell.required_ratio
        and (cell.required_of_limit is None or (cell.of_limit or 0.0) >= cell.required_of_limit)
        and (cell.cold_ratio is None or cell.cold_ratio >= 1.0)
        and (
            not launches
            or ((launches[OURS] == 1 or algorithm_key in NORMED | MATRIX) and host_us[OURS] <= MOST_HOST_US)
        )
    )
    return cell


def in_rounds(
    calls: dict[str, Callable[[], Any]],
    new_gradients: Callable[[int], None],
    repeats: int,
    seconds: float,
    turn: Callable[[Callable[[], Any]], float],
) -> dict[str, list[float]]:
    """Seconds per step of every mode, one value per round: what ``turn`` measures of it.

    Two rounds to warm up, then ``repeats`` rounds or as many as fit into ``seconds``, whichever is more.
    """
    samples: dict[str, list[float]] = {mode: [] for mode in calls}
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        rounds, start = -2, time.perf_counter()
        while rounds < repeats or (time.perf_counter() - start < seconds and rounds < MOST_ROUNDS):
            new_gradients(rounds)
            for mode in shuffle.sample(list(calls), len(calls)):
                took = turn(calls[mode])
                if rounds >= 0:
                    samples[mode].append(took)
            rounds += 1
    finally:
        gc.enable()
    return samples


def paired_ratios(samples: dict[str, list[float]], mode: str) -> list[float]:
    """How many times longer ``mode`` took than optim_ext, round by round."""
    return [a / b for a, b in zip(samples[mode], samples[OURS], strict=True)]


def times_together(samples: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds of every mode, as comparable as the rounds are: the median of ours, and for the others this times the
    median of their ratio to it. (Where a machine has a fast and a slow state, medians of their own may be of either.)"""
    ours = statistics.median(samples[OURS]) * 1e3
    return {mode: ours * statistics.median(paired_ratios(samples, mode)) for mode in samples}


def wrong_modes(
    optimizers: dict[str, Any], initial: list[Tensor], dtype: torch.dtype, precision: float | None
) -> list[str]:
    """The modes that, after the same steps, moved the parameters elsewhere than torch's plain loop did.

    A speed counts only for the right result. torch 2.13 has such a mode: its fused SGD on the CPU leaves most of a bf16
    parameter as it was (https://github.com/pytorch/pytorch/issues/191763).
    """
    tolerance = precision or (1e-3 if dtype == torch.float32 else 5e-2)

    def moved(mode: str) -> list[Tensor]:
        params = optimizers[mode].param_groups[0]["params"]
        return [p.data.float() - value.float() for p, value in zip(params, initial, strict=True)]

    def norm(tensors: list[Tensor]) -> float:
        return torch.stack(torch._foreach_norm(tensors)).norm().item()

    reference = moved("default" if "default" in optimizers else PEER)
    largest_error = tolerance * norm(reference)
    wrong = []
    for mode in optimizers:
        difference = moved(mode)
        torch._foreach_sub_(difference, reference)
        if not norm(difference) <= largest_error:
            wrong.append(mode)
    return wrong


def environment(place: Cpu | Gpu) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": place.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
        "optim_ext": optim_ext.build_info(),
    }


def write(cells: list[Cell], started: dict[str, Any], folder: Path) -> None:
    document = {"environment": started, "cells": [asdict(cell) for cell in cells]}
    unfinished = folder / "step_time.json.new"  # never half a file, whenever this is stopped
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.replace(folder / "step_time.json")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: all that suit the device")
    parser.add_argument("--algorithm", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU (default 2)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds at least; cheap cells take more (default 15)")
    parser.add_argument("--quick", action="store_true", help="three rounds and no more")
    parser.add_argument(
        "--compiled",
        choices=("none", "some", "all"),
        default="some",
        help="where to measure torch.compile, too (default: three algorithms on ResNet-50; all: 20 minutes more)",
    )
    parser.add_argument("--within", type=float, metavar="SECONDS", help="begin nothing more after that time")
    parser.add_argument("--output-dir", type=Path, default=Path("bench_results"))
    options = parser.parse_args(arguments)
    repeats, seconds = (3, 0.0) if options.quick else (options.repeats, 2.0)
    if repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")

    place = Gpu() if options.device == "cuda" else Cpu(options.threads)
    started, begin = environment(place), time.monotonic()
    if isinstance(place, Cpu):
        DEEPSPEED_OPTIMIZERS.update(find_deepspeed())
    unmeasured = without_peer(options.algorithm)
    planned = [
        (case, [key for key in options.algorithm if key in CASES[case].required and key not in unmeasured])
        for case in options.case or [key for key in CASES if isinstance(place, Gpu) or not CASES[key].of_gpu]
        # one case at a time, to have the memory of one only
    ]
    if not any(algorithm_keys for _, algorithm_keys in planned):
        parser.error("none of these algorithms can be measured on these cases")
    cells: list[Cell] = []
    failed: list[str] = []
    left_out: list[str] = []
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for case_key, algorithm_keys in planned:
        try:
            tensors = Tensors(CASES[case_key], place.device)
        except torch.OutOfMemoryError as error:
            failed.append(f"{case_key}: {error}")
            continue
        for algorithm_key in algorithm_keys:
            name = f"{case_key}, {algorithm_key}"
            if options.within is not None and time.monotonic() - begin > options.within:
                left_out.append(name)
                continue
            compiled = is_compiled(options.compiled, case_key, algorithm_key)
            try:
                cell = measure(case_key, algorithm_key, tensors, repeats, seconds, place, compiled)
            except Exception as error:  # whatever it is: it is told in the end, and the other cells are measured
                failed.append(f"{name}: {error}")
                gc.collect()  # the tensors of the failed one
                continue
            print(f"{cell.case_title}: {cell.algorithm_title} {cell.ratio:.2f}x", file=sys.stderr, flush=True)
            cells.append(cell)
            write(cells, started, options.output_dir)  # whatever may come
        del tensors
    if not cells:
        sys.exit("\n".join(failed) or "no time to measure anything")
    started["load_average_after"] = os.getloadavg()[0]
    write(cells, started, options.output_dir)

    print(report.heading(started))
    print(report.tables(cells))
    report.plot(cells, started, options.output_dir / "step_time.png")
    report.plot_small(cells, started, options.output_dir / "step_time_small.png")
    print(f"{sum(cell.met for cell in cells)} of {len(cells)} cells meet what is required of them.")
    print(f"Written: {options.output_dir}/step_time.json, step_time.png, step_time_small.png")
    if left_out:
        print(f"No time for: {'; '.join(left_out)}")
    for line in failed:
        print(f"Failed: {line}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
