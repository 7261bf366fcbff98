"""From the graph of a rule to the code of the native interpreter (csrc/kernels/interpret.h)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from optim_ext._rules.language import Translation
from optim_ext._rules.values import NORMS, Kind, Value, reachable

GRAD = 1
MOST_REGISTERS = 64

Instruction = tuple[str, int, int, int, int]


@dataclass
class Masks:
    """Which of the operands take part. A state that is only passed through does not."""

    used: int = 0
    updates: int = 0


def masks_of(translation: Translation) -> Masks:
    masks = Masks()
    changed = [
        value for place, value in enumerate(translation.operands) if not _is_operand(value, place) and place != GRAD
    ]
    for value in reachable([*changed, *translation.scalars], past_norms=True):
        if value.op == "operand":
            masks.used |= 1 << value.payload
    for place, value in enumerate(translation.operands):
        if place != GRAD and not _is_operand(value, place):
            masks.updates |= 1 << place
    masks.used |= masks.updates | 0b11  # every rule has a parameter and its gradient
    return masks


def _is_operand(value: Value, place: int) -> bool:
    return value.op == "operand" and value.payload == place


def changed_operands(translation: Translation) -> dict[int, Value]:
    """The new value of each operand that a step changes."""
    return {
        place: value
        for place, value in enumerate(translation.operands)
        if place != GRAD and not _is_operand(value, place)
    }


def fields_of(translation: Translation) -> list[Value]:
    """The uniform values that meet elements: what is rounded to their type."""
    found: dict[int, Value] = {}
    changed = changed_operands(translation).values()
    for value in reachable(changed):
        for arg in value.args if value.kind == Kind.element else ():
            if arg.kind == Kind.uniform:
                found.setdefault(arg.number, arg)
    for value in changed:
        if value.kind == Kind.uniform:
            found.setdefault(value.number, value)
    return list(found.values())


def norms_of(translation: Translation) -> list[Value]:
    """The norms a rule takes, in the order in which kernels are given them."""
    found = reachable([*changed_operands(translation).values(), *translation.scalars])
    return [value for value in found if value.op in NORMS]


def places_of_norms(translation: Translation) -> list[int]:
    """Which operand each norm is of. What is no operand itself is made into one, after those of the rule."""
    made: dict[int, int] = {}
    places = []
    for norm in norms_of(translation):
        (of,) = norm.args
        new = len(translation.operands) + len(made)
        places.append(of.payload if of.op == "operand" else made.setdefault(of.number, new))
    return places


def for_norms(translation: Translation) -> Translation | None:
    """The rule of the first sweep, which makes what norms are taken of; nothing where all of that is in memory."""
    count = len(translation.operands)
    of = {
        place: norm.args[0]
        for norm, place in zip(norms_of(translation), places_of_norms(translation), strict=True)
        if place >= count
    }
    if not of:
        return None
    unchanged = [translation.graph.operand(place) for place in range(count)]
    scalars = [translation.graph.scalar(place) for place in range(len(translation.scalars))]
    return replace(translation, operands=[*unchanged, *(of[place] for place in sorted(of))], scalars=scalars)


def code_of(translation: Translation, hypers: list[tuple[str, int | None]], counts: bool) -> dict[str, Any]:
    """What _C.define_rule takes, without names. hypers: all numbers, the first of which says which way is up."""
    masks, fields = masks_of(translation), fields_of(translation)
    norms, first = norms_of(translation), for_norms(translation)
    uniform = _Uniform(len(hypers), len(translation.scalars), norms)
    uniform.add(reachable([*fields, *translation.scalars]))
    tile = _Tile(len(translation.operands), {value.number: index for index, value in enumerate(fields)})
    tile.add(changed_operands(translation))
    return {
        "operands": len(translation.operands),
        "scalars": len(translation.scalars),
        "norms": [(norm.op, place) for norm, place in zip(norms, places_of_norms(translation), strict=True)],
        "for_norms": None if first is None else code_of(first, hypers, counts),
        "hypers": hypers,
        "counts": counts,
        "used": masks.used,
        "updates": masks.updates,
        "constants": uniform.constants,
        "uniform": uniform.code,
        "fields": [uniform.register[value.number] for value in fields],
        "scalar_results": [uniform.register[value.number] for value in translation.scalars],
        "uniform_registers": uniform.count,
        "tile": tile.code,
        "temporaries": tile.temporaries,
        "shared": tile.shared,
        "values": [(value.text or value.op, value.line) for value in (*fields, *translation.scalars)],
    }


def _instruction(op: str, to: int, registers: list[int]) -> Instruction:
    """With the first register in place of those that it does not read."""
    a, b, c = [*registers, registers[0], registers[0]][:3]
    return op, to, a, b, c


class _Uniform:
    """Code in double. Every value has a register of its own."""

    def __init__(self, hypers: int, scalars: int, norms: list[Value]) -> None:
        self.hypers, self.scalars, self.norms = hypers, scalars, norms
        self.constants: list[float] = []
        self.code: list[Instruction] = []
        self.register: dict[int, int] = {}
        self.count = 0

    def add(self, values: list[Value]) -> None:
        first_norm = self.hypers + 1 + self.scalars
        first_constant = first_norm + len(self.norms)
        for value in values:
            if value.kind == Kind.constant:
                self.register[value.number] = first_constant + len(self.constants)
                self.constants.append(float(value.payload))
        self.count = first_constant + len(self.constants)
        for value in values:
            if value.op == "constant":
                continue
            if value.op == "hyper":
                self.register[value.number] = value.payload
            elif value.op == "step":
                self.register[value.number] = self.hypers
            elif value.op == "scalar":
                self.register[value.number] = self.hypers + 1 + value.payload
            elif value.op in NORMS:
                self.register[value.number] = first_norm + self.norms.index(value)
            else:
                args = [self.register[arg.number] for arg in value.args]
                if value.op == "rounded":
                    args.append(value.payload)
                self.code.append(_instruction(value.op, self.count, args))
                self.register[value.number] = self.count
                self.count += 1


@dataclass
class _Step:
    """An instruction before it is known where its values are."""

    op: str
    result: Value
    args: list[Value] = field(default_factory=list)


class _Tile:
    """Code over tiles. Where the new value of an operand is made when nobody reads the old one any more, it is made in its
    place; everything else is in temporaries, as few as will do."""

    def __init__(self, operands: int, fields: dict[int, int]) -> None:
        self.operands, self.fields = operands, fields
        self.code: list[Instruction] = []
        self.temporaries = 0
        self.shared: list[tuple[int, float]] = []
        self._shared_of: dict[int, int] = {}  # by value, among `shared`

    def add(self, changed: dict[int, Value]) -> None:
        steps = _selected(list(changed.values()))
        last_use: dict[int, int] = {}  # by value: the last step that reads it
        for index, step in enumerate(steps):
            for arg in step.args:
                last_use[arg.number] = index
        at_the_end = len(steps)
        in_place = self._in_place(steps, changed, last_use)
        for place, value in changed.items():
            if in_place.get(value.number) != place:
                last_use[value.number] = at_the_end
        place_of: dict[int, int] = {}  # registers by value; those of temporaries count from self.operands
        free: list[int] = []
        code: list[tuple[str, int, list[int | Value]]] = []
        for index, step in enumerate(steps):
            where: list[int | Value] = [self._source(arg, place_of) for arg in step.args]
            for read in {arg.number for arg in step.args}:
                if last_use[read] == index and read in place_of and place_of[read] >= self.operands:
                    free.append(place_of[read])
            if step.result.number in in_place:
                to = in_place[step.result.number]
            elif free:
                to = free.pop()
            else:
                to = self.operands + self.temporaries
                self.temporaries += 1
            place_of[step.result.number] = to
            code.append((step.op, to, where))
        code += self._moves(changed, in_place, place_of)
        first_shared = self.operands + self.temporaries
        for op, to, where_from in code:
            registers = [first_shared + self._shared(at) if isinstance(at, Value) else at for at in where_from]
            self.code.append(_instruction(op, to, registers))

    @property
    def registers(self) -> int:
        return self.operands + self.temporaries + len(self.shared)

    def _in_place(self, steps: list[_Step], changed: dict[int, Value], last_use: dict[int, int]) -> dict[int, int]:
        """Which values are made where an operand is, by value: its place."""
        made = {step.result.number: index for index, step in enumerate(steps)}
        moved = {value.payload for value in changed.values() if value.op == "operand"}  # read at the end
        operand = {arg.payload: arg.number for step in steps for arg in step.args if arg.op == "operand"}
        found: dict[int, int] = {}
        for place, value in changed.items():
            if value.number not in made or value.number in found or place in moved:
                continue
            old = operand.get(place)
            if old is None or last_use[old] <= made[value.number]:
                found[value.number] = place
        return found

    def _source(self, value: Value, place_of: dict[int, int]) -> int | Value:
        """A register, or the value itself where it is shared by all elements."""
        if value.kind != Kind.element:
            return value
        return value.payload if value.op == "operand" else place_of[value.number]

    def _shared(self, value: Value) -> int:
        if value.number not in self._shared_of:
            self._shared_of[value.number] = len(self.shared)
            self.shared.append(
                (-1, float(value.payload)) if value.kind == Kind.constant else (self.fields[value.number], 0.0)
            )
        return self._shared_of[value.number]

    def _moves(
        self, changed: dict[int, Value], in_place: dict[int, int], place_of: dict[int, int]
    ) -> list[tuple[str, int, list[int | Value]]]:
        """What is left to be put into its place: everything at once, so that two operands can change places."""
        pending = {
            place: self._source(value, place_of)
            for place, value in changed.items()
            if in_place.get(value.number) != place
        }
        code: list[tuple[str, int, list[int | Value]]] = []
        while pending:
            ready = next((to for to in pending if to not in pending.values()), None)
            if ready is None:
                to = next(iter(pending))
                aside = self.operands + self.temporaries
                self.temporaries += 1
                code.append(("copy", aside, [to]))
                pending = {place: aside if source == to else source for place, source in pending.items()}
                ready = to
            code.append(("copy", ready, [pending.pop(ready)]))
        return code


def _selected(results: list[Value]) -> list[_Step]:
    """The instructions for these values: products that are only added to something are part of the sum."""
    values = [value for value in reachable(results) if value.kind == Kind.element]
    uses: dict[int, int] = {}
    for value in results:
        uses[value.number] = uses.get(value.number, 0) + 1
    for value in values:
        for arg in value.args:
            uses[arg.number] = uses.get(arg.number, 0) + 1
    steps: dict[int, _Step] = {}
    merged: set[int] = set()

    def is_product(value: Value) -> bool:
        return value.kind == Kind.element and value.op == "multiply" and uses[value.number] == 1

    for value in values:
        if value.op == "operand":
            continue
        op, args = value.op, list(value.args)
        if op == "select" and args[0].kind != Kind.element:
            op = "choose"
        elif op == "lerp" and args[2].kind != Kind.element:
            op = "lerp_by"
        elif op in ("add", "subtract"):
            a, b = args
            if is_product(b):
                op = "multiply_add" if op == "add" else "subtract_product"
                args, product = [*b.args, a], b
            elif is_product(a):
                op = "multiply_add" if op == "add" else "multiply_subtract"
                args, product = [*a.args, b], a
            else:
                product = None
            if product is not None:
                merged.add(product.number)
        steps[value.number] = _Step(op, value, args)
    return [step for number, step in steps.items() if number not in merged]
