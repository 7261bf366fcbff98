"""What a rule was translated to, against the function itself: before the first step, and after each load."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from optim_ext._precision import values as precision_values
from optim_ext._precision.options import CODES, ROUNDING_KEY, SCALE, TWINS, Keeping, has_no_sign
from optim_ext._rules.errors import RuleError

if TYPE_CHECKING:
    from optim_ext._rules.definition import Definition, Variant
    from optim_ext._rules.native_text import Kernels

_ELEMENTS, _STEPS = 257, 4
_CLOSE = 1e-9
_IN_PLACE_OF_ZERO = 0.01
_CPU = torch.device("cpu")
_IN_FLOAT = torch.float32, torch.bfloat16, torch.float16  # the types whose numbers kernels compute in float


def check_variant(variant: Variant, name: str) -> None:
    """Compare native steps in float64 with those of the function: zeros, tiny and huge gradients among them.

    name: of what is to be run, as the native module knows it.

    Raises:
        RuleError: they differ, or the function cannot take tensors.
    """
    for chosen in _both_options(variant):
        # One huge element hides all others of a norm.
        for largest in (math.inf, *([10.0] if variant.has_norms else [])):
            _compare(variant, name, chosen, largest)


def _both_options(variant: Variant) -> list[dict[str, Any]]:
    """Those by default, and the same without zeros, which hide what they are for."""
    options = variant.definition.options.with_constants(variant.constants)
    other = {key: _moved(value) for key, value in options.items()}
    return [options, other] if other != options else [options]


class _Form(NamedTuple):
    """What steps are compared in: the type of numbers, and how parameter and states are kept."""

    dtype: torch.dtype
    averaging: bool = False
    param: str = "native"
    state: str = "native"
    shape: tuple[int, ...] = (_ELEMENTS,)

    def keeping(self, variant: Variant) -> Keeping:
        keys = [key for key, used in zip(variant.definition.states, variant.used, strict=True) if used]
        by_chance = int(self.param == "stochastic")
        for place, key in enumerate(variant.definition.states, 2):
            if key in keys and self.state in ("bf16", "q8"):
                by_chance |= 1 << place | has_no_sign(key) << (place + 16)
        return Keeping(self.param, tuple((key, self.state) for key in keys), by_chance)


# All that kernels for what is kept otherwise do with memory: 8 elements at a time and singly, rows that end with a block of
# 64 or in the midst of one.
_KEPT_FORMS = (
    _Form(torch.bfloat16, param="remainder", state="q8", shape=(1, _ELEMENTS)),
    _Form(torch.bfloat16, param="stochastic", state="bf16"),
    _Form(torch.float16, param="master", state="fp32"),
    _Form(torch.bfloat16, param="kahan", state="fp32", shape=(1, _ELEMENTS)),
    _Form(torch.float32, state="q8", shape=(8, 32)),
)


def check_same_bits(variant: Variant, name: str) -> None:
    """Compare what a variant was compiled to with the interpreter, in every type of numbers: they give the same bits.

    Raises:
        RuleError: they do not.
    """
    _compare_bits(variant, name, _CPU, map(_Form, (torch.float64, *_IN_FLOAT)))


def check_on_gpu(variant: Variant, name: str, device: torch.device, kinds: Iterable[Kernels]) -> None:
    """The same of some kinds of kernels on a GPU."""
    asked = torch.cuda.get_sync_debug_mode()
    if asked:
        torch.cuda.set_sync_debug_mode("default")  # results are waited for
    try:
        for kind in sorted(kinds):
            plain = map(_Form, (torch.float64,) if kind.in_double else _IN_FLOAT)
            forms = _KEPT_FORMS if kind.kept else plain
            _compare_bits(variant, name, device, [form._replace(averaging=kind.averaging) for form in forms])
    finally:
        if asked:
            torch.cuda.set_sync_debug_mode(asked)


def _compare_bits(variant: Variant, name: str, device: torch.device, forms: Iterable[_Form]) -> None:
    definition, generator = variant.definition, torch.Generator("cpu").manual_seed(1)
    where = "" if device.type == "cpu" else f" for {device}"
    with _undisturbed():
        wide = torch.randn(_ELEMENTS, generator=generator, dtype=torch.float64, device="cpu")
        grads = [gradient(generator).clamp(-6e4, 6e4) for _ in range(_STEPS)]
        for form, options in product(forms, _both_options(variant)):
            keeping, count = form.keeping(variant), math.prod(form.shape)
            value = wide[:count].view(form.shape)
            values, companions = _as_kept(definition, keeping, value.to(form.dtype), options)
            average = values[0].clone() if form.averaging else None
            scalars = definition.first_scalars(options)
            for step, grad in enumerate(grads, 1):
                arguments = values, grad[:count].view(form.shape).to(form.dtype), scalars, step, options
                try:
                    found, found_scalars = by_op(variant, name, *arguments, device, average, companions)
                except (ArithmeticError, ValueError):
                    break  # options that the rule has no step for
                expected, scalars = by_op(variant, variant.name, *arguments, _CPU, average, companions)
                seen = _as_seen(definition, keeping, found)
                for what, other in _as_seen(definition, keeping, expected).items():
                    mine = seen[what]
                    same = torch.equal(mine, other) or bool(((mine == other) | (mine.isnan() & other.isnan())).all())
                    if not same or found_scalars != scalars:
                        kept = "" if form.param == form.state == "native" else f" kept as {keeping}"
                        raise _refusal(
                            definition,
                            f"compiled{where} it differs from interpreted in {form.dtype}{kept} at step {step}, in {what}; please "
                            "report it",
                        )
                own = 1 + len(definition.states)
                values, companions = expected[:own], expected[own : own + len(companions)]
                average = expected[-1] if form.averaging else None


def _as_kept(
    definition: Definition, keeping: Keeping, param: Tensor, options: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameter and states as they begin, and what lies beside them, as an op takes it."""
    states = start_of(definition, param, options)
    how, entry = dict(keeping.state), {}
    if keeping.param in TWINS:
        entry[TWINS[keeping.param][0]] = precision_values.twin_of(param, keeping.param, param.float())
    entry[ROUNDING_KEY] = torch.tensor([1, 0, keeping.by_chance], dtype=torch.int64, device="cpu")
    for key, state in zip(definition.states, states, strict=True):
        entry |= precision_values.as_kept(param, key, state, how.get(key, "native"))
    kept = [str(keeping.key_of(key)) for key in definition.states]
    return [param, *(entry[key] for key in kept)], [entry[key] for key in keeping.companions]


