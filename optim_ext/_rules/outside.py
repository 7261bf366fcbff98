"""What the names in a rule stand for that are none of its own."""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Captured:
    """A number from outside of a rule, and how to find it again."""

    function: Callable[..., Any]
    path: tuple[str, ...]
    value: Any

    def is_unchanged(self) -> bool:
        try:
            now = resolve(self.function, self.path)
        except (NameError, AttributeError):
            return False
        return type(now) is type(self.value) and bool(now == self.value)


def resolve(function: Callable[..., Any], path: Sequence[str]) -> Any:
    """What a name in a function stands for that is none of its own."""
    name, *attributes = path
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name in cells:
        try:
            found = cells[name].cell_contents
        except ValueError:
            raise NameError(name) from None
    elif name in function.__globals__:
        found = function.__globals__[name]
    elif hasattr(builtins, name):
        found = getattr(builtins, name)
    else:
        raise NameError(name)
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def is_users(function: Any) -> bool:
    """Whether this is a Python function that may be looked into."""
    module = getattr(function, "__module__", None) or ""
    return isinstance(function, types.FunctionType) and module.partition(".")[0] not in ("torch", "optim_ext")
