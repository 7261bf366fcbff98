"""What a step of L-BFGS moves along: straight lines, or within bounds the path that a ray takes when every point of it is
projected into the box."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim_ext._lbfgs.line_search import Point, Rounded, backtrack, strong_wolfe
from optim_ext._lbfgs.workspace import Method, Workspace
from optim_ext._load import _C

Evaluate = Callable[[float], Point]


class Departure(NamedTuple):
    """A direction, and whether a step along it has been taken: its largest magnitude, and the slope there."""

    largest: float
    slope: float
    moved: bool


class Free:
    """No bounds: steps are straight."""

    def __init__(self, work: Workspace, method: Method, rounded: Rounded) -> None:
        self.work, self.method, self.rounded = work, method, rounded

    def enter(self) -> None:
        """Before a step: parameters are brought to where they are allowed to be."""

    def leave(self, has_begun: bool) -> None:
        """After a step: if it has not begun, they are put back."""

    def measure(self, here: _C.LbfgsEvaluation) -> tuple[float, float]:
        """How far a point is from a minimum: the largest magnitude and the sum of magnitudes of its gradient."""
        return here.largest, here.total

    def depart(
        self, here: _C.LbfgsEvaluation, anew: bool, last_length: float, t: float | None, flat: float
    ) -> Departure:
        """Form the direction from a point, in a new history or after the last step has joined it, and go ``t`` along it,
        unless its slope is above ``flat`` (or, with ``recover``, something is not finite)."""
        method = self.method
        largest, slope, moved = self.work.history.depart(
            self.work.moved, here, method.history_size, anew=anew, last_length=last_length, damping=method.damping,
            keeps_origin=method.line_search_fn is not None, t=t, least_slope=flat, only_if_finite=method.recover,
        )  # fmt: skip
        return Departure(largest, self.rounded(slope), moved)

    def place(self, t: float) -> None:
        """Move to the point at ``t``, from the origin of the search."""
        self.work.history.move(self.work.moved, t, from_origin=True)

    def slope_at(self, here: _C.LbfgsEvaluation) -> float:
        """At the point that was placed last, whose gradient this is."""
        return self.rounded(here.product)

    def search(self, evaluate: Evaluate, start: Point, t: float, largest: float, max_ls: int) -> tuple[Point, int]:
        return strong_wolfe(evaluate, start, t, largest, max_ls, self.rounded, guarded=self.method.recover)

    def arrive(self, t: float, largest: float) -> tuple[float, float]:
        """After the last move of an iteration: the length of the step as the state has it, and the largest magnitude of
        the direction."""
        return t, largest


class Boxed(Free):
    """Where a parameter is at a bound and its gradient points outwards, it is held: its part of the gradient and of the
    direction is zero. The remaining part of the inverse Hessian is positive definite, so the direction leads downhill
    (the two-metric projection of Bertsekas 1982). Differences of gradients are only learnt from where a parameter has
    moved; once the held set has settled, this is L-BFGS on the free parameters."""

    def __init__(self, work: Workspace, method: Method, rounded: Rounded) -> None:
        super().__init__(work, method, rounded)
        if work.box is None:
            work.box = Box(work)
        self.box: Box = work.box
        self.outside: Tensor | None = None

    def enter(self) -> None:
        before = self._point()
        inside = self.box.clamp(before)
        if not torch.equal(before, inside):
            self.outside = before
            self._move_to(inside)

    def leave(self, has_begun: bool) -> None:
        if self.outside is not None and not has_begun:
            self._move_to(self.outside)

    def measure(self, here: _C.LbfgsEvaluation) -> tuple[float, float]:
        """Of the projected gradient."""
        point = self._point()
        self.held = self.box.held(point, here.grad)
        largest, total, _ = _norms(self.box.clamp(point - here.grad) - point)
        return largest, total

    def depart(
        self, here: _C.LbfgsEvaluation, anew: bool, last_length: float, t: float | None, flat: float
    ) -> Departure:
        self.start = here
        largest, slope, _ = self.work.history.depart(
            self.work.moved, here, self.method.history_size, anew=anew, last_length=last_length, damping=None,
            keeps_origin=True, t=None, least_slope=flat, only_if_finite=self.method.recover, is_held=self.held,
        )  # fmt: skip
        is_finite = math.isfinite(slope) and math.isfinite(largest)
        moves = t is not None and not slope > flat and (is_finite or not self.method.recover)
        if t is not None and moves:
            self.place(t)
        return Departure(largest, slope, moves)

    def place(self, t: float) -> None:
        """Move to the projected point."""
        history = self.work.history
        self.target = self.box.clamp(torch.add(history.origin, history.d, alpha=t))
        self._move_to(self.target)

    def slope_at(self, here: _C.LbfgsEvaluation) -> float:
        """The change that the gradient at the origin predicts for the projected point."""
        return _norms(self.target - self.work.history.origin, self.start.grad)[2]

    def search(self, evaluate: Evaluate, start: Point, t: float, largest: float, max_ls: int) -> tuple[Point, int]:
        return backtrack(evaluate, start, t, max_ls)

    def arrive(self, t: float, largest: float) -> tuple[float, float]:
        """The step is what was moved, in the state too."""
        history = self.work.history
        torch.sub(self.target, history.origin, out=history.d)
        return 1.0, _norms(history.d)[0]

    def _point(self) -> Tensor:
        return self.work.history.read(self.work.moved)

    def _move_to(self, point: Tensor) -> None:
        self.work.history.move_to(self.work.moved, point)


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


def _norms(vector: Tensor, other: Tensor | None = None) -> tuple[float, float, float]:
    """The largest magnitude, the sum of magnitudes, and the product with another vector."""
    largest, total, product = torch.ops.optim_ext.lbfgs_norms(vector, other).tolist()
    return largest, total, product


def geometry_of(work: Workspace, method: Method, rounded: Rounded) -> Free:
    kind: Any = Boxed if method.bounded else Free
    geometry: Free = kind(work, method, rounded)
    return geometry
