"""What parameters, gradients and state will take, before there is an optimizer.

The classes themselves say it: they make the state of a first step for copies of the parameters on the meta device, which
have shapes and dtypes but no memory.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

import optim_ext
from optim_ext import _command_line, _grad_control
from optim_ext._precision import options as precision
from optim_ext._step import FusedStep


@dataclass(frozen=True)
class GroupBytes:
    """Bytes of one parameter group: of its parameters, of a gradient for each that requires one (0 where gradients have to
    be sparse), of its state after a step."""

    params: int
    grads: int
    state: int

    @property
    def total(self) -> int:
        return self.params + self.grads + self.state


@dataclass(frozen=True)
class MemoryRow:
    """One way to keep parameters and state: bytes by parameter group, or why it is refused for these parameters."""

    param_precision: str
    state_precision: str | Mapping[str, str]
    groups: tuple[GroupBytes, ...] = ()
    average: int = 0
    refused: str | None = None

    @property
    def total(self) -> int:
        """Of all groups, and of the average where there is one; 0 where it is refused."""
        return sum(group.total for group in self.groups) + self.average


@dataclass(frozen=True)
class MemoryTable:
    """What :func:`memory` found, as text a table: one row for each way."""

    optimizer: str
    numel: int
    rows: tuple[MemoryRow, ...]
    without_grads: bool = False  # as they are sparse, and of a size that is known only when they are there

    def __str__(self) -> str:
        bytes_of = "bytes without gradients, which are sparse" if self.without_grads else "bytes"
        title = f"{self.optimizer}, {self.numel:,} elements in parameters; {bytes_of}"
        return "\n".join([title, *_aligned(self._cells())])

    def _cells(self) -> Iterator[list[str]]:
        groups = max(len(row.groups) for row in self.rows)
        of_groups = [f"group {number}" for number in range(groups)] if groups > 1 else []
        averages = any(row.average for row in self.rows)
        yield [
            *("param_precision", "state_precision", "parameters", "gradients", "state"),
            *of_groups,
            *(["average"] if averages else []),
            *("in all", "an element"),
        ]
        for row in self.rows:
            way = [row.param_precision, str(row.state_precision)]
            if row.refused is not None:
                yield [*way, f"refused: {row.refused}"]
                continue
            parts = [sum(getattr(group, part) for group in row.groups) for part in ("params", "grads", "state")]
            numbers = [*parts, *([group.total for group in row.groups] if of_groups else [])]
            numbers += [row.average] if averages else []
            yield [*way, *(f"{n:,}" for n in (*numbers, row.total)), f"{row.total / max(self.numel, 1):.2f}"]


def memory(
    params: Module | Iterable[Any], cls: type[Optimizer], *, average: bool | torch.dtype = False, **options: Any
) -> MemoryTable:
    """The bytes that parameters, gradients and state will take for each combination of ``param_precision`` and
    ``state_precision`` that ``cls`` takes: those held after a step in which every parameter that requires a gradient has
    one. Nothing is allocated, so parameters may be on the meta device; they are not written to. Gradients of a class that
    takes sparse ones only are not counted.

    Args:
        params: a model, or what the constructor of ``cls`` takes: parameters, named parameters or parameter groups.
        cls: one of this package's classes that keep state for each parameter.
        average: count an :class:`optim_ext.swa_utils.AveragedModel` too: True for one in the parameters' dtypes, or its
            ``dtype``. Of a model its buffers count as well.
        options: of ``cls``. ``param_precision`` and ``state_precision`` among them are the only ones in the table then.

    Returns:
        A table, ``print`` shows it: a row for each way, with ``total`` and bytes by parameter group. A way that the class
        refuses for these parameters is a row that says why.

    Raises:
        TypeError: ``cls`` is no class of this package that keeps state for each parameter.
        ValueError: a parameter is sharded or has no shape yet; the options are refused.

    Example::

        >>> with torch.device("meta"):
        ...     model = GPT().bfloat16()
        >>> print(optim_ext.memory(model, optim_ext.AdamW, state_precision="q8"))
    """
    without_grads = not _checked_class(cls)._takes_dense
    given = params.named_parameters() if isinstance(params, Module) else params
    source = _Source(given)
    averaged = _average_bytes(params if isinstance(params, Module) else None, source, average)
    rows = []
    for index, (param, state) in enumerate(_ways(cls, source, options)):
        asked = {**options, "param_precision": param, "state_precision": state}
        try:
            groups = _groups_of(cls, source, {**options, **precision.given(asked)})
            rows.append(MemoryRow(param, state, groups, averaged))
        except ValueError as error:
            if index == 0:  # as the caller asks for it, or as it comes: not a way among others
                raise
            rows.append(MemoryRow(param, state, refused=str(error)))
    return MemoryTable(cls.__name__, sum(p.numel() for p in source.parameters), tuple(rows), without_grads)


class _Source:
    """What a constructor is given, for copies on the meta device."""

    def __init__(self, given: Iterable[Any]) -> None:
        self.given = [_with_list(entry) for entry in given]
        self.parameters = list(dict.fromkeys(p for _, p in _named(self.given)))
        for name, p in _named(self.given):
            if is_lazy(p):
                raise ValueError(f"{name} has no shape yet: run the model once first")
            if _grad_control.is_sharded(p):
                raise ValueError(f"{name} is sharded: hand over the model before it is, and divide by the processes")

    def copies(self) -> list[Any]:
        made = {p: _copy(p) for p in self.parameters}

        def copied(entry: Any) -> Any:
            if isinstance(entry, Mapping):
                options = {name: value for name, value in entry.items() if name != "fused"}
                return {**options, "params": [copied(one) for one in entry["params"]]}
            return made[entry] if isinstance(entry, Tensor) else (entry[0], made[entry[1]])

        return [copied(entry) for entry in self.given]


def _with_list(entry: Any) -> Any:
    """A group with its parameters in a list, which can be read again and again; whatever else as it is."""
    if not isinstance(entry, Mapping):
        return entry
    params = entry["params"]
    return {**entry, "params": [params] if isinstance(params, Tensor) else [*params]}


def _named(given: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    for place, entry in enumerate(given):
        if isinstance(entry, Mapping):
            yield from ((f"{name} of group {place}", p) for name, p in _named(entry["params"]))
        elif isinstance(entry, Tensor):
            yield f"parameter {place}", entry
        else:
            yield f"parameter '{entry[0]}'", entry[1]


def _copy(p: Tensor) -> Tensor:
    return torch.nn.Parameter(torch.empty_like(p, device="meta", requires_grad=False), requires_grad=p.requires_grad)


def _checked_class(cls: Any) -> type[FusedStep]:
    if not (isinstance(cls, type) and issubclass(cls, FusedStep)):
        name = cls.__name__ if isinstance(cls, type) else repr(cls)
        ours = getattr(optim_ext, name, None)
        advice = f"; use optim_ext.{name}" if isinstance(ours, type) and issubclass(ours, FusedStep) else ""
        raise TypeError(f"memory takes a class of optim_ext that keeps state for each parameter, found {name}{advice}")
    return cls


def _ways(cls: Any, source: _Source, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Combinations of the two options, first the one that the caller names or that is the default."""
    takes = cls._keeps_otherwise()
    is_half = any(p.dtype in precision.HALVES for p in source.parameters)
    params = precision.PARAM_PRECISIONS if takes and is_half else ("native",)
    states: tuple[Any, ...] = precision.STATE_PRECISIONS if takes else ("native",)
    return itertools.product(
        (options["param_precision"],) if "param_precision" in options else params,
        (options["state_precision"],) if "state_precision" in options else states,
    )


