"""The step as the function of a rule takes it, in torch's operations: for ``differentiable=True``, and for devices and
tensors without kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from optim_ext._rules.definition import Definition


class FunctionStep(Optimizer):
    """What stands in for torch's own class of a rule."""

    _definition: ClassVar[Definition]
    _first_state: Callable[[dict[str, Any], Tensor], dict[str, Any]]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the loss if there is a closure. Every parameter is computed before the first one is written."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        new = [
            self._by_function(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        for targets, values in new:
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)
        return loss

    def _by_function(self, group: dict[str, Any], p: Tensor) -> tuple[list[Tensor], list[Any]]:
        """The tensors of one parameter, and what they are after the step."""
        definition = self._definition
        if p.grad is None or p.grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        entry = self.state[p]
        if len(entry) == 0:
            entry.update(self._first_state(group, p))
        # Copies, as autograd may keep what the function is given, and what it was made from is written.
        recorded = bool(group["differentiable"])
        states = {key: entry[key] for key in definition.states if key in entry}
        missing = [key for key in definition.states if key not in entry]
        values = {key: _as_real(state).clone() if recorded else _as_real(state) for key, state in states.items()}
        param = _as_real(p).clone() if recorded else _as_real(p)
        grad = -_as_real(p.grad) if group["maximize"] else _as_real(p.grad)
        options = {option.name: _as_scalar(group[option.name]) for option in definition.options.all}
        count = None
        if definition.options.counts_steps:
            count = entry["step"] + 1
            options["step"] = float(count)
        # State that the variant at hand does without comes in and goes out as it likes.
        arguments = [values.get(key, torch.zeros_like(param)) for key in definition.states]
        scalars = [float(entry[key]) for key in definition.scalars]
        result = definition.function(param, grad, *arguments, *scalars, **options)
        result = result if isinstance(result, tuple) else (result,)
        names = [None, *definition.states, *definition.scalars]
        targets, new = [], []
        for name, value in zip(names, result, strict=True):
            if name in missing:
                continue
            target = p if name is None else entry[name]
            target = _as_real(target) if name not in definition.scalars else target
            targets.append(target)
            if not isinstance(value, Tensor):
                value = torch.full_like(target, value)
            elif any(value is given for given in (param, *arguments)):
                value = value.clone()  # what one state was is to become another one's, and is written meanwhile
            new.append(value)
        if count is not None:
            targets.append(entry["step"])
            new.append(count)
        return targets, new


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _as_scalar(value: Any) -> Any:
    """A number that is a tensor of any shape with one element, as one that no shape is changed by."""
    if isinstance(value, tuple):
        return tuple(_as_scalar(part) for part in value)
    return value.reshape(()) if isinstance(value, Tensor) else value
