"""The values a rule computes, as a graph: what was written once, and what comes to the same, is one value.

There are three kinds. *Constants* are known when the rule is translated; *uniform* values are numbers in double that all
elements of a parameter share, computed once a step; *element* values differ from element to element and are computed in
float, or in double for double parameters. A uniform value that meets an element is rounded to the element's type once, as
a whole: the largest uniform part of an expression is computed in double. That is how the built-in rules are written, too.

Norms of element values are uniform: numbers that a sweep of their own has measured before the one that changes anything.
"""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


class Kind(enum.IntEnum):
    constant = 0
    uniform = 1
    element = 2


# What is a truth value, whatever it is made of.
TRUTHS = frozenset({"less", "less_equal", "equal", "not_equal", "both", "either", "none"})
# Where values come from.
INPUTS = frozenset({"constant", "hyper", "step", "scalar", "operand"})
# What is measured of all elements of a tensor.
NORMS = frozenset({"norm", "rms"})

_FOLD: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "negate": operator.neg,
    "whole_power": operator.pow,
    "real_power": operator.pow,
    "less": operator.lt,
    "less_equal": operator.le,
    "equal": operator.eq,
    "not_equal": operator.ne,
    "both": lambda a, b: bool(a) and bool(b),
    "either": lambda a, b: bool(a) or bool(b),
    "none": operator.not_,
    "root": math.sqrt,
    "exponential": math.exp,
    "logarithm": math.log,
    "sign": lambda x: float((x > 0) - (x < 0)),
    "magnitude": abs,
    "smaller": lambda a, b: a if math.isnan(a) else min(b, a),
    "larger": lambda a, b: a if math.isnan(a) else max(b, a),
    "lerp": lambda a, b, w: a + w * (b - a) if w < 0.5 else b + (w - 1) * (b - a),
}


@dataclass(frozen=True, eq=False)
class Value:
    number: int  # in the order in which values came to be, so that what a value is made of has smaller ones
    kind: Kind
    op: str
    args: tuple[Value, ...] = ()
    payload: Any = None  # of a constant: the constant; of another input: which one
    is_truth: bool = False
    is_whole: bool = False  # a whole number, whatever the options are
    is_of_norms: bool = False  # depends on a norm
    text: str = ""
    line: int = 0

    @property
    def is_number(self) -> bool:
        return self.kind != Kind.constant or (isinstance(self.payload, (int, float)) and not self.is_truth)


Item = Value | tuple["Item", ...]  # what a name in a rule stands for: a value, or a tuple of such


class Graph:
    """Makes values. The caller has seen to it that they may be combined."""

    def __init__(self) -> None:
        self._known: dict[Any, Value] = {}
        self.names: dict[int, str] = {}  # what the user calls a value

    def constant(self, payload: Any) -> Value:
        return self._make(
            Kind.constant,
            "constant",
            (),
            payload,
            is_truth=isinstance(payload, bool),
            is_whole=isinstance(payload, (int, float)) and float(payload).is_integer(),
        )

    def hyper(self, place: int) -> Value:
        return self._make(Kind.uniform, "hyper", (), place)

    def step(self) -> Value:
        return self._make(Kind.uniform, "step", (), None, is_whole=True)

    def scalar(self, place: int) -> Value:
        return self._make(Kind.uniform, "scalar", (), place)

    def operand(self, place: int) -> Value:
        return self._make(Kind.element, "operand", (), place)

    def apply(self, op: str, *args: Value, text: str = "", line: int = 0, payload: Any = None) -> Value:
        """``op`` of these; a constant where all of them are, which raises what Python raises."""
        kind = max(arg.kind for arg in args)
        if kind == Kind.constant and op in _FOLD:
            return self.constant(_FOLD[op](*(arg.payload for arg in args)))
        kind = max(kind, Kind.uniform)
        whole = op in ("add", "subtract", "multiply", "negate") and all(arg.is_whole for arg in args)
        return self._make(kind, op, args, payload, is_truth=op in TRUTHS, is_whole=whole, text=text, line=line)

    def select(self, condition: Value, a: Value, b: Value, text: str = "", line: int = 0) -> Value:
        if condition.kind == Kind.constant:
            return a if condition.payload else b
        if a is b:
            return a
        kind = max(condition.kind, a.kind, b.kind)
        is_whole = a.is_whole and b.is_whole
        return self._make(
            kind, "select", (condition, a, b), None, is_truth=a.is_truth, is_whole=is_whole, text=text, line=line
        )

    def norm(self, op: str, of: Value, text: str = "", line: int = 0) -> Value:
        """A number: one of NORMS, of an element value."""
        return self._make(Kind.uniform, op, (of,), None, text=text, line=line)

    def product(self, base: Value, count: int) -> Value:
        result = base
        for _ in range(count - 1):
            result = self.apply("multiply", result, base)
        return result

    def _make(self, kind: Kind, op: str, args: tuple[Value, ...], payload: Any, **more: Any) -> Value:
        key = (op, tuple(arg.number for arg in args), type(payload), repr(payload))
        found = self._known.get(key)
        if found is None:
            is_of_norms = op in NORMS or any(arg.is_of_norms for arg in args)
            found = self._known[key] = Value(len(self._known), kind, op, args, payload, is_of_norms=is_of_norms, **more)
        return found


def reachable(results: Iterable[Value], past_norms: bool = False) -> list[Value]:
    """Everything these are made of, in an order in which it can be computed: down to norms, or also what these are of."""
    seen: dict[int, Value] = {}
    todo = list(results)
    while todo:
        value = todo.pop()
        if value.number not in seen:
            seen[value.number] = value
            if past_norms or value.op not in NORMS:
                todo.extend(value.args)
    return [seen[number] for number in sorted(seen)]
