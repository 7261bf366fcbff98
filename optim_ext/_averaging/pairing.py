"""Which tensors of a model belong to which of its average."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from optim_ext._grad_control import is_sharded
from optim_ext._load import _C

if TYPE_CHECKING:
    from optim_ext._averaging.rules import AveragingRule


Match = Literal["order", "name"]  # which tensor of a model an average is of


class Pairing:
    """The tensors of an average and of the model it follows, matched once and verified at every update."""

    def __init__(self, module: Module, model: Module, use_buffers: bool, match: Match = "order"):
        self.use_buffers, self.match = use_buffers, match
        matched = list(match_tensors(module, model, "parameters", match))
        copied = list(match_tensors(module, model, "buffers", match))
        if use_buffers:
            matched, copied = matched + copied, []
        native = list(native_of(matched))
        # DTensors whose parts, which the plan knows, may be replaced: those are told by their addresses.
        self.sharded: list[Any] = [whole for _, *pair in matched for whole in pair if is_sharded(whole)]
        self.parts = [id(whole._local_tensor) for whole in self.sharded]
        others = [
            (average, current) for _, average, current in matched if not is_native(*local_parts(average, current))
        ]
        self.shards = [pair for pair in others if all(is_sharded(t) and t.is_floating_point() for t in pair)]
        self.others = [pair for pair in others if all(pair is not shard for shard in self.shards)]
        self.copied = [average for _, average, _ in copied], [current for _, _, current in copied]
        trees = [list(module.modules()), list(model.modules())]
        walked_as_usual = all(_has_usual_walk(*tree) for tree in trees)
        self.plan = average_plan(native, trees if walked_as_usual else [])

    def is_current(self, module: Module, model: Module) -> bool:
        # The plan's own tensors are looked at by its op, before it writes; these come last.
        pairs = itertools.chain(self.shards, self.others, zip(*self.copied, strict=True))
        return (
            [id(whole._local_tensor) for whole in self.sharded] == self.parts
            and self.plan.is_current(module, model)
            and all(average.shape == now.shape for average, now in pairs)
        )

    def finish(
        self, rule: AveragingRule, n_averaged: Tensor, weight: float | Tensor, found_inf: Tensor | None = None
    ) -> None:
        """What is left once the plan has run: the tensors no kernel covers, and the buffers that are copied."""
        others = self.others
        if isinstance(weight, float) and (found_inf is None or found_inf.device.type == "cpu"):
            self._average_shards(weight)
        else:
            others = [*self.shards, *others]
        if others:
            first = n_averaged == 0
            for average, current in others:
                here = current.to(average.device)
                n = n_averaged.to(average.device)
                if n.device.type == "cpu":
                    new = here if first else rule.average(average, here, host_count(n))
                else:
                    new = torch.where(first.to(average.device), here, rule.average(average, here, n).to(average.dtype))
                copy_tensors([average], [new], found_inf)
        copy_tensors(*self.copied, found_inf)

    def _average_shards(self, weight: float) -> None:
        """DTensors that are laid out differently, in as few operations as torch's own average takes: each of them moves
        parts between processes."""
        if weight == 1.0:
            for average, current in self.shards:
                average.copy_(current)
        elif self.shards:
            averages, currents = zip(*self.shards, strict=True)
            torch._foreach_lerp_(averages, currents, weight)


def average_plan(matched: Sequence[tuple[str, Tensor, Tensor]], trees: Sequence[list[Module]] = ()) -> _C.AveragePlan:
    names, averages, currents = (list(column) for column in zip(*matched, strict=True)) if matched else ([], [], [])
    return _C.AveragePlan(list(trees), names, averages, currents)


def match_tensors(
    module: Module, model: Module, kind: str, match: Match = "order"
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, average, current) for all parameters or buffers, in the model's order; every mismatch is an error."""
    what = kind.removesuffix("s")
    pairs = _by_name(module, model, kind) if match == "name" else _in_order(module, model, kind)
    for name, average, current in pairs:
        if average.shape != current.shape:
            raise ValueError(
                f"{what} '{name}' of the model has shape {tuple(current.shape)}, its average {tuple(average.shape)}"
            )
        if _kind(average) != _kind(current):
            raise ValueError(f"{what} '{name}' of the model is of {current.dtype}, its average of {average.dtype}")
        if current.is_meta != average.is_meta:
            raise ValueError(f"{what} '{name}': the model's is on {current.device}, its average on {average.device}")
        if is_sharded(current) != is_sharded(average):
            kinds = ["a DTensor" if is_sharded(tensor) else "a plain tensor" for tensor in (current, average)]
            raise ValueError(
                f"{what} '{name}' of the model is {kinds[0]}, its average {kinds[1]}; cut both in the same way "
                "(fully_shard(averaged.module), as the model)"
            )
        yield name, average, current


