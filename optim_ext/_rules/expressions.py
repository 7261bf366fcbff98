"""From the expressions of a rule's source to the graph of its values."""

from __future__ import annotations

import ast
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from optim_ext._rules.errors import Source
from optim_ext._rules.outside import Captured, is_users, resolve
from optim_ext._rules.values import NORMS, Graph, Item, Kind, Value
from optim_ext._rules.words import METHODS, POSSIBLE, Word, word_for

_OPERATORS = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_COMPARISONS = {ast.Lt: "less", ast.LtE: "less_equal", ast.Eq: "equal", ast.NotEq: "not_equal"}
_TURNED = {ast.Gt: "less", ast.GtE: "less_equal"}  # with the two sides changed
DIFFERS = "this condition differs from element to element; use where(condition, a, b)"
_LARGEST_POWER = 8


@dataclass(frozen=True)
class OneBranchOnly:
    """In place of what a name stands for, where that depends on a branch."""


class Expressions(ABC):
    """The expressions of one function, under what its names stand for (``env``). Numbers from outside of it are noted
    in ``captures``."""

    graph: Graph
    source: Source
    env: dict[str, Any]
    captures: list[Captured]

    def refuse(self, node: Any, problem: str) -> NoReturn:
        self.source.refuse(node, problem)

    @abstractmethod
    def inlined(self, node: ast.Call, function: Callable[..., Any]) -> Item:
        """What a function of the user's comes to, with these arguments."""

    @abstractmethod
    def no_room_for(self, norm: Value) -> str | None:
        """Why kernels cannot take this norm besides those there are."""

    def item(self, node: ast.expr) -> Item:
        if isinstance(node, ast.Tuple):
            return tuple(self.item(part) for part in node.elts)
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self.look_up(node)
        if isinstance(node, ast.IfExp):
            condition = self.truth(node.test)
            if condition.kind == Kind.constant:
                return self.item(node.body if condition.payload else node.orelse)
        if isinstance(node, ast.Call):
            return self.call(node)
        return self.value(node)

    def one(self, node: ast.AST, item: Item) -> Value:
        if isinstance(item, tuple):
            self.refuse(node, "is a tuple, where one value is needed")
        return item

    def value(self, node: ast.expr) -> Value:
        """The value of an expression, which is not a tuple."""
        if isinstance(node, ast.Constant):
            return self.constant(node, node.value)
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self.one(node, self.look_up(node))
        if isinstance(node, ast.BinOp):
            return self.binary(node, node.op, self.value(node.left), self.value(node.right))
        if isinstance(node, ast.UnaryOp):
            return self.unary(node)
        if isinstance(node, ast.Compare):
            return self.compare(node)
        if isinstance(node, ast.BoolOp):
            return self.both(node)
        if isinstance(node, ast.IfExp):
            condition = self.truth(node.test)
            if condition.kind == Kind.element:
                self.refuse(node.test, DIFFERS)
            if condition.kind == Kind.constant:
                return self.value(node.body if condition.payload else node.orelse)
            return self.select(node, condition, self.value(node.body), self.value(node.orelse))
        if isinstance(node, ast.Call):
            return self.one(node, self.call(node))
        if isinstance(node, ast.Subscript):
            return self.subscript(node)
        if isinstance(node, ast.Tuple):
            self.refuse(node, "is a tuple, where one value is needed")
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)):
            self.refuse(node, "loops are not possible in a rule, which describes one element")
        self.refuse(node, f"{name_of(node)} is not possible in a rule")

    def constant(self, node: ast.AST, payload: Any) -> Value:
        if payload is None or isinstance(payload, (bool, str, int, float)):
            return self.graph.constant(payload)
        if isinstance(payload, numbers.Real):
            return self.graph.constant(float(payload))
        self.refuse(node, f"the constant {payload!r} is not possible in a rule")

    def subscript(self, node: ast.Subscript) -> Value:
        item = self.item(node.value)
        if not isinstance(item, tuple):
            self.refuse(node, "indexing is not possible: a rule sees one element, and only tuples have entries")
        index = self.value(node.slice) if isinstance(node.slice, (ast.Constant, ast.UnaryOp, ast.Name)) else None
        if index is None or index.kind != Kind.constant or type(index.payload) is not int:
            self.refuse(node, "the entries of a tuple can be had by a constant whole number only")
        if not -len(item) <= index.payload < len(item):
            self.refuse(node, f"there is no entry {index.payload} of {len(item)}")
        return self.one(node, item[index.payload])

    def look_up(self, node: ast.Name | ast.Attribute) -> Item:
        path = self.path_of(node)
        if path is None or path[0] in self.env:
            if isinstance(node, ast.Name):
                found = self.env[node.id]
                if isinstance(found, OneBranchOnly):
                    self.refuse(node, f"{node.id} is assigned in one branch only, or differently in both")
                item: Item = found
                return item
            self.refuse(node, f".{node.attr} is not possible: a rule sees the value of one element, not a tensor")
        outside = self.outside(node, path)
        return self.captured(node, path, outside)

    def path_of(self, node: ast.expr) -> tuple[str, ...] | None:
        """A dotted name, or nothing for an expression of another kind."""
        if isinstance(node, ast.Name):
            return (node.id,)
        if isinstance(node, ast.Attribute):
            before = self.path_of(node.value)
            return None if before is None else (*before, node.attr)
        return None

    def outside(self, node: ast.AST, path: tuple[str, ...]) -> Any:
        try:
            return resolve(self.source.function, path)
        except NameError:
            self.refuse(node, f"name {path[0]!r} is not defined")
        except AttributeError:
            self.refuse(node, f"{'.'.join(path)} is not defined")

    def captured(self, node: ast.AST, path: tuple[str, ...], found: Any) -> Item:
        parts = found if isinstance(found, tuple) else (found,)
        if not all(part is None or isinstance(part, (bool, str, numbers.Real)) for part in parts):
            what = "a tensor" if isinstance(found, Tensor) else type(found).__name__
            self.refuse(
                node, f"{'.'.join(path)} is {what}; only numbers, and tuples of numbers, come from outside of a rule"
            )
        self.captures.append(Captured(self.source.function, path, found))
        values = tuple(self.constant(node, part) for part in parts)
        return values if isinstance(found, tuple) else values[0]

    def truth(self, node: ast.expr) -> Value:
        value = self.value(node)
        return self.as_truth(node, value)

    def as_truth(self, node: ast.AST, value: Value) -> Value:
        if value.is_truth:
            return value
        if value.kind == Kind.constant:
            return self.graph.constant(bool(value.payload))
        if value.kind == Kind.element:
            self.refuse(node, "is a number that differs from element to element, no condition; compare it with one")
        return self.apply(node, "not_equal", value, self.graph.constant(0.0))

    def apply(self, node: ast.AST, op: str, *args: Value, payload: Any = None) -> Value:
        try:
            return self.graph.apply(
                op, *args, text=self.source.text_of(node), line=self.source.line_of(node), payload=payload
            )
        except (ArithmeticError, ValueError, TypeError) as error:  # of constants
            self.refuse(node, str(error))

    def number(self, node: ast.AST, value: Value) -> Value:
        if value.is_truth:
            self.refuse(node, "arithmetic with a truth value; use where(condition, 1.0, 0.0)")
        if not value.is_number:
            self.refuse(node, f"arithmetic with {value.payload!r}")
        return value

    def binary(self, node: ast.BinOp | ast.AugAssign, op: ast.operator, a: Value, b: Value) -> Value:
        if isinstance(op, (ast.BitAnd, ast.BitOr)):
            return self.joined(node, "both" if isinstance(op, ast.BitAnd) else "either", [a, b])
        left = node.left if isinstance(node, ast.BinOp) else node.target
        right = node.right if isinstance(node, ast.BinOp) else node.value
        self.number(left, a), self.number(right, b)
        if isinstance(op, ast.Pow):
            return self.power(node, a, b)
        name = _OPERATORS.get(type(op))
        if name is None:
            self.refuse(node, f"the operator of {self.source.text_of(node)!r} is not possible in a rule")
        return self.apply(node, name, a, b)

    def power(self, node: ast.AST, a: Value, b: Value) -> Value:
        if b.kind == Kind.element:
            self.refuse(node, "an exponent that differs from element to element is not possible")
        if a.kind != Kind.element:
            return self.apply(node, "whole_power" if b.is_whole else "real_power", a, b)
        if b.kind == Kind.constant and b.payload == 0.5:
            return self.apply(node, "root", a)
        if b.kind == Kind.constant and b.is_whole and 1 <= b.payload <= _LARGEST_POWER:
            return self.graph.product(a, int(b.payload))
        self.refuse(
            node, f"a power of an element has a constant exponent: 0.5, or a whole number from 1 to {_LARGEST_POWER}"
        )

    def unary(self, node: ast.UnaryOp) -> Value:
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            value = self.as_truth(node.operand, value)
            if value.kind == Kind.element:
                self.refuse(node, "`not` of what differs from element to element; use ~")
            return self.apply(node, "none", value)
        if isinstance(node.op, ast.Invert):
            if not value.is_truth:
                self.refuse(node, "~ is for conditions")
            return self.apply(node, "none", value)
        self.number(node.operand, value)
        return value if isinstance(node.op, ast.UAdd) else self.apply(node, "negate", value)

    def compare(self, node: ast.Compare) -> Value:
        if len(node.ops) != 1:
            self.refuse(node, "compare two values at a time: (a < b) & (b < c)")
        op, a, b = node.ops[0], self.value(node.left), self.value(node.comparators[0])
        if a.kind == b.kind == Kind.constant:
            if isinstance(op, (ast.Is, ast.IsNot)):
                return self.graph.constant((a.payload is b.payload) == isinstance(op, ast.Is))
            if not (a.is_number and b.is_number) and isinstance(op, (ast.Eq, ast.NotEq)):
                return self.graph.constant((a.payload == b.payload) == isinstance(op, ast.Eq))
        if isinstance(op, (ast.Is, ast.IsNot)) and any(v.op == "constant" and v.payload is None for v in (a, b)):
            return self.graph.constant(isinstance(op, ast.IsNot))  # a number is not None
        for side, value in ((node.left, a), (node.comparators[0], b)):
            if value.is_truth or not value.is_number:
                self.refuse(
                    side, "only numbers are compared in a rule, but for options that are strings or truth values"
                )
        name = _COMPARISONS.get(type(op))
        if name is not None:
            return self.apply(node, name, a, b)
        name = _TURNED.get(type(op))
        if name is None:
            self.refuse(node, f"the comparison {self.source.text_of(node)!r} is not possible in a rule")
        return self.apply(node, name, b, a)

    def both(self, node: ast.BoolOp) -> Value:
        is_and = isinstance(node.op, ast.And)
        values: list[Value] = []
        for part in node.values:
            value = self.as_truth(part, self.value(part))
            if value.kind == Kind.element:
                self.refuse(part, "`and` and `or` of what differs from element to element; use & and |")
            if value.kind == Kind.constant:
                if bool(value.payload) != is_and:
                    return self.graph.constant(not is_and)
                continue
            values.append(value)
        if not values:
            return self.graph.constant(is_and)
        return self.joined(node, "both" if is_and else "either", values)

    def joined(self, node: ast.AST, op: str, values: list[Value]) -> Value:
        result: Value | None = None
        for value in values:
            if not value.is_truth:
                self.refuse(node, "& and | are for conditions")
            result = value if result is None else self.apply(node, op, result, value)
        assert result is not None
        return result

    def select(self, node: ast.AST, condition: Value, a: Value, b: Value) -> Value:
        if condition.kind == Kind.constant:
            return a if condition.payload else b
        if a is b:
            return a
        for value in (a, b):
            if value.is_truth or not value.is_number:
                self.refuse(node, "only numbers can be chosen between")
        return self.graph.select(condition, a, b, text=self.source.text_of(node), line=self.source.line_of(node))

    # Calls.

    def call(self, node: ast.Call) -> Item:
        if any(isinstance(arg, ast.Starred) for arg in node.args):
            self.refuse(node, "arguments cannot be unpacked in a rule")
        path = self.path_of(node.func)
        if path is not None and path[0] not in self.env:
            function = self.outside(node.func, path)
            word = word_for(function)
            if word is None and is_users(function):
                return self.inlined(node, function)
            if word is None:
                self.refuse(node, _no_operation(self.source.text_of(node.func)))
            args = [self.value(arg) for arg in node.args]
            nodes: list[ast.expr] = list(node.args)
        elif isinstance(node.func, ast.Attribute):
            name = node.func.attr
            word = METHODS.get(name)
            if name.endswith("_") and not name.startswith("_"):
                self.refuse(node, f".{name}() works in place, which is not possible in a rule; write x = ...")
            if word is None:
                self.refuse(node, _no_operation(f".{name}()"))
            args = [self.value(node.func.value), *(self.value(arg) for arg in node.args)]
            nodes = [node.func.value, *node.args]
        else:
            self.refuse(node, _no_operation(self.source.text_of(node.func)))
        if node.keywords:
            self.refuse(node, "arguments by keyword are not possible in a rule; give them in order")
        return self.word(node, word, args, nodes)

    def word(self, node: ast.Call, word: Word, args: list[Value], nodes: list[ast.expr]) -> Value:
        called = self.source.text_of(node.func)
        if len(args) != word.arity:
            self.refuse(node, f"{called} takes {word.arity} values here, {len(args)} given")
        if word.op == "where":
            condition = self.as_truth(nodes[0], args[0])
            if word.takes == "elements" and Kind.element not in (args[1].kind, args[2].kind):
                self.refuse(node, f"{called} of two numbers is in torch's default dtype; use optim_ext.math.where")
            if word.takes == "elements" and condition.kind != Kind.element:
                self.refuse(nodes[0], f"{called} takes a condition on elements; use optim_ext.math.where")
            return self.select(node, condition, args[1], args[2])
        for arg, at in zip(args, nodes, strict=True):
            self.number(at, arg)
        name = called.rpartition(".")[2]
        if word.op in NORMS:
            return self.norm(node, word.op, args[0], nodes[0])
        if word.takes == "numbers" and any(arg.is_of_norms for arg in args):
            self.refuse(node, f"{called} takes numbers only, and norms are tensors to Python; use {_better(name)}")
        if word.takes == "numbers" and any(arg.kind == Kind.element for arg in args):
            self.refuse(
                node, f"{called} takes numbers only, and this differs from element to element; use {_better(name)}"
            )
        if word.takes == "elements" and any(args[k].kind != Kind.element for k in word.elements):
            self.refuse(node, f"{called} takes tensors, and this is a number; use optim_ext.math.{name}")
        return self.operation(node, word.op, args)

    def norm(self, node: ast.Call, op: str, of: Value, at: ast.expr) -> Value:
        called = self.source.text_of(node.func)
        if of.kind != Kind.element:
            self.refuse(at, f"{called} is of what differs from element to element, and this is a number")
        if of.is_of_norms:
            self.refuse(
                node,
                f"{called} of what depends on another norm; all norms of a rule are taken in one sweep, before anything is "
                "changed",
            )
        norm = self.graph.norm(op, of, text=self.source.text_of(node), line=self.source.line_of(node))
        problem = self.no_room_for(norm)
        if problem is not None:
            self.refuse(node, problem)
        return norm

    def operation(self, node: ast.AST, op: str, args: list[Value]) -> Value:
        if op == "float":
            return args[0]
        if op == "square":
            return self.apply(node, "multiply", args[0], args[0])
        if op == "clamp":
            return self.apply(node, "smaller", self.apply(node, "larger", args[0], args[1]), args[2])
        return self.apply(node, op, *args)


def _better(name: str) -> str:
    """What to use in place of a function of Python's that takes numbers only."""
    others = {"min": "minimum", "max": "maximum", "fabs": "abs", "float": "it as it is"}
    return others.get(name, f"optim_ext.math.{name}")


def _no_operation(what: str) -> str:
    return f"{what} is not an operation on one element; possible are {POSSIBLE}"


def name_of(node: ast.AST) -> str:
    names = {
        "Lambda": "a lambda",
        "FunctionDef": "a function within the function",
        "NamedExpr": "the operator :=",
        "JoinedStr": "a formatted string",
        "With": "with",
        "Try": "try",
        "Assert": "assert",
        "Raise": "raise",
        "Delete": "del",
        "Global": "global",
        "Nonlocal": "nonlocal",
        "Import": "an import",
        "ImportFrom": "an import",
    }
    name = type(node).__name__
    return names.get(name, name)
