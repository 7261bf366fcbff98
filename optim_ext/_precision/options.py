"""The options that say how parameters and state are kept, and what they come to for one parameter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from optim_ext._precision import codecs

PARAM_PRECISIONS: Final = ("native", "master", "remainder", "kahan", "stochastic", "auto")
STATE_PRECISIONS: Final = ("native", "fp32", "bf16", "q8")
DEFAULTS: Final[dict[str, Any]] = {
    "param_precision": "native",
    "state_precision": "native",
    "rounding_seed": 0,
    "min_q8_size": 4096,
}

# What parameters are of that may be kept more exactly than they are.
HALVES: Final = (torch.bfloat16, torch.float16)

# Under which key the state has what a parameter is kept in besides itself, and in which dtype; None: in its own.
TWINS: Final[dict[str, tuple[str, torch.dtype | None]]] = {
    "master": ("master_param", torch.float32),
    "remainder": ("param_remainder", torch.int16),
    "kahan": ("kahan_comp", None),
}
ROUNDING_KEY: Final = "rounding_key"
# Where the part that a process has of a DTensor is in the whole: beside its state during steps, and no part of it.
PLACE: Final = "rounding_place"
CODES, SCALE = "::q8", "::scale"  # after the key of a state that is kept in 8 bits

# State without a sign.
_NOT_NEGATIVE: Final = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"})
# State that is no average of gradients: it is not rounded.
_EXACT: Final = frozenset({"step_size", "ax"})
_LEAST_ROWS: Final = 16


@dataclass(frozen=True)
class Keeping:
    """How one parameter and its state are kept."""

    param: str  # one of PARAM_PRECISIONS but "auto"
    state: tuple[tuple[str, str], ...]  # (key, one of STATE_PRECISIONS), in the order of the op's lists
    by_chance: int  # bit k: operand k is rounded by chance; bit k + 16: operand k has no sign
    is_part: bool = False  # of a tensor that several processes have parts of

    @property
    def has_blocks(self) -> bool:
        """Whether some state is in 8 bits."""
        return any(precision == "q8" for _, precision in self.state)

    @property
    def companions(self) -> list[str]:
        """The keys of what lies beside parameter and state, in the order an op takes it."""
        keys = [TWINS[self.param][0]] if self.param in TWINS else []
        if self.by_chance:
            keys += [ROUNDING_KEY, PLACE] if self.is_part else [ROUNDING_KEY]
        return keys + [key + SCALE for key, precision in self.state if precision == "q8"]

    def key_of(self, key: str | None) -> str | None:
        """The key under which a state is kept."""
        return key + CODES if key is not None and dict(self.state).get(key) == "q8" else key

    def __str__(self) -> str:
        state: dict[str, list[str]] = {}
        for key, precision in self.state:
            if precision != "native":
                state.setdefault(precision, []).append(key)
        return ", ".join([self.param, *(f"{' and '.join(keys)} {precision}" for precision, keys in state.items())])


def has_no_sign(key: str) -> bool:
    """Whether a state is never negative."""
    return key in _NOT_NEGATIVE


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are there and not the default: none of these adds a key to a group. What is written into a
    mapping later does not change them."""
    found = {name: values[name] for name, default in DEFAULTS.items() if name in values and values[name] != default}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}


def check(values: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, which begins with ``where``, unless every option that is there can be meant."""
    precision = values.get("param_precision", "native")
    if not isinstance(precision, str) or precision not in PARAM_PRECISIONS:
        raise ValueError(f"{where}: param_precision is {precision!r}, expected one of {_listed(PARAM_PRECISIONS)}")
    state = values.get("state_precision", "native")
    for key, one in state.items() if isinstance(state, Mapping) else [(None, state)]:
        if not isinstance(one, str) or one not in STATE_PRECISIONS:
            of_key = "" if key is None else f" of {key!r}"
            raise ValueError(
                f"{where}: state_precision{of_key} is {one!r}, expected one of {_listed(STATE_PRECISIONS)}"
            )
    for name in ("rounding_seed", "min_q8_size"):
        number = values.get(name, 0)
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"{where}: {name} is {number!r}, expected a whole number from 0 up")


def asks_for(group: Mapping[str, Any], precision: str) -> bool:
    """Whether some state is to be kept in this, unless its shape forbids it."""
    asked = group.get("state_precision", "native")
    return precision in (asked.values() if isinstance(asked, Mapping) else (asked,))


def keeping_of(p: Tensor, group: Mapping[str, Any], places: Mapping[str, int | None], described: str) -> Keeping | None:
    """What the options of a group come to for one of its parameters; None where everything is kept as torch does.

    p: the parameter, or a tensor without memory that is like it, or like the whole that it is a part of.
    places: the operand of the rule that each state of the parameter's shape is; None of one that only some parameters
        have, or of fewer numbers, which is not rounded.
    """
    param = _of_param(p, group.get("param_precision", "native"), described)
    asked = group.get("state_precision", "native")
    state = []
    by_chance = int(param == "stochastic")
    for key, place in places.items():
        wanted = asked.get(key, "native") if isinstance(asked, Mapping) else asked
        is_exact = place is None or key in _EXACT
        precision = _of_state(p, is_exact, wanted, param, group.get("min_q8_size", DEFAULTS["min_q8_size"]), described)
        state.append((key, precision))
        if place is not None and precision in ("bf16", "q8"):
            by_chance |= 1 << place | has_no_sign(key) << (place + 16)
    if param == "native" and all(precision == "native" for _, precision in state):
        return None
    return Keeping(param, tuple(state), by_chance)


def rounding_key(seed: int, name: str | int) -> int:
    """What all random words of one parameter are made from, as csrc/storage/stochastic.h does: of its name, or else of its
    place among all parameters."""
    of_param = (
        name if isinstance(name, int) else int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    )
    key = _splitmix64(_splitmix64(seed) ^ of_param)
    return key - (1 << 64) if key >> 63 else key  # as int64 has it


def _splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


def _of_param(p: Tensor, precision: str, described: str) -> str:
    if precision == "auto":
        precision = {torch.bfloat16: "remainder", torch.float16: "master"}.get(p.dtype, "native")
    if p.dtype is torch.float16 and precision in ("remainder", "stochastic"):
        raise ValueError(
            f"{described}: param_precision={precision!r} is for bfloat16, and it is float16; use 'master' or 'kahan'"
        )
    return precision if p.dtype in HALVES else "native"


def _of_state(p: Tensor, is_exact: bool, precision: str, param: str, min_q8_size: int, described: str) -> str:
    if precision != "native" and (p.is_complex() or p.dtype is torch.float64):
        raise ValueError(
            f"{described}: state_precision={precision!r} is for real parameters of up to 32 bits, and it is "
            f"{str(p.dtype).removeprefix('torch.')}; use 'native'"
        )
    if precision == "native":
        # What the rule sees of a parameter that is kept more exactly is float32, and so is what torch would make for it.
        return "native" if param == "native" else "fp32"
    if precision != "fp32" and is_exact:
        return "fp32"
    if precision == "q8" and (p.dim() < 2 or p.numel() < max(min_q8_size, 1) or p.shape[0] < _LEAST_ROWS):
        return "fp32"
    if precision == "q8" and not _rows_are_outermost(p):
        return "fp32"
    if precision == "fp32" and p.dtype is torch.float32:
        return "native"
    return precision


def _rows_are_outermost(p: Tensor) -> bool:
    """Whether the elements of each index of the first dimension follow each other in memory without another's between."""
    return codecs.dense_strides(p)[0] * p.shape[0] == p.numel()


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