def _in_order(module: Module, model: Module, kind: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """As torch does."""
    averages, currents = (list(getattr(m, f"named_{kind}")()) for m in (module, model))
    if len(averages) != len(currents):
        longer, owner = (averages, "average") if len(averages) > len(currents) else (currents, "model")
        raise ValueError(
            f"the average has {len(averages)} {kind} and the model {len(currents)}; '{longer[-1][0]}' of the {owner} "
            "has no counterpart"
        )
    for (_, average), (name, current) in zip(averages, currents, strict=True):
        yield name, average, current


def _by_name(module: Module, model: Module, kind: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A tensor that is there under several names has its average under any of them."""
    what = kind.removesuffix("s")
    averages = dict(getattr(module, f"named_{kind}")(remove_duplicate=False))
    names: dict[int, str] = {}  # of the model's tensors, by the identity of their averages
    for name, current in getattr(model, f"named_{kind}")():
        if name not in averages:
            raise ValueError(f"{what} '{name}' of the model has no average of this name")
        average = averages[name]
        if id(average) in names:
            raise ValueError(
                f"{what} '{name}' and '{names[id(average)]}' have one average together, but are two in the model"
            )
        names[id(average)] = name
        yield name, average, current
    for name, average in averages.items():
        if id(average) not in names:
            raise ValueError(f"the average of {what} '{name}' has no {what} of this name in the model")


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "floating point" if tensor.is_floating_point() else "integer"


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, the object that the DTensor holds: to_local() may give a passing view of it."""
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return part


def local_parts(average: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """What a pair means to this process: of two DTensors that are laid out alike, its parts, which no other process needs
    to know; else the pair itself."""
    if not (is_sharded(average) and is_sharded(current)):
        return average, current
    layouts = [(tensor.device_mesh, tensor.placements) for tensor in (average, current)]  # type: ignore[attr-defined]
    mine, others = local_part(average), local_part(current)
    alike = layouts[0] == layouts[1] and mine.shape == others.shape
    return (mine, others) if alike and not any(place.is_partial() for place in layouts[0][1]) else (average, current)


def native_of(matched: Iterable[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of (name, average, current) those that average_ covers, in the tensors it is given."""
    for name, *pair in matched:
        average, current = local_parts(*pair)
        if is_native(average, current):
            yield name, average, current


def is_native(average: Tensor, current: Tensor) -> bool:
    """Whether average_ covers a pair; a parameter on another device is copied to the average's first."""
    return (
        (average.is_floating_point() or average.is_complex())
        and _C.unsupported(average) is None
        and _C.unsupported_grad(current) is None
        and not (current.is_conj() or current.is_neg())
    )


def _has_usual_walk(root: Module, *below: Module) -> bool:
    """Whether parameters() and buffers() visit what the modules' own dictionaries hold."""
    of_root = ("parameters", "named_parameters", "buffers", "named_buffers", "_named_members", "modules")
    return all(_is_own(root, name) for name in of_root) and all(_is_own(m, "named_modules") for m in (root, *below))


def _is_own(module: Module, name: str) -> bool:
    return getattr(getattr(module, name), "__func__", None) is getattr(Module, name)


def copy_tensors(to: list[Tensor], values: list[Tensor], found_inf: Tensor | None = None) -> None:
    """Copies in place, unless ``found_inf`` is one."""
    if not to:
        return
    parts = [local_parts(tensor, value) for tensor, value in zip(to, values, strict=True)]
    to, values = [tensor for tensor, _ in parts], [value for _, value in parts]
    if found_inf is not None and found_inf.device.type != "cpu":
        keep = [found_inf.reshape(()).to(tensor.device) == 1 for tensor in to]
        values = [
            torch.where(k, tensor, value.to(tensor.device, tensor.dtype))
            for k, tensor, value in zip(keep, to, values, strict=True)
        ]
    if all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (*to, *values)):
        torch._foreach_copy_(to, values)
    else:  # subclasses (DTensors that are laid out differently) know single operations only
        for tensor, value in zip(to, values, strict=True):
            tensor.copy_(value)


def host_count(n: Any) -> Any:
    return int(n) if isinstance(n, Tensor) and n.device.type == "cpu" else n
