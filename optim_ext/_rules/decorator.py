"""The decorator that makes an optimizer of a function."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

import torch

from optim_ext._rules.definition import Definition, Start
from optim_ext._rules.optimizer import RuleOptimizer
from optim_ext._rules.options import Check

BACKENDS = ("auto", "compiled", "interpreted", "torch")
Backend = Literal["auto", "compiled", "interpreted", "torch"]
Function = Callable[..., Any]


@overload
def rule(state: Function) -> type[RuleOptimizer]: ...


@overload
def rule(
    state: Iterable[str] | Mapping[str, Start] = ...,
    *,
    scalars: Mapping[str, float | str] = ...,
    state_dtype: torch.dtype | None = ...,
    check: Mapping[str, Check] = ...,
    backend: Backend = ...,
    source: str | None = ...,
) -> Callable[[Function], type[RuleOptimizer]]: ...


def rule(
    state: Any = (),
    *,
    scalars: Mapping[str, float | str] = {},
    state_dtype: torch.dtype | None = None,
    check: Mapping[str, Check] = {},
    backend: Backend = "auto",
    source: str | None = None,
) -> Any:
    """Make an optimizer class of a function that says what a step does to one element::

        @optim_ext.rule(state=("exp_avg",))
        def Tiger(param, grad, exp_avg, *, lr=1e-3, beta=0.965, weight_decay=0.01):
            exp_avg = beta * exp_avg + (1 - beta) * grad
            return param * (1 - lr * weight_decay) - lr * sign(exp_avg), exp_avg


        optimizer = Tiger(model.parameters(), lr=3e-4)

    The function takes the parameter, its gradient, its states and its scalars, in this order, and keyword-only options;
    it returns the new parameter, states and scalars. It is read, not run: the class steps natively from its first step on,
    without a compiler, and has everything the built-in classes have. Its language is described in docs/rules.md. With a
    keyword-only ``step`` without a default, it is given the count of steps, this one included. ``maximize`` comes by itself.

    Options that are numbers, or tuples of numbers, may change from step to step, by schedulers or in tensors. Options that
    are truth values, strings or None are compiled in.

    Args:
        state: the names of the states, each of its parameter's shape, which begin as zeros; or a dict from names to how they
            begin: a number, the name of an option, ``"param"`` (a copy), or a function of the parameter and its group.
        scalars: at most two numbers of each parameter, with their first values, or the names of the options that hold these.
        state_dtype: in which states are kept, by default that of their parameter.
        check: by option, a function that says whether a value is allowed, or None for anything. By default ``lr``, ``eps``,
            ``weight_decay`` and ``momentum`` are at least 0, and ``beta*``, ``betas``, ``rho`` and ``alpha`` in [0, 1).
        backend: ``"auto"`` interprets the rule at first, compiles it in the background where there is a compiler, and goes
            on with that, which changes speed only; the environment variable ``OPTIM_EXT_RULES`` says what else it is.
            ``"interpreted"`` never looks for a compiler, ``"compiled"`` waits for it and raises RuntimeError where it cannot,
            ``"torch"`` runs the function itself.
        source: the text of the function, where Python does not have it.

    Returns:
        A subclass of ``torch.optim.Optimizer`` of the function's name; its ``reference`` is the function.

    Raises:
        RuleError: the function cannot run natively. It is a SyntaxError that shows where the reason lies.
        ValueError: an unknown backend.
    """
    if inspect.isfunction(state):
        return rule()(state)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    states = (
        dict(state) if isinstance(state, Mapping) else dict.fromkeys((state,) if isinstance(state, str) else state, 0.0)
    )

    def decorate(function: Function) -> type[RuleOptimizer]:
        if not inspect.isfunction(function):
            raise TypeError(f"rule() decorates a function, found {function!r}")
        definition = Definition(function, states, scalars, state_dtype, check, _backend(backend), source)
        made = type(
            function.__name__,
            (RuleOptimizer,),
            {
                "__module__": function.__module__,
                "__qualname__": function.__qualname__,
                "__doc__": function.__doc__ or f"{function.__name__}, an optimizer made by optim_ext.rule.",
                "__signature__": definition.signature,
                "_op": definition.op,
                "_definition": definition,
                "reference": staticmethod(function),
            },
        )
        return made

    return decorate


def _backend(asked: str) -> str:
    said = os.environ.get("OPTIM_EXT_RULES") or "auto"
    if said not in BACKENDS:
        raise ValueError(f"OPTIM_EXT_RULES is {said!r}, expected one of {', '.join(BACKENDS)}")
    return said if asked == "auto" else asked
