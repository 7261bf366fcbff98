"""Keyword options that the layers of a native step add to the constructors of torch's classes.

A layer's constructor takes ``*args`` and ``**kwargs``, which it passes on, and between them its options. What it stands in
front of is the first constructor that says all its arguments. From these two the signature of a class follows, what
help() says of its options, and which one a misspelt keyword may have meant.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict


class PolicyOptions(TypedDict, total=False):
    """The options of every class."""

    max_norm: float | None
    norm_type: float
    skip_nonfinite: bool
    skip_above: float | None


class AddedOptions(PolicyOptions, total=False):
    """The options of every class whose step is a call of one op."""

    param_precision: str
    state_precision: str | Mapping[str, str]
    rounding_seed: int
    min_q8_size: int
    lazy_rows: bool


Constructor = Callable[..., Any]


def keywords_of(layer: Constructor) -> list[inspect.Parameter]:
    """The options that the constructor of a layer adds."""
    return [
        each for each in inspect.signature(layer).parameters.values() if each.kind is inspect.Parameter.KEYWORD_ONLY
    ]


def signature_of(cls: type) -> inspect.Signature:
    """The arguments of a class: those of the constructor its layers stand in front of, then what they add."""
    constructor, layers = _taken_apart(cls)
    _, *own = inspect.signature(constructor).parameters.values()
    shown = [each for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([*shown, *(each for layer in layers for each in keywords_of(layer))])


def documented(cls: type, signature: inspect.Signature) -> str:
    """One line for each layer whose options are among the arguments of a class."""
    lines = ""
    for layer in _taken_apart(cls)[1]:
        names = [each.name for each in keywords_of(layer)]
        if layer.__doc__ is not None and names and all(name in signature.parameters for name in names):
            listed = ", ".join(f"``{name}``" for name in names)
            lines += f"* Arguments {listed}: {' '.join(layer.__doc__.split())}\n"
    return lines


def refuse_unknown(cls: type, given: Iterable[str]) -> None:
    """Raise TypeError if a keyword is no option of the class, with the one that is nearest."""
    signatures = ((base, base.__dict__.get("__signature__")) for base in cls.__mro__)
    native, signature = next((base, said) for base, said in signatures if isinstance(said, inspect.Signature))
    taken = [name for name in signature.parameters if name != "params"]
    for name in given:
        if name not in signature.parameters:
            near = difflib.get_close_matches(name, taken, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(taken)}"
            raise TypeError(f"{native.__name__}() got an unexpected keyword argument {name!r}; {hint}") from None


def _taken_apart(cls: type) -> tuple[Constructor, list[Constructor]]:
    """The constructor that says all its arguments, and those of the layers, in the order in which they are called."""
    said: list[Constructor] = []
    layers: list[Constructor] = []
    for base in cls.__mro__[:-1]:  # the last one is object
        constructor = base.__dict__.get("__init__")
        if constructor is not None:
            kinds = {each.kind for each in inspect.signature(constructor).parameters.values()}
            (layers if inspect.Parameter.VAR_POSITIONAL in kinds else said).append(constructor)
    return said[0], layers
