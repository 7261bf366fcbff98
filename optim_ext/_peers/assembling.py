"""What every importer needs: state that was found is checked against an optimizer, and becomes a state_dict of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optim_ext._beyond_torch import _count
from optim_ext._precision import options as precision
from optim_ext._precision.options import TWINS
from optim_ext._step import FusedStep
from optim_ext._tables import TABLES

Group = Mapping[str, Any]
MASTER = TWINS["master"][0]


@dataclass
class Found:
    """What a checkpoint has of one parameter, under the keys of our state. Without values and step it has not been
    stepped."""

    values: dict[str, Tensor] = field(default_factory=dict)
    step: Any = None
    master: Tensor | None = None


def check_optimizer(function: str, optimizer: Any) -> None:
    if not isinstance(optimizer, FusedStep):
        raise TypeError(f"{function} takes an optimizer of optim_ext, found {type(optimizer).__name__}")


def check_layout(function: str, saved: Any, expected: str) -> None:
    """Raise unless this is laid out as torch's state_dict."""
    if not (
        isinstance(saved, Mapping)
        and isinstance(saved.get("state"), Mapping)
        and isinstance(saved.get("param_groups"), Sequence)
    ):
        has = ", ".join(map(repr, saved)) if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(f"{function} takes {expected}; found {has or 'nothing'}")


def each_entry(optimizer: FusedStep, saved: Group) -> Iterator[tuple[int, int, Group, Group]]:
    """(group, index, its group, its entry of the state) of each parameter that has state in a checkpoint laid out as
    torch's. Entries that belong to no parameter are refused."""
    its_groups = saved["param_groups"]
    own = [len(group["params"]) for group in optimizer.param_groups]
    found = [len(group["params"]) for group in its_groups]
    if own != found:
        raise ValueError(
            f"the checkpoint has groups of {found} parameters and this {type(optimizer).__name__} of {own}: make it with "
            "the same parameters in the same groups"
        )
    left = set(saved["state"])
    for number, group in enumerate(its_groups):
        for index, name in enumerate(group["params"]):
            if name in left:
                left.discard(name)
                yield number, index, group, saved["state"][name]
    if left:
        raise ValueError(
            f"state[{next(iter(left))!r}] of the checkpoint belongs to none of its parameters: this layout is not known; "
            "gather sharded state into one state_dict first"
        )


def assembled(
    optimizer: FusedStep, found: Mapping[tuple[int, int], Found], options: Callable[[int], Group]
) -> dict[str, Any]:
    """A state_dict of an optimizer.

    Args:
        found: what the checkpoint has, by group and place in it; parameters that are not there have not been stepped.
        options: what the checkpoint says of the options of a group; others stay the optimizer's own.

    Raises:
        ValueError: something is missing, is not kept by this optimizer, or has another shape; by the parameter's name.
    """
    saved = optimizer.state_dict()
    groups, state = [], {}
    for number, group in enumerate(saved["param_groups"]):
        own = optimizer.param_groups[number]
        merged = {**group, **_options_of(group, options(number))}
        groups.append(merged)
        for index, name in enumerate(group["params"]):
            if (number, index) in found:
                where = optimizer._described(own, index)
                keys = optimizer._state_keys({**own, **{key: merged[key] for key in merged if key != "params"}})
                state[name] = _entry(optimizer, own["params"][index], keys, found[number, index], where)
    return {**saved, "state": state, "param_groups": groups}


def _options_of(own: Group, its: Group) -> dict[str, Any]:
    taken = {}
    for name, value in its.items():
        if name in own and name not in ("params", "param_names", *precision.DEFAULTS):
            taken[name] = float(value) if isinstance(value, Tensor) and not isinstance(own[name], Tensor) else value
    return taken


def _entry(optimizer: FusedStep, p: Tensor, keys: Sequence[str | None], found: Found, where: str) -> dict[str, Any]:
    name, table = type(optimizer).__name__, TABLES[optimizer._op]
    entry: dict[str, Any] = {}
    is_stepped = bool(found.values) or found.step is not None
    for key in keys if is_stepped else ():
        if key is None:
            continue
        if key == "step":
            if found.step is None:
                raise ValueError(f"{where}: the checkpoint does not say how many steps it has had; hand over step=")
            entry[key] = _count(float(found.step))
        elif key not in found.values:
            raise ValueError(
                f"{where}: {name} keeps {key!r} under these options, and the checkpoint has "
                f"{', '.join(map(repr, found.values)) or 'nothing'}"
            )
        elif key in table.places:
            entry[key] = _of_shape(p, found.values[key], f"{where}: {key!r}")
    if unknown := found.values.keys() - set(keys):
        raise ValueError(
            f"{where}: the checkpoint has {min(unknown)!r}, which {name} does not keep under these options"
        )
    if found.master is not None and p.dtype in (torch.bfloat16, torch.float16):
        entry[MASTER] = _of_shape(p, found.master, f"{where}: its master").float()
    return entry


def _of_shape(p: Tensor, value: Tensor, what: str) -> Tensor:
    if hasattr(value, "to_local"):
        raise ValueError(f"{what} is a DTensor: gather it first, by full_tensor()")
    if value.shape != p.shape:
        raise ValueError(f"{what} has shape {list(value.shape)}, expected {list(p.shape)}")
    return value.detach()
