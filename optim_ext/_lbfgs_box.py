"""L-BFGS within bounds: steps along the path that a ray takes when every point of it is projected into the box."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optim_ext._lbfgs_step import Norms, Step, Workspace
from optim_ext._line_search import Point, backtrack


class Box:
    """Bounds as two vectors, and what they make of points and gradients."""

    def __init__(self, workspace: Workspace) -> None:
        self.lower, self.upper = (self._vector(workspace, side) for side in (0, 1))
        if bool((self.lower > self.upper).any()):
            raise ValueError("a lower bound of LBFGS is above its upper bound")

    @staticmethod
    def _vector(workspace: Workspace, side: int) -> Tensor:
        pieces, start = [], 0
        for size, bounds in zip(workspace.sizes, workspace.bounds, strict=True):
            params = workspace.params[start : start + size]
            start += size
            if any(p.is_complex() for p in params):
                raise ValueError("LBFGS has no bounds for complex parameters")
            if bounds is None:  # of a group that has none
                bounds = (None, None)
            if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2):
                raise ValueError(f"Invalid bounds: expected (lower, upper), found {bounds!r}")
            given = bounds[side]
            each = list(given) if isinstance(given, (tuple, list)) else [given] * size
            if len(each) != size:
                raise ValueError(f"Invalid bounds: {len(each)} of them for {size} parameters")
            for p, bound in zip(params, each, strict=True):
                value = (-math.inf, math.inf)[side] if bound is None else bound
                bound = torch.as_tensor(value, dtype=workspace.dtype, device=workspace.device)
                pieces.append(bound.expand(p.shape).reshape(-1))
        vector = torch.cat(pieces)
        if bool(vector.isnan().any()):
            raise ValueError("a bound of LBFGS is NaN")
        return vector

    def clamp(self, point: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(point, self.lower), self.upper)

    def held(self, point: Tensor, grad: Tensor) -> Tensor:
        """Where the point is at a bound and would leave through it."""
        return ((point <= self.lower) & (grad > 0)) | ((point >= self.upper) & (grad < 0))


class BoxedStep(Step):
    """Where a parameter is at a bound and its gradient points outwards, it is held: its part of the gradient and of the
    direction is zero. The remaining part of the inverse Hessian is positive definite, so the direction leads downhill
    (the two-metric projection of Bertsekas 1982). Differences of gradients are only learnt from where a parameter has
    moved; once the held set has settled, this is L-BFGS on the free parameters."""

    def _box(self) -> Box:
        if self.work.box is None:
            self.work.box = Box(self.work)
        box: Box = self.work.box
        return box

    def run(self) -> Any:
        work, box = self.work, self._box()
        before = work.vectors.take()
        work.read(before)
        inside = box.clamp(before)
        outside = not torch.equal(before, inside)
        if outside:
            work.move(inside, 0.0, inside)
        try:
            return super().run()
        finally:
            if outside and self.evals == 0:  # the closure has raised, or the step is skipped
                work.move(before, 0.0, before)
            work.vectors.give(before)

    def _measure(self, norms: Norms) -> None:
        point = self.work.vectors.take()
        self.work.read(point)
        box = self._box()
        self.held = box.held(point, self.grad)
        self.free_grad = self.grad.masked_fill(self.held, 0.0)
        self.largest, self.total, _ = self.work.norms(box.clamp(point - self.grad) - point)
        self.work.vectors.give(point)

    def _ingredients(self) -> tuple[Tensor, Tensor, Tensor, tuple[float, float]]:
        assert self.prev_grad is not None and self.d is not None
        y = torch.sub(self.grad, self.prev_grad)
        y.masked_fill_(self.d == 0.0, 0.0)
        self.work.vectors.give(self.prev_grad)
        return self.free_grad, y, self.d, (0.0, -1.0)

    def _set_direction(self) -> None:
        self.d = self.work.vectors.take()
        self._combine(self.d, self.free_grad)
        self.d.masked_fill_(self.held, 0.0)
        for part in self.work.held:
            self.d[part].zero_()
        self.d_largest, _, self.slope = self.work.norms(self.d, self.free_grad)

    def _place(self, origin: Tensor, t: float) -> None:
        """Move to the projected point."""
        assert self.d is not None
        self.target = self._box().clamp(torch.add(origin, self.d, alpha=t))
        self.work.move(self.target, 0.0, self.target)

    def _predicted(self, origin: Tensor) -> float:
        """The change the gradient predicts for the projected point."""
        return self.work.norms(self.target - origin, self.grad).product

    def _slope_at(self, norms: Norms, known: float) -> float:
        return known

    def _line_search(self, evaluate: Callable[[float], Point], start: Point, max_ls: int) -> tuple[Point, int]:
        return backtrack(evaluate, start, self.t, max_ls)

    def _advance(self) -> None:
        origin = self.work.vectors.take()
        self.work.read(origin)
        self._place(origin, self.t)
        self._arrive(origin)
        self.work.vectors.give(origin)

    def _arrive(self, origin: Tensor) -> None:
        """The step is what was moved, in the state too."""
        assert self.d is not None
        torch.sub(self.target, origin, out=self.d)
        self.t = 1.0
        self.d_largest = self.work.norms(self.d).largest
