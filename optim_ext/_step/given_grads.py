"""Gradients that one step is given, in the place of those that the parameters have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from optim_ext._step.controls import ControlledStep

# In the order of all groups, or by name or by parameter; None: no gradient.
Grads = Iterable["Tensor | None"] | Mapping[str, "Tensor | None"] | Mapping[Tensor, "Tensor | None"]


@contextmanager
def in_place_of_own(optimizer: ControlledStep, grads: Grads) -> Iterator[None]:
    """Within the block the parameters have these gradients, and afterwards their own again, which nobody has seen.

    Raises:
        TypeError, ValueError, RuntimeError: the gradients are not those of the parameters, or the step has been asked for
            something that is about the parameters' own ones. The parameters have their own then.
    """
    _refuse(optimizer)
    lent = _in_order(optimizer, grads)
    own: list[tuple[Tensor, Tensor | None]] = []
    try:
        place = 0
        for group in optimizer.param_groups:
            for index, p in enumerate(group["params"]):
                own.append((p, p.grad))
                try:
                    p.grad = lent[place]
                except (RuntimeError, TypeError) as error:
                    raise type(error)(f"gradient of {optimizer._described(group, index)}: {error}") from None
                place += 1
        yield
    finally:
        for p, grad in reversed(own):  # a parameter may be there twice
            p.grad = grad


def _refuse(optimizer: ControlledStep) -> None:
    asked = optimizer._asked()
    if torch.compiler.is_compiling():
        raise RuntimeError("step(grads=) cannot be compiled: set p.grad in the compiled function, then step()")
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "GradScaler looks for infinities in p.grad, not in the gradients that step(grads=) is given, and has left their "
            "scale to the step: call scaler.unscale_(optimizer) before, or unscale them and let set_grad_policy(skip_nonfinite="
            "True) skip"
        )
    if asked.armed is not None:
        raise RuntimeError(
            "clip_grad_norm has taken the norm of p.grad, not of the gradients that step(grads=) is given: use "
            "set_grad_policy(max_norm=), which takes theirs"
        )
    if asked.policy is not None and asked.policy._sharing is not None:
        raise RuntimeError(
            "a policy that optimizers share takes the norm of p.grad of all of them, not of the gradients that one is given: "
            "use set_grad_policy on each, or set p.grad"
        )


def _in_order(optimizer: ControlledStep, grads: Any) -> list[Tensor | None]:
    """The gradients in the order of all groups' parameters."""
    if isinstance(grads, Tensor) or not isinstance(grads, Iterable):
        raise TypeError(
            f"grads is {type(grads).__name__}, expected one gradient or None for each parameter, in order, or a mapping from "
            "parameters or their names"
        )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    ordered = _of_mapping(optimizer, grads, params) if isinstance(grads, Mapping) else list(grads)
    if len(ordered) != len(params):
        raise ValueError(
            f"grads has {len(ordered)} entries, expected {len(params)}: one for each parameter of all groups, in order, None "
            "where there is no gradient"
        )
    seen: dict[Tensor, Any] = {}
    place = 0
    for group in optimizer.param_groups:
        for index, p in enumerate(group["params"]):
            grad = ordered[place]
            if grad is not None and not isinstance(grad, Tensor):
                found = type(grad).__name__
                raise TypeError(
                    f"gradient of {optimizer._described(group, index)} is {found}, expected a tensor or None"
                )
            if seen.setdefault(p, grad) is not grad:
                raise ValueError(f"{optimizer._described(group, index)} is there twice, with two gradients")
            place += 1
    return ordered


def _of_mapping(optimizer: ControlledStep, grads: Mapping[Any, Any], params: list[Tensor]) -> list[Any]:
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    known = {**dict.fromkeys(params), **dict.fromkeys(names)}
    for key in grads:
        if key not in known:
            what = repr(key) if isinstance(key, str) else f"a {type(key).__name__}"
            why = "" if names or not isinstance(key, str) else "; it was given no names (model.named_parameters())"
            raise ValueError(f"grads has {what}, which is no parameter of this {type(optimizer).__name__}{why}")
    by_name = dict(zip(names, params, strict=True)) if names else {}
    of_params = {by_name.get(key, key): grad for key, grad in grads.items()}
    if len(of_params) != len(grads):
        raise ValueError("grads has a parameter both by its name and as a tensor")
    return [of_params.get(p) for p in params]
