"""The options of a rule: which kinds there are, their defaults, and their validation in torch's words."""

from __future__ import annotations

import fnmatch
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optim_ext._constructor import keywords_of
from optim_ext._native_step import NativeStep
from optim_ext._rules.errors import Source
from optim_ext._rules.values import Graph, Item
from optim_ext._step.lazy import LazyStep
from optim_ext._step.precision import KeptStep

# What every optimizer of torch takes besides.
FLAGS: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
}
# What every optimizer of this package takes besides.
ADDED = {
    each.name: each.replace(annotation=inspect.Parameter.empty)
    for layer in (LazyStep, KeptStep, NativeStep)
    for each in keywords_of(layer.__init__)
}
_TAKEN = {*FLAGS, *ADDED, "params", "self", "defaults"}
_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum")
_BELOW_ONE = ("beta*", "rho", "alpha")

Check = Callable[[Any], bool] | None


# In place of a number among the constants of a variant.
NUMBER = ...


def is_number(value: Any) -> bool:
    """Also a tensor with one element: a rate that a graph or a GPU holds."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float, Tensor)) or isinstance(value, numbers.Real)


@dataclass(frozen=True)
class Option:
    """One option. How many numbers it holds is settled by its default; without numbers it is compiled in."""

    name: str
    default: Any
    count: int | None  # of a tuple; None: it is one value
    is_fixed: bool  # a string or a truth value, which no number takes the place of

    def places(self) -> list[tuple[str, int | None]]:
        """Its numbers, as messages name them. An option that is None may be given as a number."""
        if self.count is not None:
            return [(self.name, index) for index in range(self.count)]
        return [] if self.is_fixed else [(self.name, None)]

    def constant_of(self, value: Any) -> Any:
        """What of a value is compiled in: all of a constant, nothing of a number."""
        return value if self.count is None and not is_number(value) else NUMBER


class Options:
    """All options of a rule, in the order of its signature."""

    def __init__(self, source: Source, check: Mapping[str, Check]) -> None:
        self.source, self.check = source, dict(check)
        defaults = source.function.__kwdefaults__ or {}
        self.all: list[Option] = []
        self.counts_steps = False
        for node in source.definition.args.kwonlyargs:
            if node.arg == "step":
                if "step" in defaults:
                    source.refuse(node, "step is the count of steps and has no default")
                self.counts_steps = True
                continue
            if node.arg in _TAKEN:
                source.refuse(node, f"every rule has {node.arg} already; give the option another name")
            if node.arg not in defaults:
                source.refuse(node, f"the option {node.arg} has no default")
            self.all.append(_option(source, node, defaults[node.arg]))
        for name in self.check.keys() - {option.name for option in self.all}:
            source.refuse(source.definition, f"check= names {name!r}, which is no option")
        for option in self.all:
            try:
                self._validate(option, option.default)
            except ValueError as error:
                source.refuse(
                    source.definition,
                    f"{error} is its own default; say what is allowed with check={{{option.name!r}: lambda x: ...}}, or None "
                    "for anything",
                )

    @property
    def defaults(self) -> dict[str, Any]:
        return {option.name: option.default for option in self.all}

    @property
    def places(self) -> list[tuple[str, int | None]]:
        """Every number of the options, in the order in which kernels take them."""
        return [place for option in self.all for place in option.places()]

    def signature(self) -> inspect.Signature:
        """That of the class."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        shown = [inspect.Parameter("params", kind)]
        shown += [inspect.Parameter(option.name, kind, default=option.default) for option in self.all]
        for name, default in FLAGS.items():
            shown.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
        return inspect.Signature([*shown, *ADDED.values()])

    def constants_of(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """What of a group's options is compiled in."""
        return tuple([option.constant_of(group[option.name]) for option in self.all])

    def numbers_of(
        self, group: Mapping[str, Any], entries: Callable[[Mapping[str, Any], str, int], tuple[Any, ...]]
    ) -> tuple[Any, ...]:
        """The others, in the order of `places`. entries: gives those of a tuple."""
        values: list[Any] = []
        for option in self.all:
            if option.count is not None:
                values.extend(entries(group, option.name, option.count))
            elif not option.is_fixed:
                values.append(group[option.name] if is_number(group[option.name]) else 0.0)
        return tuple(values)

    def in_graph(self, graph: Graph, constants: tuple[Any, ...]) -> dict[str, Item]:
        """What the names of the options stand for under these constants. The first number says which way is up."""
        items: dict[str, Item] = {}
        place = 1
        for option, constant in zip(self.all, constants, strict=True):
            count = len(option.places())
            values = tuple(graph.hyper(place + index) for index in range(count))
            place += count
            items[option.name] = (
                graph.constant(constant)
                if constant is not NUMBER
                else values
                if option.count is not None
                else values[0]
            )
        if self.counts_steps:
            items["step"] = graph.step()
        return items

    def with_constants(self, constants: tuple[Any, ...]) -> dict[str, Any]:
        """Options with these constants, and numbers as they are by default; 0.5 where the default is no number."""
        return {
            option.name: constant if constant is not NUMBER else option.default if option.default is not None else 0.5
            for option, constant in zip(self.all, constants, strict=True)
        }

    def validate(self, given: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError, as torch's constructors do, where an option is not what it may be."""
        for option in self.all:
            self._validate(option, given[option.name])

    def _validate(self, option: Option, value: Any) -> None:
        name = option.name
        if option.count is not None:
            if not isinstance(value, (tuple, list)) or not all(is_number(part) for part in value):
                raise TypeError(f"{name} is {value!r}, expected {option.count} numbers")
            if len(value) != option.count:
                raise ValueError(f"Invalid {name}: {value}, expected {option.count} values")
        elif option.is_fixed:
            if not isinstance(value, (bool, str)) and value is not None:
                raise TypeError(f"{name} is {value!r}, expected a value such as {option.default!r}")
            return
        elif value is None and option.default is None:
            return
        elif not is_number(value):
            raise TypeError(f"{name} is {value!r}, expected a number")
        for part in value if option.count is not None else (value,):
            if isinstance(part, Tensor) and part.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element")
        if name in self.check:
            allowed = self.check[name]
            if allowed is not None and not allowed(value):
                raise ValueError(f"Invalid {_shown(name)}: {value}")
        else:
            self._usual(option, value)

    def _usual(self, option: Option, value: Any) -> None:
        name = option.name
        parts = value if option.count is not None else (value,)
        for index, part in enumerate(parts):
            if isinstance(part, Tensor) and part.device.type != "cpu":
                continue  # which is not waited for
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in _BELOW_ONE):
                if not 0.0 <= part < 1.0:
                    where = f" parameter at index {index}" if option.count is not None else " value"
                    raise ValueError(f"Invalid {'beta' if name == 'betas' else name}{where}: {part}")
            elif name in _NOT_NEGATIVE:
                if not part >= 0.0:
                    raise ValueError(f"Invalid {_shown(name)}: {part}")
            elif math.isnan(part):
                raise ValueError(f"Invalid {_shown(name)}: {part}")


def _shown(name: str) -> str:
    return "learning rate" if name == "lr" else f"{name} value"


def _option(source: Source, node: Any, default: Any) -> Option:
    if isinstance(default, (bool, str)):
        return Option(node.arg, default, None, True)
    if default is None or (is_number(default) and not isinstance(default, Tensor)):
        return Option(node.arg, default, None, False)
    if isinstance(default, tuple) and default and all(is_number(part) for part in default):
        return Option(node.arg, default, len(default), False)
    source.refuse(
        node,
        f"the option {node.arg} is {default!r} by default; possible are numbers, tuples of numbers, truth values, strings and "
        "None",
    )


def numbers_named(places: list[tuple[str, int | None]]) -> Iterator[str]:
    """The numbers of options as C++ names."""
    for name, index in places:
        yield name if index is None else f"{name}_{index}"
