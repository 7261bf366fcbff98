"""What the parts of a native step know of their optimizer: its op, its options, its state, its parameters' names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from optim_ext._load import _C
from optim_ext._native_step import NativeStep
from optim_ext._tables import TABLES

Group = dict[str, Any]
Loss = TypeVar("Loss")  # whatever a closure returns
# What one op call needs besides tensors: which entries of group["params"], and the op's hyper-parameters in order.
Call = tuple[list[int], tuple[Any, ...]]


class OpStep(NativeStep):
    """An optimizer whose step is calls of one op. What a subclass says of itself: see :class:`optim_ext._step.FusedStep`."""

    _op: ClassVar[str]
    _number_state: ClassVar[frozenset[str]] = frozenset()
    _takes_dense: ClassVar[bool] = True
    _measures_tensors: ClassVar[bool] = False  # see _measures
    _about_whole_tensors: ClassVar[bool] = False  # see _needs_whole_tensors
    _init_group: Callable[..., Any]  # torch's: creates missing state and gathers a group's tensors

    @property
    def _native_how(self) -> str:
        return f"one call of optim_ext::{self._op} per device"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return TABLES[self._op].state_keys

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        values: list[Any] = []
        for option, count in TABLES[self._op].options:
            if count == 0:
                values.append(group[option])
            else:
                values.extend(self._values(group, option, count))
        return tuple(values)

    def _measures(self, group: Group) -> bool:
        """Whether the rule needs norms of whole parameters."""
        return self._measures_tensors

    def _needs_whole_tensors(self, group: Group) -> bool:
        """Whether a part of a parameter cannot be stepped on its own."""
        return self._about_whole_tensors

    def _takes_sparse(self, group: Group) -> bool:
        return False

    def _values(self, group: Group, option: str, count: int) -> tuple[Any, ...]:
        """An option that holds ``count`` values. (Torch finds out when its step unpacks them.)"""
        values = group[option]
        if type(values) is tuple and len(values) == count:
            return values
        try:
            found = tuple(values)
        except TypeError:
            raise TypeError(
                f"{option} of group {self._number_of(group)} is {values!r}, expected {count} values"
            ) from None
        if len(found) != count:
            raise ValueError(
                f"{option} of group {self._number_of(group)} has {len(found)} values, expected {count}: {values!r}"
            )
        return found

    def _prepare(self, group: Group) -> list[Call]:
        """Make missing state, and return the op calls for the step that is being prepared."""
        self._make_missing_state(group)
        return [(list(range(len(group["params"]))), self._hypers(group))]

    def _make_missing_state(self, group: Group) -> None:
        """Let torch create the state that a step of the parameters with a gradient needs and that is not there."""
        self._init_group(group, *([] for _ in range(2 + len(self._state_keys(group)))))

    def _described(self, group: Group, index: int) -> str:
        """A parameter as every message names it: by its name, or by its place."""
        return _C.describe(self.param_groups, self._number_of(group), index)

    def _number_of(self, group: Group) -> int:
        return next(i for i, other in enumerate(self.param_groups) if other is group)

    def _undo_casts(self, saved: dict[str, Any]) -> None:
        """One number for a whole parameter is kept in torch's default precision, not in the parameter's. Of step counts
        torch knows that."""
        numbers = TABLES[self._op].scalar_state - {"step"}
        if not numbers:
            return
        for group, its in zip(self.param_groups, saved["param_groups"], strict=True):
            for p, number in zip(group["params"], its["params"], strict=True):
                for key, value in saved["state"].get(number, {}).items():
                    if key in numbers and isinstance(value, Tensor):
                        self.state[p][key] = value.to(self.state[p][key].device)
