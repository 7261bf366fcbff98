"""Which functions a rule may call. A callee is resolved as an object, so that any name for it will do."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import optim_ext.math


@dataclass(frozen=True)
class Word:
    """One way to say an operation: torch's functions take tensors only, and Python's numbers only, where the function of a
    rule runs as it stands."""

    op: str
    arity: int
    takes: str = "both"  # "both", "elements" or "numbers"
    # Of torch's functions of several tensors: which arguments cannot be numbers.
    elements: tuple[int, ...] = ()


_ARITY = {
    "sqrt": ("root", 1),
    "exp": ("exponential", 1),
    "log": ("logarithm", 1),
    "sign": ("sign", 1),
    "abs": ("magnitude", 1),
    "square": ("square", 1),
    "minimum": ("smaller", 2),
    "maximum": ("larger", 2),
    "clamp": ("clamp", 3),
    "lerp": ("lerp", 3),
    "where": ("where", 3),
}
_OF_WHOLE_TENSORS = {"norm": ("norm", 1), "rms": ("rms", 1)}
_OF_TENSORS = {"minimum": (0, 1), "maximum": (0, 1), "clamp": (0,), "lerp": (0, 1), "where": (0,)}

_WORDS: list[tuple[Callable[..., Any], Word]] = [
    *((getattr(optim_ext.math, name), Word(*_ARITY[name])) for name in _ARITY if name != "abs"),
    *((getattr(optim_ext.math, name), Word(*word)) for name, word in _OF_WHOLE_TENSORS.items()),
    *((getattr(torch, name), Word(*_ARITY[name], "elements", _OF_TENSORS.get(name, (0,)))) for name in _ARITY),
    (torch.clip, Word("clamp", 3, "elements", (0,))),
    (torch.absolute, Word("magnitude", 1, "elements", (0,))),
    *((getattr(math, name), Word(*_ARITY[name], "numbers")) for name in ("sqrt", "exp", "log")),
    (math.fabs, Word("magnitude", 1, "numbers")),
    (builtins.abs, Word("magnitude", 1)),
    (builtins.min, Word("smaller", 2, "numbers")),
    (builtins.max, Word("larger", 2, "numbers")),
    (builtins.float, Word("float", 1, "numbers")),
]
_BY_ID = {id(function): word for function, word in _WORDS}

METHODS = {
    name: Word(op, arity, "elements", _OF_TENSORS.get(name, (0,)))
    for name, (op, arity) in _ARITY.items()
    if name != "where"
}
POSSIBLE = f"{', '.join(sorted(_ARITY))}, and of whole tensors {' and '.join(_OF_WHOLE_TENSORS)} of optim_ext.math"


def word_for(function: Any) -> Word | None:
    return _BY_ID.get(id(function))
