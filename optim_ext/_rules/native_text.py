"""From the graph of a rule to C++: the struct that csrc/rules are written in, and the unit that compiles it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import NamedTuple

from optim_ext._rules.bytecode import GRAD, changed_operands, fields_of, for_norms, masks_of, norms_of
from optim_ext._rules.language import Translation
from optim_ext._rules.values import Kind, Value, reachable

_RESERVED = set(
    """alignas alignof and and_eq asm auto bitand bitor bool break case catch char class compl concept const consteval
    constexpr const_cast continue co_await co_return co_yield decltype default delete do double dynamic_cast else enum
    explicit export extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr
    operator or or_eq private protected public register reinterpret_cast requires return short signed sizeof static
    static_assert static_cast struct switch template this thread_local throw true try typedef typeid typename union
    unsigned using virtual void volatile wchar_t while xor xor_eq rule code ascent Rule V Scalar scalars root power sign
    magnitude smaller larger lerp exponential logarithm whole_power real_power rounded operand_bit all_operands ForNorms written""".split()
)
_SYMBOLS = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "divide": "/",
    "less": "<",
    "less_equal": "<=",
    "equal": "==",
    "not_equal": "!=",
}


class _Names:
    def __init__(self) -> None:
        self.taken = set(_RESERVED)

    def new(self, wish: str) -> str:
        wish = re.sub(r"[^0-9A-Za-z_]", "_", wish).strip("_") or "value"
        wish = re.sub(r"__+", "_", f"v{wish}" if wish[0].isdigit() else wish)
        name, count = wish, 1
        while name in self.taken:
            count += 1
            name = f"{wish}_{count}"
        self.taken.add(name)
        return name


class _Writer(ABC):
    """Writes values of one kind as statements and expressions: what is used once and has no name is written where it is
    used."""

    def __init__(self, translation: Translation, names: _Names, kind: Kind, known: dict[int, str]) -> None:
        self.names, self.kind, self.known = names, kind, dict(known)
        self.wishes = translation.graph.names
        self.lines: list[str] = []

    def write(self, results: list[Value]) -> None:
        values = [value for value in reachable(results) if value.kind == self.kind]
        uses: dict[int, int] = {}
        for value in values:
            for arg in value.args:
                uses[arg.number] = uses.get(arg.number, 0) + 1
        for value in results:
            uses[value.number] = uses.get(value.number, 0) + 2
        for value in values:
            if value.number in self.known:
                continue
            text = self.formula(value)
            if uses[value.number] > 1 or value.number in self.wishes:
                name = self.names.new(self.wishes.get(value.number, "value"))
                type_name = "bool" if value.is_truth else "V" if self.kind == Kind.element else "double"
                self.lines.append(f"const {type_name} {name} = {text};")
                text = name
            self.known[value.number] = text

    @abstractmethod
    def expression(self, value: Value) -> str:
        """A number, as C++."""

    @abstractmethod
    def condition(self, value: Value) -> str:
        """A truth value, as C++."""

    def formula(self, value: Value) -> str:
        args = value.args
        if value.op in _SYMBOLS:
            return f"({self.expression(args[0])} {_SYMBOLS[value.op]} {self.expression(args[1])})"
        if value.op == "negate":
            return f"(-{self.expression(args[0])})"
        if value.op == "select":
            return f"({self.condition(args[0])} ? {self.expression(args[1])} : {self.expression(args[2])})"
        if value.op in ("both", "either"):
            return f"({self.condition(args[0])} {'&' if value.op == 'both' else '|'} {self.condition(args[1])})"
        if value.op == "none":
            return f"(!{self.condition(args[0])})"
        if value.op == "rounded":
            return f"rounded({self.expression(args[0])}, scalars[{value.payload}].is_double)"
        return f"{value.op}({', '.join(self.expression(arg) for arg in args)})"


class _Uniforms(_Writer):
    def expression(self, value: Value) -> str:
        if value.kind == Kind.constant:
            return number(value.payload)
        text = self.known[value.number]
        return f"({text} ? 1.0 : 0.0)" if value.is_truth else text

    def condition(self, value: Value) -> str:
        if value.kind == Kind.constant:
            return "true" if value.payload else "false"
        return self.known[value.number]


class _Elements(_Writer):
    fields: dict[int, str]

    def expression(self, value: Value) -> str:
        if value.kind == Kind.constant:
            return f"V({number(value.payload)})"
        if value.kind == Kind.uniform:
            return f"V({self.fields[value.number]})"
        return self.known[value.number]

    def condition(self, value: Value) -> str:
        if value.kind == Kind.constant:
            return "true" if value.payload else "false"
        if value.kind == Kind.uniform:
            return f"(V({self.fields[value.number]}) != V(0))"
        return self.known[value.number]


def number(value: float) -> str:
    """A double as C++ reads it back."""
    value = float(value)
    if value != value:
        return '__builtin_nan("")'
    if value in (float("inf"), float("-inf")):
        return "__builtin_inf()" if value > 0 else "(-__builtin_inf())"
    text = repr(value)
    text = text if "." in text or "e" in text else f"{text}.0"
    return f"({text})" if text.startswith("-") else text


def struct_of(translation: Translation, title: str, operands: list[str], hypers: list[str], scalars: list[str]) -> str:
    """The rule as C++: hypers and fields lie as the interpreter has them. hypers: without the first one. Before it that of
    its first sweep, where there is one."""
    first = for_norms(translation)
    if first is None:
        return _struct_of(translation, "Rule", title, operands, hypers, scalars)
    made = [f"of_norm_{place}" for place in range(len(first.operands) - len(operands))]
    what = f"{title}: what norms are taken of"
    return "\n".join(
        [
            _struct_of(first, "ForNorms", what, [*operands, *made], hypers, scalars),
            _struct_of(translation, "Rule", title, operands, hypers, scalars, has_first=True),
        ]
    )


def _struct_of(
    translation: Translation,
    name: str,
    title: str,
    operands: list[str],
    hypers: list[str],
    scalars: list[str],
    has_first: bool = False,
) -> str:
    names, masks, norms = _Names(), masks_of(translation), norms_of(translation)
    members = [names.new(name) for name in hypers]
    arguments = [names.new(name) for name in operands]
    befores = [names.new(f"{scalar}_before") for scalar in scalars]
    measured = [names.new(f"{norm.op}_of_{_name_of(norm.args[0], translation, operands)}") for norm in norms]
    changed, fields = changed_operands(translation), fields_of(translation)
    every = reachable([*changed.values(), *translation.scalars])
    inputs: dict[int, str] = {}
    for value in every:
        if value.op == "hyper":
            inputs[value.number] = members[value.payload - 1]
        elif value.op == "step":
            inputs[value.number] = "step"
        elif value.op == "scalar":
            inputs[value.number] = befores[value.payload]
    inputs.update((norm.number, called) for norm, called in zip(norms, measured, strict=True))
    field_names = {
        value.number: names.new(f"{translation.graph.names.get(value.number, 'shared')}_of_step") for value in fields
    }
    uniforms = _Uniforms(translation, names, Kind.uniform, inputs)
    uniforms.write([*fields, *translation.scalars])
    # Every operand is read before one is written.
    elements = _Elements(translation, names, Kind.element, {})
    elements.fields = field_names
    reads = []
    for value in every:
        if value.op == "operand":
            old = names.new(f"{operands[value.payload]}_before")
            turned = " * V(ascent)" if value.payload == GRAD else ""
            reads.append(f"const V {old} = {arguments[value.payload]}{turned};")
            elements.known[value.number] = old
    elements.write(list(changed.values()))
    writes = [f"{arguments[place]} = {elements.expression(value)};" for place, value in changed.items()]
    numbers = [*befores, *measured]
    at_step = [f"const double {called} = scalars[{place}].value;" for place, called in enumerate(numbers)]
    at_step += uniforms.lines
    at_step += [f"rule.{field_names[value.number]} = {uniforms.expression(value)};" for value in fields]
    at_step += [
        f"scalars[{place}].value = {uniforms.expression(value)};" for place, value in enumerate(translation.scalars)
    ]
    made = [f"  double {', '.join(field_names.values())};  // made by at_step"] if fields else []
    counted = (
        [f"  static constexpr int kScalars = {len(numbers)};  // {', '.join([*scalars, *measured])}"] if numbers else []
    )
    counted += ["  static constexpr bool kMeasured = true;"] if norms and not scalars else []
    counted += ["  using ForNorms = written::ForNorms;  // swept before"] if has_first else []
    return "\n".join(
        [
            f"// {title}",
            f"struct {name} {{",
            f"  static constexpr int kOperands = {len(operands)};  // {', '.join(operands)}",
            f"  static constexpr unsigned kUsed = {masks.used:#x}, kUpdates = {masks.updates:#x};",
            *counted,
            "",
            "  const void* code;  // of the interpreter",
            f"  double {', '.join(['ascent', *members])};",
            *made,
            "",
            f"  OPTIM_EXT_RULE {name} at_step([[maybe_unused]] double step{', Scalar* scalars' if numbers else ''}) const {{",
            f"    {name} rule = *this;",
            *(f"    {line}" for line in at_step),
            "    return rule;",
            "  }",
            "",
            "  template <class V>",
            "  OPTIM_EXT_RULE void operator()("
            + ", ".join(
                f"[[maybe_unused]] {'V' if place == GRAD else 'V&'} {argument}"
                for place, argument in enumerate(arguments)
            )
            + ") const {",
            *(f"    {line}" for line in (*reads, *elements.lines, *writes)),
            "  }",
            "};",
            "",
        ]
    )


def _name_of(value: Value, translation: Translation, operands: list[str]) -> str:
    return operands[value.payload] if value.op == "operand" else translation.graph.names.get(value.number, "value")


def unit_of(struct: str, isa: str) -> str:
    """The C++ file that compiles a rule for one instruction set."""
    return f"""#define OPTIM_EXT_ONLY_{isa.upper()}
