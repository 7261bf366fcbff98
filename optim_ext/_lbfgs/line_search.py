"""Line searches along a direction. They see numbers only; what a point is to the caller travels along in ``Point``."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Point(NamedTuple):
    """The objective at ``t`` along the direction: its value, its slope there, and whatever the caller needs to know."""

    t: float
    loss: float
    slope: float
    at: Any = None


class Length(float):
    """A step length in the parameters' dtype, as interpolation makes them. Others are doubles, as lr is."""


Evaluate = Callable[[float], Point]
# A number as the nearest one of some dtype. Rounding the double result of one operation gives that dtype's own result.
Rounded = Callable[[float], float]


def rounded_to(dtype: torch.dtype, saves_overflow: bool = False) -> Rounded:
    """Rounds to single or double precision; numbers too large for it stay as they are if `saves_overflow`."""
    if dtype == torch.float64:
        return float
    return _single_or_double if saves_overflow else _single


def _single(number: float) -> float:
    return ctypes.c_float(number).value


def _single_or_double(number: float) -> float:
    single = ctypes.c_float(number).value
    return single if math.isfinite(single) else float(number)


def strong_wolfe(
    evaluate: Evaluate,
    start: Point,
    t: float,
    largest: float,
    max_ls: int,
    rounded: Rounded = float,
    guarded: bool = False,
    c1: float = 1e-4,
    c2: float = 0.9,
    tolerance_change: float = 1e-9,
) -> tuple[Point, int]:
    """Find a point that satisfies the strong Wolfe conditions (Nocedal & Wright 2006, algorithms 3.5 and 3.6).

    Asks for the same points in the same order as torch's L-BFGS does, so that the counts of evaluations are torch's.
    There losses are doubles, but slopes and what is computed with them have the dtype of the parameters. That decides
    where a search ends: in single precision a loss that no longer changes is not above its bound.

    Args:
        evaluate: the objective at a step length, its slope rounded.
        start: the point at step length zero.
        t: the first step length to try.
        largest: the largest magnitude in the direction; a bracket shorter than ``tolerance_change`` in it is given up.
        max_ls: evaluations after the first.
        rounded: rounds to the dtype torch would compute in.
        guarded: take points where the objective is not finite for infinitely high ones instead of believing them.

    Returns:
        The point to go to, and the number of evaluations.
    """

    base, flat = rounded(start.loss), rounded(rounded(-c2) * start.slope)

    def is_high(point: Point) -> bool:
        share = rounded(c1) * point.t if isinstance(point.t, Length) else c1 * point.t
        return rounded(point.loss) > rounded(base + rounded(rounded(share) * start.slope))

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
        if abs(point.slope) <= flat:
            return point, evaluations
        if point.slope >= 0:
            bracket = [previous, point]
            break
        before, t, fit = _alike(previous.t, point.t, rounded)
        t = _interpolate(previous, point, fit(t + fit(fit(0.01) * fit(t - before))), fit(t * 10), rounded)
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
        if rounded(abs(last.t - first.t) * largest) < rounded(tolerance_change):
            break
        if math.isinf(bracket[high].loss) and guarded:
            t = bracket[low].t + 0.1 * (bracket[high].t - bracket[low].t)
        else:
            t = _interpolate(first, last, min(first.t, last.t), max(first.t, last.t), rounded)
        left, right, fit = _alike(min(first.t, last.t), max(first.t, last.t), rounded)
        margin = fit(fit(0.1) * fit(right - left))
        if min(right - t, t - left) < margin:
            # So near an end twice in a row, or at it: take a tenth of the bracket instead.
            if stalled or t >= right or t <= left:
                t = fit(right - margin if abs(t - right) < abs(t - left) else left + margin)
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
        done = abs(point.slope) <= flat
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


def _alike(first: float, second: float, rounded: Rounded) -> tuple[float, float, Rounded]:
    """Two lengths as torch computes with them, and what that does to results: it rounds them if either length was."""
    if not (isinstance(first, Length) or isinstance(second, Length)):
        return first, second, float

    def fit(t: float) -> Length:
        return Length(rounded(t))

    return fit(first), fit(second), fit


def _interpolate(a: Point, b: Point, left: float, right: float, rounded: Rounded) -> float:
    """Where the cubic through both points with both slopes has its minimum, within the bounds; else their middle."""
    if b.t < a.t:
        a, b = b, a
    if a.t < b.t:
        low, high, fit = _alike(a.t, b.t, rounded)
        rise, apart = 3 * (a.loss - b.loss), fit(low - high)
        # torch divides a number by a tensor as a multiplication by the reciprocal.
        is_tensor = isinstance(apart, Length) and apart != 0.0
        secant = rounded(rise) * rounded(1 / apart) if is_tensor else rise / (a.t - b.t)
        d1 = rounded(rounded(a.slope + b.slope) - rounded(secant))
        square = rounded(rounded(d1 * d1) - rounded(a.slope * b.slope))
        if square >= 0:
            d2 = rounded(math.sqrt(square))
            above = rounded(rounded(b.slope + d2) - d1)
            below = rounded(rounded(b.slope - a.slope) + 2 * d2)
            ratio = rounded(above / below) if below != 0 else math.copysign(math.inf, above)
            t = Length(rounded(rounded(high) - rounded(rounded(high - low) * ratio)))
            if not math.isnan(t):
                return min(max(t, left), right)
    left, right, fit = _alike(left, right, rounded)
    return fit(fit(left + right) / 2)
