"""From the source of a rule to the graph of its values: statements, functions that are called, and the whole."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from optim_ext._rules.errors import RuleError, Source
from optim_ext._rules.expressions import DIFFERS, Expressions, OneBranchOnly, name_of
from optim_ext._rules.outside import Captured
from optim_ext._rules.values import Graph, Item, Kind, Value

_DEEPEST = 16  # functions that call functions
MOST_STATES, MOST_SCALARS = 8, 2


@dataclass
class Translation:
    """A rule under one set of constants: what becomes of the parameter, of its state and of the scalars."""

    graph: Graph
    operands: list[Value]
    scalars: list[Value]
    captured: list[Captured] = field(default_factory=list)


class Frame(Expressions):
    """One function while it is read: the rule, or a function it calls."""

    def __init__(self, reader: Reader, source: Source, env: dict[str, Any], depth: int) -> None:
        self.reader, self.graph, self.source, self.env, self.depth = reader, reader.graph, source, env, depth
        self.captures = reader.captured
        self.result: Item | None = None
        self.returned: ast.Return | None = None

    def read(self) -> Item:
        self.block(self.source.definition.body, may_return=True)
        if self.result is None:
            self.refuse(self.source.definition, "returns nothing")
        return self.result

    def block(self, body: list[ast.stmt], may_return: bool) -> None:
        for statement in body:
            if self.result is not None:
                self.refuse(statement, "follows a return")
            self.statement(statement, may_return)

    def statement(self, node: ast.stmt, may_return: bool) -> None:
        if isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return
        if isinstance(node, ast.Assign):
            item = self.item(node.value)
            for target in node.targets:
                self.assign(target, item)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.item(node.value))
        elif isinstance(node, ast.AugAssign):
            if not isinstance(node.target, ast.Name):
                self.refuse(node.target, "only names can be assigned to")
            left = self.one(node.target, self.look_up(node.target))
            self.assign(node.target, self.binary(node, node.op, left, self.value(node.value)))
        elif isinstance(node, ast.If):
            self.branch(node, may_return)
        elif isinstance(node, ast.Return):
            if not may_return:
                self.refuse(node, "a return within an if on a number; assign to a name, and return once at the end")
            if node.value is None:
                self.refuse(node, "returns nothing")
            self.result, self.returned = self.item(node.value), node
        elif isinstance(node, (ast.For, ast.While, ast.AsyncFor)):
            self.refuse(node, "loops are not possible in a rule, which describes one element")
        elif isinstance(node, ast.Expr):
            self.value_for_nothing(node.value)
        else:
            self.refuse(node, f"{name_of(node)} is not possible in a rule")

    def value_for_nothing(self, node: ast.expr) -> NoReturn:
        if isinstance(node, ast.Call):
            self.value(node)  # refuses operations in place, in better words
        self.refuse(node, "has no effect; write x = ...")

    def assign(self, target: ast.expr, item: Item) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            if not isinstance(item, tuple) or len(item) != len(target.elts):
                count = len(item) if isinstance(item, tuple) else "one"
                self.refuse(target, f"{count} value(s) for {len(target.elts)} names")
            for one, part in zip(target.elts, item, strict=True):
                self.assign(one, part)
        elif isinstance(target, ast.Name):
            if isinstance(item, Value):
                item = self.reader.stored(target.id, item) if self.depth == 0 else item
                self.graph.names.setdefault(item.number, target.id)
            self.env[target.id] = item
        elif isinstance(target, ast.Subscript):
            self.refuse(target, "indexing is not possible: a rule sees one element; use where(condition, a, b)")
        else:
            self.refuse(target, "only names can be assigned to")

    def branch(self, node: ast.If, may_return: bool) -> None:
        condition = self.truth(node.test)
        if condition.kind == Kind.element:
            self.refuse(node.test, DIFFERS)
        if condition.kind == Kind.constant:
            return self.block(node.body if condition.payload else node.orelse, may_return)
        before = dict(self.env)
        self.block(node.body, may_return=False)
        then, self.env = self.env, dict(before)
        self.block(node.orelse, may_return=False)
        other, self.env = self.env, before
        for name in {**then, **other}:
            a, b = then.get(name), other.get(name)
            self.env[name] = a if a is b else self.chosen(node, condition, a, b)
            if isinstance(self.env[name], Value):
                self.graph.names.setdefault(self.env[name].number, name)

    def chosen(self, node: ast.AST, condition: Value, a: Any, b: Any) -> Any:
        if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
            return tuple(self.chosen(node, condition, x, y) for x, y in zip(a, b, strict=True))
        if not isinstance(a, Value) or not isinstance(b, Value):
            return OneBranchOnly()
        return self.select(node, condition, a, b)

    def inlined(self, node: ast.Call, function: Callable[..., Any]) -> Item:
        if self.depth == _DEEPEST:
            self.refuse(node, f"{self.source.text_of(node.func)} calls itself, or functions call each other too deeply")
        try:
            source = Source(function)
        except RuleError as error:
            self.refuse(node, f"{self.source.text_of(node.func)} cannot be looked into: {error.msg}")
        given = [self.item(arg) for arg in node.args]
        named = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.refuse(node, "arguments cannot be unpacked in a rule")
            named[keyword.arg] = self.item(keyword.value)
        try:
            bound = inspect.signature(function).bind(*given, **named)
        except TypeError as error:
            self.refuse(node, f"{function.__name__}: {error}")
        bound.apply_defaults()
        env: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            env[name] = self._as_item(node, value)
        return Frame(self.reader, source, env, self.depth + 1).read()

    def no_room_for(self, norm: Value) -> str | None:
        return self.reader.no_room_for(norm)

    def _as_item(self, node: ast.AST, value: Any) -> Item:
        if isinstance(value, tuple):
            return tuple(self._as_item(node, part) for part in value)
        return value if isinstance(value, Value) else self.constant(node, value)


class Reader:
    """Reads one rule under one set of constants.

    ``env`` says what the options stand for; ``operands`` names parameter, gradient and states, ``scalars`` the numbers.
    """

    def __init__(self, source: Source, graph: Graph, operands: Sequence[str], scalars: Sequence[str]) -> None:
        self.source, self.graph, self.operands, self.scalars = source, graph, list(operands), list(scalars)
        self.captured: list[Captured] = []
        self.norms: list[Value] = []

    def no_room_for(self, norm: Value) -> str | None:
        """Why kernels cannot take this norm besides those before it."""
        others = [other for other in self.norms if other is not norm]
        self.norms = [*others, norm]
        numbers = [*self.scalars, *(other.text for other in others)]
        if len(numbers) >= MOST_SCALARS:
            return f"is one number of a parameter too many: kernels take {MOST_SCALARS}, and there are {', '.join(numbers)}"
        made = {of.number for of in (other.args[0] for other in self.norms) if of.op != "operand"}
        if len(self.operands) + len(made) > MOST_STATES + 2:
            return (
                f"is of a computed value, for which kernels have no room beside {len(self.operands) - 2} states; they take "
                f"{MOST_STATES - len(made)} then"
            )
        return None

    def stored(self, name: str, value: Value) -> Value:
        """A scalar of the state is rounded to what its tensor holds, so that this step computes with what the next finds."""
        if name not in self.scalars or value.kind == Kind.element or not value.is_number:
            return value
        place = self.scalars.index(name)
        return self.graph.apply("rounded", value, payload=place, text=value.text, line=value.line)

    def read(self, options: Mapping[str, Item]) -> Translation:
        env: dict[str, Any] = dict(options)
        for place, name in enumerate(self.operands):
            env[name] = self.graph.operand(place)
        for place, name in enumerate(self.scalars):
            env[name] = self.graph.scalar(place)
        frame = Frame(self, self.source, env, 0)
        result = frame.read()
        items = result if isinstance(result, tuple) else (result,)
        wanted = [self.operands[0], *self.operands[2:], *self.scalars]
        at = frame.returned.value if frame.returned is not None and frame.returned.value is not None else frame.returned
        if len(items) != len(wanted):
            self.source.refuse(at, f"returns {len(items)} value(s), expected {len(wanted)}: ({', '.join(wanted)})")
        values: list[Value] = []
        for name, item in zip(wanted, items, strict=True):
            value = frame.one(at or self.source.definition, item)
            if value.is_truth or not value.is_number:
                self.source.refuse(at, f"the new {name} is no number")
            if name in self.scalars:
                if value.kind == Kind.element:
                    self.source.refuse(at, f"the new {name} differs from element to element, but it is one number")
                value = self.stored(name, value) if value.op not in ("scalar", "rounded") else value
            values.append(value)
        states = len(self.operands) - 2
        new_param, new_states, new_scalars = values[0], values[1 : 1 + states], values[1 + states :]
        return Translation(self.graph, [new_param, self.graph.operand(1), *new_states], new_scalars, self.captured)