@torch.no_grad()
def _groups_of(cls: Any, source: _Source, options: Mapping[str, Any]) -> tuple[GroupBytes, ...]:
    # Without fused, for which torch looks whether the device has such kernels: state is of the same size.
    optimizer = cls(source.copies(), **{name: value for name, value in options.items() if name != "fused"})
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = _gradient(p, cls._takes_dense) if p.requires_grad else None
        optimizer._make_missing_state(group)
        state = [value for p in group["params"] if p in optimizer.state for value in optimizer.state[p].values()]
        found.append(
            GroupBytes(
                params=_bytes(group["params"]),
                grads=_bytes(p.grad for p in group["params"]) if cls._takes_dense else 0,
                state=_bytes(state),
            )
        )
    return tuple(found)


def _gradient(p: Tensor, is_dense: bool) -> Tensor:
    if is_dense:
        return torch.empty_like(p, requires_grad=False)
    return torch.zeros(p.shape, dtype=p.dtype, device=p.device, layout=torch.sparse_coo)


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _average_bytes(model: Module | None, source: _Source, average: bool | torch.dtype) -> int:
    if average is False:
        return 0
    tensors = source.parameters if model is None else [*model.parameters(), *model.buffers()]
    in_all = 0
    for tensor in tensors:
        dtype = tensor.dtype
        if isinstance(average, torch.dtype) and (dtype.is_floating_point or dtype.is_complex):
            dtype = average.to_complex() if dtype.is_complex else average
        in_all += tensor.numel() * dtype.itemsize
    return in_all


def _aligned(rows: Iterable[list[str]]) -> list[str]:
    table = list(rows)
    complete = [row for row in table if len(row) == len(table[0])]
    widths = [max(len(row[column]) for row in complete) for column in range(len(table[0]))]
    widths[:2] = [max(len(row[column]) for row in table) for column in (0, 1)]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if column < 2 or len(row) == 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def memory_command(arguments: list[str]) -> int:
    """``python -m optim_ext memory FILE.py:factory``: the exit status, 2 where it is not understood what is meant."""
    parser = argparse.ArgumentParser(
        prog="python -m optim_ext memory",
        description="Bytes that a model's parameters, gradients and optimizer state will take, for each way to keep them.",
    )
    parser.add_argument(
        "factory", help="FILE.py:name or pkg.mod:name of a function that returns a model, parameters or groups"
    )
    parser.add_argument("options", nargs="*", metavar="option=value", help="of the optimizer")
    parser.add_argument("--optimizer", default="AdamW", help="a class of optim_ext, or pkg.mod:Name of one (AdamW)")
    parser.add_argument("--device", default="meta", help="where the function makes its tensors (meta: nowhere)")
    parser.add_argument("--average", metavar="DTYPE", help="count an average of the model in this dtype, too")
    asked = parser.parse_intermixed_args(arguments)
    if wrong := [word for word in asked.options if "=" not in word]:
        parser.error(f"{wrong[0]!r} is no option=value")
    try:
        dtype = getattr(torch, asked.average) if asked.average else False
        cls = _command_line.find(asked.optimizer) if ":" in asked.optimizer else getattr(optim_ext, asked.optimizer)
        factory = _command_line.find(asked.factory)
    except (ImportError, AttributeError, LookupError, OSError) as error:
        parser.error(str(error))
    try:
        with torch.device(asked.device):
            made = factory if isinstance(factory, Module) else factory()
        print(memory(made, cls, average=dtype, **dict(map(_command_line.option, asked.options))))
    except (TypeError, ValueError, RuntimeError) as error:
        hint = "" if asked.device != "meta" else "\n(made on the meta device; --device cpu makes it for real)"
        print(f"{asked.factory}: {error}{hint}", file=sys.stderr)
        return 1
    return 0
