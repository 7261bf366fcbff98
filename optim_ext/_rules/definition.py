"""A rule as its decorator has it: the function, its state and its options, and the variants it has been translated to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from optim_ext._load import _C
from optim_ext._rules.bytecode import MOST_REGISTERS, code_of
from optim_ext._rules.errors import Source
from optim_ext._rules.language import MOST_SCALARS, MOST_STATES, Reader, Translation
from optim_ext._rules.native_text import Kernels, struct_of
from optim_ext._rules.options import Check, Options, numbers_named
from optim_ext._rules.values import Graph
from optim_ext._tables import TABLES, OpTable

# How a state begins: a number, the name of the option that holds it, "param", or a function of parameter and group.
Start = float | str | Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


@dataclass(eq=False)
class Variant:
    """A rule with one set of constants compiled in."""

    definition: Definition
    constants: tuple[Any, ...]
    translation: Translation
    struct: str  # in C++
    name: str  # what is in it, as a hash
    number: int  # of the native module
    used: tuple[bool, ...]  # by state
    rule_bytes: int  # of the struct
    norms: tuple[int, ...] = ()  # the operands, or what is made like them, of which norms are taken
    compiled: bool = False  # what it is run by has been compiled for it
    problem: str | None = None  # why it has not
    # Of GPUs: what was compiled, by architecture and kind; what of it is loaded, by index; and why what was to be loaded is not.
    images: dict[tuple[int, Kernels], bytes] = field(default_factory=dict)
    on_gpus: dict[int | None, frozenset[Kernels]] = field(default_factory=dict)
    gpu_problems: dict[tuple[torch.device, frozenset[Kernels]], str] = field(default_factory=dict)

    @property
    def has_norms(self) -> bool:
        return bool(self.norms)

    @property
    def state_keys(self) -> tuple[str | None, ...]:
        """Of each list after the gradients, in the order of the op."""
        keys = [key if there else None for key, there in zip(self.definition.states, self.used, strict=True)]
        return (*keys, *self.definition.scalars, *(["step"] if self.definition.options.counts_steps else []))


class Definition:
    def __init__(
        self,
        function: Callable[..., Any],
        states: Mapping[str, Start],
        scalars: Mapping[str, float | str],
        state_dtype: torch.dtype | None,
        check: Mapping[str, Check],
        backend: str,
        source: str | None,
    ) -> None:
        self.function, self.states, self.scalars = function, dict(states), dict(scalars)
        self.state_dtype, self.backend = state_dtype, backend
        self.name = function.__name__
        self.source = Source(function, source)
        self.options = Options(self.source, check)
        self.signature = self.options.signature()
        self.operands = self._operands()
        self._lock = threading.RLock()
        self._variants: dict[tuple[Any, ...], list[Variant]] = {}
        self.translate(self.options.constants_of(self.options.defaults))
        roles = [
            *((key, "operand") for key in self.states),
            *((key, "scalar") for key in self.scalars),
            *([("step", "steps")] if self.options.counts_steps else []),
        ]
        self.op, table = _C.define_rule_op(self.name, roles, self.options.places)
        TABLES[self.op] = OpTable(table)
        self.index = len(DEFINITIONS)
        DEFINITIONS.append(self)

    def _operands(self) -> list[str]:
        """The names of parameter, gradient and states, as the function takes them."""
        source, arguments = self.source, self.source.definition.args
        refuse = source.refuse
        if arguments.vararg or arguments.kwarg:
            refuse(arguments.vararg or arguments.kwarg, "*args and **kwargs are not possible in a rule")
        if arguments.defaults:
            refuse(arguments.defaults[0], "options follow a `*`: they are given by keyword")
        positional = [*arguments.posonlyargs, *arguments.args]
        names = [argument.arg for argument in positional]
        wanted = [*self.states, *self.scalars]
        if len(self.states) > MOST_STATES:
            refuse(
                source.definition,
                f"has {len(self.states)} states ({', '.join(self.states)}), and kernels take at most {MOST_STATES}",
            )
        if len(self.scalars) > MOST_SCALARS:
            refuse(
                source.definition,
                f"has {len(self.scalars)} scalars ({', '.join(self.scalars)}), and kernels take at most {MOST_SCALARS}",
            )
        if len(names) < 2 or names[2:] != wanted:
            expected = ", ".join(["param", "grad", *wanted])
            refuse(
                positional[2] if len(names) > 2 else source.definition,
                f"takes ({', '.join(names)}), expected ({expected}): what state= and scalars= say, in their order",
            )
        options = {option.name for option in self.options.all}
        for name in wanted:
            if name == "step" or name in self.options.defaults or wanted.count(name) > 1:
                refuse(source.definition, f"the state {name!r} needs a name of its own")
        for name, start in self.states.items():
            if isinstance(start, str) and start != "param" and start not in options:
                refuse(
                    source.definition, f"the state {name!r} starts as {start!r}, which is no option, and not 'param'"
                )
        for name, first in self.scalars.items():
            if isinstance(first, str) and first not in options:
                refuse(source.definition, f"the scalar {name!r} starts as {first!r}, which is no option")
        return names[: 2 + len(self.states)]

    def first_scalars(self, group: Mapping[str, Any]) -> list[float]:
        """The scalars of a parameter as they begin."""
        return [float(group[first] if isinstance(first, str) else first) for first in self.scalars.values()]

    def translate(self, constants: tuple[Any, ...]) -> Translation:
        graph = Graph()
        reader = Reader(self.source, graph, self.operands, list(self.scalars))
        translation = reader.read(self.options.in_graph(graph, constants))
        code = self._code(translation)
        for each in (code, code["for_norms"]):
            registers = each["operands"] + each["temporaries"] + len(each["shared"]) if each is not None else 0
            if registers > MOST_REGISTERS:
                self.source.refuse(
                    self.source.definition,
                    f"computes with {registers} values at a time, and kernels have room for {MOST_REGISTERS}",
                )
        return translation

    def _code(self, translation: Translation) -> dict[str, Any]:
        hypers: list[tuple[str, int | None]] = [("maximize", None), *self.options.places]
        return code_of(translation, hypers, self.options.counts_steps)

    def variant(self, constants: tuple[Any, ...]) -> Variant:
        """The variant for these constants and for what the rule finds outside of it now.

        Raises:
            RuleError: the rule cannot be translated, or what it was translated to differs from the function.
        """
        with self._lock:
            known = self._variants.setdefault(constants, [])
            for variant in known:
                if all(captured.is_unchanged() for captured in variant.translation.captured):
                    return variant
            made = self._make(constants)
            known.append(made)
            return made

    def _make(self, constants: tuple[Any, ...]) -> Variant:
        from optim_ext._rules.self_check import check_variant

        translation = self.translate(constants)
        code = self._code(translation)
        numbers = list(numbers_named(self.options.places))
        struct = struct_of(translation, self.name, self.operands, numbers, list(self.scalars))
        content = "\0".join(
            [struct, repr(code["norms"]), self.backend, *self.states, *self.scalars, str(self.options.counts_steps)]
        )
        name = hashlib.sha256(content.encode()).hexdigest()[:32]
        used = tuple(bool(code["used"] >> (2 + place) & 1) for place in range(len(self.states)))
        number = _C.define_rule(name, {**code, "lists": [*self.states, *self.scalars]})
        rule_bytes = 8 * (1 + len(code["hypers"]) + len(code["fields"]))
        norms = tuple(place for _, place in code["norms"])
        variant = Variant(self, constants, translation, struct, name, number, used, rule_bytes, norms)
        if self.backend != "torch":
            check_variant(variant, variant.name)
        return variant


DEFINITIONS: list[Definition] = []


def state_keys_of(index: int, constants: tuple[Any, ...]) -> tuple[str | None, ...]:
    return DEFINITIONS[index].variant(constants).state_keys


def constant_while_tracing(function: Callable[..., Any]) -> None:
    """Have torch.compile call a function while it traces, and take the result as a constant. (Torch's own decorator for
    that imports the compiler.)"""
    vars(function)["_dynamo_marked_constant"] = True


constant_while_tracing(state_keys_of)


def arranged(states: Sequence[Any], scalars: Sequence[Any], empty: Callable[[], Any]) -> list[Any]:
    """Lists of state as the op takes them, after parameters and gradients."""
    return [
        *states,
        *(empty() for _ in range(MOST_STATES - len(states))),
        *scalars,
        *(empty() for _ in range(MOST_SCALARS - len(scalars))),
    ]
