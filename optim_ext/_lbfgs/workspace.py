"""What one L-BFGS step is made of: its options, the parameters as one vector, and the history of that vector."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim_ext import _sharding
from optim_ext._lbfgs.parts import Parts
from optim_ext._load import _C

# One number for all parameters, or one number, tensor or None for each of them.
Bound = float | Tensor | Sequence["float | Tensor | None"] | None


@dataclass(frozen=True)
class Method:
    """The options of one step."""

    lr: float
    scales: tuple[float, ...]  # of the groups' learning rates, relative to the largest
    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    history_size: int
    line_search_fn: str | None = None
    maximize: bool = False
    strict_max_eval: bool = False
    recover: bool = False
    damping: float | None = None
    history_dtype: torch.dtype | None = None
    bounded: bool = False


def span_of(tensor: Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def working_dtype(params: list[Tensor]) -> torch.dtype:
    """What the vectors are computed in: the parameters' common floating point type, float32 at least."""
    dtype = torch.float32
    for p in params:
        dtype = torch.promote_types(dtype, p.dtype.to_real())
    return dtype


class Workspace:
    """The parameters as one vector, and its history. A cache: the state holds all that matters, and what is here is
    checked against it. Of DTensors the vector has what is this process's."""

    def __init__(self, params: list[Tensor], sizes: list[int], bounds: list[Any], method: Method) -> None:
        self.params = params
        self.device = params[0].device
        for index, p in enumerate(params):
            if p.device != self.device:
                raise RuntimeError(
                    f"LBFGS needs all parameters on one device: {index} is on {p.device}, not {self.device}"
                )
        self.dtype = working_dtype(params)
        self.parts = Parts(params, self.dtype) if _sharding.holds_dtensors([{"params": params}]) else None
        self.seen = [self._seen(p) for p in params]
        self.moved = params if self.parts is None else self.parts.tensors
        for index, p in enumerate(self.moved):
            if p.numel() > 0 and span_of(p) < p.numel():
                raise RuntimeError(f"parameter {index} has elements that share memory, so it cannot be moved; clone it")
        self.history_dtype = method.history_dtype or self.dtype
        self.sizes, self.bounds, self.scales = sizes, bounds, method.scales
        self.bound_versions = _versions(bounds)
        numels = [p.numel() * (2 if p.is_complex() else 1) for p in self.moved]
        *offsets, self.numel = itertools.accumulate(numels, initial=0)
        scaled = self._scaled(offsets)
        self.history = _C.LbfgsHistory(
            offsets, self.numel, self.dtype, self.history_dtype, self.device, method.history_size,
            metric=self._metric(scaled),
            held=[(begin, end) for begin, end, scale in scaled if scale == 0],
            counted=None if self.parts is None else self.parts.counted,
            groups=[] if self.parts is None else [(group.group_name, group.size()) for group in self.parts.groups],
        )  # fmt: skip
        self.box: Any = None
        self.best_loss: float | None = None  # of the point that the history keeps for `recover`
        self.warned = False

    def what_changed(self, params: list[Tensor]) -> str | None:
        for index, (p, known, seen) in enumerate(zip(params, self.params, self.seen, strict=False)):
            now = self._seen(p)
            if p is known and now != seen:
                return f"parameter {index} changed from {_described(seen)} to {_described(now)}"
        return None

    def _seen(self, p: Tensor) -> tuple[Any, ...]:
        return p.shape, p.dtype, p.device, None if self.parts is None else self.parts.layout(p)

    def look(self) -> None:
        """Take the gradients up that are there."""
        if self.parts is not None:
            self.moved = self.parts.look()

    def local_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state as this process's vectors, or itself if these are all there is."""
        return state if self.parts is None else self.parts.local_state(state)

    def give_state(self, state: dict[str, Any], local: dict[str, Any]) -> None:
        """Bring the state up to date with what has been made of ``local_state``."""
        if self.parts is not None:
            self.parts.give(state, local)

    def serves(self, params: list[Tensor], sizes: list[int], bounds: list[Any], method: Method) -> bool:
        return (
            len(params) == len(self.params)
            and all(a is b for a, b in zip(params, self.params, strict=True))
            and sizes == self.sizes
            and all(a is b for a, b in zip(bounds, self.bounds, strict=True))
            and _versions(bounds) == self.bound_versions
            and method.scales == self.scales
            and (method.history_dtype or self.dtype) == self.history_dtype
        )

    def _scaled(self, offsets: list[int]) -> list[tuple[int, int, float]]:
        """Which part of the vector has which group's rate, relative to the largest."""
        each = [scale for size, scale in zip(self.sizes, self.scales, strict=True) for _ in range(size)]
        if self.parts is not None:
            each = self.parts.in_order(each, 1.0)
        found: list[tuple[int, int, float]] = []
        for (begin, end), scale in zip(itertools.pairwise([*offsets, self.numel]), each, strict=True):
            if found and found[-1][2] == scale:
                begin = found.pop()[0]
            found.append((begin, end, scale))
        return found

    def _metric(self, scaled: list[tuple[int, int, float]]) -> Tensor | None:
        """What multiplies the initial inverse Hessian."""
        if all(scale == 1.0 for _, _, scale in scaled):
            return None
        return torch.cat([
            torch.full((end - begin,), scale, dtype=self.dtype, device=self.device) for begin, end, scale in scaled
        ])  # fmt: skip


def _versions(bounds: Any) -> list[int]:
    """Of all tensors among the bounds: they may be changed in place."""
    if isinstance(bounds, Tensor):
        return [bounds._version]
    if isinstance(bounds, (list, tuple)):
        return [version for bound in bounds for version in _versions(bound)]
    return []


def _described(seen: tuple[Any, ...]) -> str:
    shape, dtype, device, layout = seen
    return f"{list(shape)} {dtype} on {device}" + ("" if layout is None else f" with placements {layout[0]}")
