"""Which code each parameter group of an optimizer runs, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import optim_ext
from optim_ext._native_step import NativeStep


@dataclass(frozen=True)
class GroupReport:
    """The path of one parameter group: ``native`` kernels or torch's own code, and the reason."""

    group: int
    native: bool
    reason: str

    def __str__(self) -> str:
        return f"group {self.group}: {'native' if self.native else 'torch'} ({self.reason})"


def explain(optimizer: Any) -> list[GroupReport]:
    """Say for each parameter group whether ``optimizer.step()`` would run natively or in torch's own code, and why.

    Judged from the options, parameters and gradients as they are now; nothing is changed. Parameters that require a
    gradient but have none yet are judged without it. Of a wrapper that holds optimizers in its attributes (Lookahead,
    SAM, schedulefree's, accelerate's, ZeRO's), those it holds are judged, one after the other, and the reason says which.

    Raises:
        TypeError: ``optimizer`` neither is an optimizer nor holds one.

    Example::

        >>> for report in optim_ext.explain(optimizer):
        ...     print(report)
        group 0: native (one call of optim_ext::adamw_ per device)
        >>> print(*optim_ext.explain(Lookahead(optimizer)))
        group 0: native (AdamW in Lookahead.optimizer: one call of optim_ext::adamw_ per device)
    """
    if not _is_optimizer(optimizer):
        raise TypeError(f"explain takes an optimizer, or a wrapper that holds one, found {type(optimizer).__name__}")
    reports = []
    for found, where in _innermost(optimizer, "", {id(optimizer)}):
        for index, group in enumerate(found.param_groups):
            native, reason = _judge(found, group)
            reports.append(
                GroupReport(index, native, f"{type(found).__name__} in {where}: {reason}" if where else reason)
            )
    return reports


def _judge(optimizer: Any, group: dict[str, Any]) -> tuple[bool, str]:
    if not isinstance(optimizer, NativeStep):
        name = type(optimizer).__name__
        ours = getattr(optim_ext, name, None)
        if ours is not None and issubclass(ours, NativeStep) and type(optimizer) is getattr(torch.optim, name, None):
            return False, f"this is torch.optim.{name}; use optim_ext.{name}"
        return False, f"{name} has no native step in optim_ext"
    reason = optimizer._torch_reason(group, ahead=True)
    return reason is None, reason or "; ".join([optimizer._native_how_of(group), *optimizer._kept_how(group)])


def _is_optimizer(thing: Any) -> bool:
    """Also what only behaves like one, as schedulefree's wrapper does. Schedulers have no groups."""
    return not isinstance(thing, type) and hasattr(thing, "step") and hasattr(thing, "param_groups")


def _innermost(optimizer: Any, where: str, seen: set[int]) -> list[tuple[Any, str]]:
    """Those that step in the end, each with the attributes that lead to it."""
    found = []
    if not isinstance(optimizer, NativeStep):
        for name, value in getattr(optimizer, "__dict__", {}).items():
            several = value if isinstance(value, (list, tuple)) else None
            for place, inner in enumerate((value,) if several is None else several):
                if _is_optimizer(inner) and id(inner) not in seen:
                    seen.add(id(inner))
                    step = f"{where or type(optimizer).__name__}.{name}" + ("" if several is None else f"[{place}]")
                    found += _innermost(inner, step, seen)
    return found or [(optimizer, where)]