def _as_seen(definition: Definition, keeping: Keeping, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """What by_op() gives, by name; states in 8 bits as what these stand for, as codes mean nothing in a block that is NaN."""
    states = [str(keeping.key_of(key)) for key in definition.states]
    names = [definition.operands[0], *states, *keeping.companions]
    entry = dict(zip([*names, "average"], tensors, strict=False))
    for key, precision in keeping.state:
        if precision == "q8":
            entry[key] = precision_values.state_value(tensors[0], entry, key)  # type: ignore[assignment]
            del entry[key + CODES], entry[key + SCALE]
    return entry


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """With real tensors, whatever modes the optimizer is made in."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _moved(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(part) for part in value)
    is_zero = isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0
    return _IN_PLACE_OF_ZERO if is_zero else value


def _as_number(value: Any) -> Any:
    """An option as it is given, without tensors."""
    if isinstance(value, tuple):
        return tuple(_as_number(part) for part in value)
    return value.item() if isinstance(value, Tensor) else value


def gradient(generator: torch.Generator) -> Tensor:
    grad = torch.randn(_ELEMENTS, generator=generator, dtype=torch.float64, device="cpu")
    grad[::17] = 0.0
    grad[5], grad[6] = 1e-30, -1e20
    return grad


def start_of(definition: Definition, param: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """All states of a parameter as they begin, also those that a variant does without."""
    states = []
    for start in definition.states.values():
        if callable(start):
            states.append(start(param, {**options, "maximize": False}).to(param.dtype))
        elif start == "param":
            states.append(param.clone())
        else:
            value = options[start] if isinstance(start, str) else start
            states.append(torch.full_like(param, float(value)))
    return states


def _compare(variant: Variant, name: str, options: dict[str, Any], largest: float) -> None:
    definition, generator = variant.definition, torch.Generator("cpu").manual_seed(0)
    with _undisturbed():
        param = torch.randn(_ELEMENTS, generator=generator, dtype=torch.float64, device="cpu")
        values = [param, *start_of(definition, param, options)]
        scalars = definition.first_scalars(options)
        for step in range(1, _STEPS + 1):
            grad = gradient(generator).clamp(-largest, largest)
            try:
                expected, expected_scalars = by_function(definition, values, grad, scalars, step, options)
            except (ArithmeticError, ValueError):
                return  # options that the rule has no step for
            except Exception as error:
                raise _refusal(
                    definition, f"the function itself fails on tensors: {type(error).__name__}: {error}"
                ) from error
            found, found_scalars = by_op(variant, name, values, grad, scalars, step, options)
            names = [definition.operands[0], *definition.states]
            for what, mine, other in zip(names, found, expected, strict=True):
                _same(definition, step, what, mine, other)
            for what, mine_number, other_number in zip(
                definition.scalars, found_scalars, expected_scalars, strict=True
            ):
                if not math.isclose(mine_number, other_number, rel_tol=_CLOSE) and mine_number == mine_number:
                    raise _differs(definition, step, what, mine_number, other_number)
            values, scalars = expected, expected_scalars


def becoming_negative(variant: Variant, options: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Those of some states that a few steps make negative, from values that are not."""
    definition, generator = variant.definition, torch.Generator("cpu").manual_seed(2)
    names, found = list(definition.states), set()
    chosen = {option.name: _as_number(options[option.name]) for option in definition.options.all}
    with _undisturbed():
        values = [
            torch.randn(_ELEMENTS, generator=generator, dtype=torch.float64, device="cpu")
            for _ in range(1 + len(names))
        ]
        for key in keys:
            values[1 + names.index(key)].abs_()
        scalars = definition.first_scalars(chosen)
        for step in range(1, _STEPS + 1):
            try:
                values, scalars = by_function(definition, values, gradient(generator), scalars, step, chosen)
            except (ArithmeticError, ValueError):
                break  # options that the rule has no step for
            found |= {key for key in keys if (values[1 + names.index(key)] < 0.0).any()}
    return [key for key in keys if key in found]


def by_function(
    definition: Definition, values: list[Tensor], grad: Tensor, scalars: list[float], step: int, options: dict[str, Any]
) -> tuple[list[Tensor], list[float]]:
    """A step as the function takes it: parameter and states, and the scalars."""
    keywords = {**options, **({"step": step} if definition.options.counts_steps else {})}
    result = definition.function(values[0], grad, *values[1:], *scalars, **keywords)
    result = result if isinstance(result, tuple) else (result,)
    count = len(values)
    tensors = [
        torch.as_tensor(value, dtype=values[0].dtype, device="cpu").expand_as(values[0]).clone()
        for value in result[:count]
    ]
    return tensors, [float(value) for value in result[count:]]


def by_op(
    variant: Variant,
    name: str,
    values: list[Tensor],
    grad: Tensor,
    scalars: list[float],
    step: int,
    options: dict[str, Any],
    device: torch.device = _CPU,
    average: Tensor | None = None,
    companions: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[float]]:
    """The same as the native module takes it, on a device; behind the states what lies beside them, and the average, where
    there are such."""
    from optim_ext._rules.definition import arranged

    definition = variant.definition
    own = [value.to(device, copy=True) for value in values]
    averages = [] if average is None else [average.to(device, copy=True)]
    beside = [companion.to(device, copy=True) for companion in companions]
    numbers = definition.options.numbers_of(options, lambda group, option, count: tuple(group[option]))
    own_scalars = [torch.tensor(scalar, dtype=torch.float64, device=device) for scalar in scalars]
    states = [[state] if used else [] for state, used in zip(own[1:], variant.used, strict=True)]
    steps = [torch.tensor(step - 1.0, dtype=torch.float32, device=device)] if definition.options.counts_steps else []
    torch.ops.optim_ext.rule_(
        [own[0]],
        [grad.to(device, copy=True)],
        *arranged(states, [[scalar] for scalar in own_scalars], list),
        steps,
        rule=name,
        hypers=[torch.tensor(float(number), dtype=torch.float64, device="cpu") for number in (1.0, *numbers)],
        averages=averages,
        average_weight=None if average is None else torch.tensor(0.25, dtype=torch.float64, device="cpu"),
        companions=beside,
    )
    return [value.cpu() for value in (*own, *beside, *averages)], [float(scalar) for scalar in own_scalars]


def _same(definition: Definition, step: int, what: str, mine: Tensor, other: Tensor) -> None:
    close = (mine - other).abs() <= _CLOSE * (1e-3 + other.abs())
    bad = ~(close | (mine == other) | (mine.isnan() & other.isnan()))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise _differs(definition, step, f"element {at} of {what}", float(mine[at]), float(other[at]))


def _differs(definition: Definition, step: int, what: str, mine: float, other: float) -> RuleError:
    return _refusal(
        definition,
        f"its native form differs from the function at step {step}, {what}: {mine!r} against {other!r}. Please report it; "
        'with backend="torch" the function itself is run',
    )


def _refusal(definition: Definition, problem: str) -> RuleError:
    try:
        definition.source.refuse(definition.source.definition, problem)
    except RuleError as error:
        return error