#include "kernels/cpu/one_rule.h"

namespace optim_ext::written {{

using namespace rules;

{struct}
}}  // namespace optim_ext::written

OPTIM_EXT_EXPORT_RULE(optim_ext::written::Rule)
"""


class Kernels(NamedTuple):
    """One kind of the kernels of a rule for CUDA, each compiled by itself: most programs need one."""

    in_double: bool
    averaging: bool  # of steps that also average their parameters
    kept: bool = False  # of parameters and state that are kept in another way than the rule sees them

    @property
    def name(self) -> str:
        prefix = f"{'kept_' if self.kept else ''}{'averaging_' if self.averaging else ''}"
        return f"optim_ext_{prefix}sweep_{'double' if self.in_double else 'float'}"


# In the order in which the native module takes them.
KINDS_OF_KERNELS = [
    *(Kernels(in_double, averaging) for averaging in (False, True) for in_double in (False, True)),
    *(Kernels(False, averaging, kept=True) for averaging in (False, True)),
]


def cuda_unit_of(struct: str, rule_bytes: int, kind: Kernels = KINDS_OF_KERNELS[0]) -> str:
    """The file with the kernels of a rule for CUDA."""
    numbers, averaged = "double" if kind.in_double else "float", "true" if kind.averaging else "false"
    rule, kept = "optim_ext::written::Rule", "KEPT_" if kind.kept else ""
    sweep = ", ".join([kind.name, rule, *([] if kind.kept else [numbers]), averaged])
    return f"""#include "kernels/cuda/{"one_kept_rule" if kind.kept else "one_rule"}.h"

namespace optim_ext::written {{

using namespace rules;

{struct}
}}  // namespace optim_ext::written

OPTIM_EXT_EXPORT_{kept}SWEEP({sweep})
OPTIM_EXT_EXPORT_{kept}ADVANCE({rule}, {rule_bytes})
"""
