"""Parameters that an optimizer no longer has, with everything it has of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from optim_ext._native_step import NativeStep

Dropped = Tensor | str | tuple[str, Tensor]


def drop(optimizer: NativeStep, params: Dropped | Iterable[Dropped]) -> None:
    """What :meth:`optim_ext._native_step.NativeStep.drop` says."""
    for group in optimizer.param_groups:
        if not isinstance(group["params"], list):  # it may be something that can be gone through once
            group["params"] = list(group["params"])
    gone = _found(optimizer, params)
    asked = optimizer._asked()
    if not gone:
        return
    if asked.turn is not None or (asked.armed is not None and asked.armed.joint is not None):
        raise RuntimeError(
            f"a norm has been taken over the gradients of this {type(optimizer).__name__} and other optimizers, which have "
            "not all stepped by it: drop parameters after their steps, or after zero_grad()"
        )
    for group in optimizer.param_groups:
        kept = [index for index, p in enumerate(group["params"]) if id(p) not in gone]
        if len(kept) < len(group["params"]):
            optimizer._keep_members(group, kept)
    for p in gone.values():
        optimizer.state.pop(p, None)
    if asked.armed is not None:
        asked.armed = asked.armed._replace(of_more=True)
    optimizer._forget_params()


def _found(optimizer: NativeStep, params: Dropped | Iterable[Dropped]) -> dict[int, Tensor]:
    """The parameters that are meant, by identity."""
    ours = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    names = {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group.get("param_names", ()), group["params"], strict=False)
    }
    is_one = isinstance(params, (Tensor, str))
    found = {}
    for place, given in enumerate([params] if is_one else params):
        name, p = given if isinstance(given, tuple) and len(given) == 2 else (None, given)
        if isinstance(p, str):
            if p not in names:
                why = "" if names else "; it was given no names (model.named_parameters())"
                raise ValueError(f"{p!r} is no parameter of this {type(optimizer).__name__}{why}")
            p = names[p]
        if not isinstance(p, Tensor):
            raise TypeError(f"drop takes parameters, found {type(p).__name__} in place {place}")
        if id(p) not in ours:
            described = (
                f"parameter {place} of those given (shape {list(p.shape)})" if name is None else f"parameter {name!r}"
            )
            raise ValueError(f"{described} is no parameter of this {type(optimizer).__name__}")
        found[id(p)] = p
    return found
