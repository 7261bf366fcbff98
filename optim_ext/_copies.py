"""Copies of loaded state that share no memory with what was loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from optim_ext import _sharding


class Copies:
    """Makes copies of what lies in the memory of a state that was given; what does not is taken as it is.

    One tensor that stands in many places stays one tensor.
    """

    def __init__(self, given: Any) -> None:
        self._given = {_memory_of(tensor) for tensor in _tensors_in(given)}
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, whose identity must not be another's

    def of(self, value: Any) -> Any:
        """The same in new containers."""
        if isinstance(value, Tensor):
            if _memory_of(value) not in self._given:
                return value
            if id(value) not in self._made:
                self._made[id(value)] = value, value.detach().clone().requires_grad_(value.requires_grad)
            return self._made[id(value)][1]
        if isinstance(value, dict):
            return {key: self.of(each) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.of, value))
        return value


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_in(each)


def _memory_of(tensor: Tensor) -> int:
    """What tells one memory from another; of a DTensor that of this process's part."""
    storage: int = _sharding.local(tensor).untyped_storage()._cdata
    return storage
