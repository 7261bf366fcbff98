"""Line searches along a direction. They see numbers only; what a point is to the caller travels along in ``Point``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Point(NamedTuple):
    """The objective at ``t`` along the direction: its value, its slope there, and whatever the caller needs to know."""

    t: float
    loss: float
    slope: float
    at: Any = None


Evaluate = Callable[[float], Point]


def strong_wolfe(
    evaluate: Evaluate,
    start: Point,
    t: float,
    largest: float,
    max_ls: int,
    tolerance_change: float,
    guarded: bool = False,
    c1: float = 1e-4,
    c2: float = 0.9,
) -> tuple[Point, int]:
    """Find a point that satisfies the strong Wolfe conditions (Nocedal & Wright 2006, algorithms 3.5 and 3.6).

    Asks for the same points in the same order as torch's L-BFGS does, so that the counts of evaluations are torch's.

    Args:
        evaluate: the objective at a step length.
        start: the point at step length zero.
        t: the first step length to try.
        largest: the largest magnitude in the direction; a bracket shorter than ``tolerance_change`` in it is given up.
        max_ls: evaluations after the first.
        guarded: take points where the objective is not finite for infinitely high ones instead of believing them.

    Returns:
        The point to go to, and the number of evaluations.
    """

    def is_high(point: Point) -> bool:
        return point.loss > start.loss + c1 * point.t * start.slope

    def look(t: float) -> Point:
        point = evaluate(t)
        if guarded and not (math.isfinite(point.loss) and math.isfinite(point.slope)):
            return point._replace(loss=math.inf)
        return point

    previous, point = start, look(t)
    evaluations, iterations = 1, 0
    bracket = None
    while iterations < max_ls:
        if is_high(point) or (iterations > 1 and point.loss >= previous.loss):
            bracket = [previous, point]
            break
        if abs(point.slope) <= -c2 * start.slope:
            return point, evaluations
        if point.slope >= 0:
            bracket = [previous, point]
            break
        t = _interpolate(previous, point, point.t + 0.01 * (point.t - previous.t), point.t * 10)
        previous, point = point, look(t)
        evaluations += 1
        iterations += 1
    if bracket is None:
        bracket = [start, point]

    # Between the two lies a good point. `low` is the better of them.
    low, high = (0, 1) if bracket[0].loss <= bracket[1].loss else (1, 0)
    stalled = False
    while iterations < max_ls:
        first, last = bracket
        if abs(last.t - first.t) * largest < tolerance_change:
            break
        if math.isinf(bracket[high].loss) and guarded:
            t = bracket[low].t + 0.1 * (bracket[high].t - bracket[low].t)
        else:
            t = _interpolate(first, last, min(first.t, last.t), max(first.t, last.t))
        left, right = min(first.t, last.t), max(first.t, last.t)
        margin = 0.1 * (right - left)
        if min(right - t, t - left) < margin:
            # So near an end twice in a row, or at it: take a tenth of the bracket instead.
            if stalled or t >= right or t <= left:
                t = right - margin if abs(t - right) < abs(t - left) else left + margin
                stalled = False
            else:
                stalled = True
        else:
            stalled = False

        point = look(t)
        evaluations += 1
        iterations += 1
        if is_high(point) or point.loss >= bracket[low].loss:
            bracket[high] = point
            low, high = (0, 1) if bracket[0].loss <= bracket[1].loss else (1, 0)
            continue
        done = abs(point.slope) <= -c2 * start.slope
        if not done and point.slope * (bracket[high].t - bracket[low].t) >= 0:
            bracket[high] = bracket[low]
        bracket[low] = point
        if done:
            break
    return bracket[low], evaluations


def backtrack(evaluate: Evaluate, start: Point, t: float, max_ls: int, c1: float = 1e-4) -> tuple[Point, int]:
    """Shorten ``t`` until the objective falls by ``c1`` of what the gradient at the start promises (Armijo 1966).

    Args:
        evaluate: the objective at a step length; ``slope`` is the change that the gradient at the start predicts for
            the point, negative downhill.
        start: the point at step length zero.
        t: the first step length to try.
        max_ls: evaluations after the first.

    Returns:
        The point to go to (``start`` where none is low enough), and the number of evaluations.
    """
    evaluations = 0
    while evaluations <= max_ls:
        point = evaluate(t)
        evaluations += 1
        if math.isfinite(point.loss) and point.loss <= start.loss + c1 * point.slope:
            return point, evaluations
        # The minimum of the parabola through both values and the slope at the start.
        rise = point.loss - start.loss - point.slope
        t *= min(0.5, max(0.1, -0.5 * point.slope / rise)) if math.isfinite(rise) and rise > 0 else 0.1
    return start, evaluations


def _interpolate(a: Point, b: Point, left: float, right: float) -> float:
    """Where the cubic through both points with both slopes has its minimum, within the bounds; else their middle."""
    if b.t < a.t:
        a, b = b, a
    if a.t < b.t:
        d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
        square = d1 * d1 - a.slope * b.slope
        if square >= 0:
            d2 = math.sqrt(square)
            above, below = b.slope + d2 - d1, b.slope - a.slope + 2 * d2
            ratio = above / below if below != 0 else math.copysign(math.inf, above)
            t = b.t - (b.t - a.t) * ratio
            if not math.isnan(t):
                return min(max(t, left), right)
    return (left + right) / 2
