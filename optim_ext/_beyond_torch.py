"""What the optimizers share that torch does not have: state made from its keys, and checks in torch.optim's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optim_ext._step import FusedStep, Group


class StateByKeys(Optimizer):
    """What stands in for torch's own class where there is none: `_state_keys` names all the state there is."""

    _state_keys: Callable[[Group], tuple[str | None, ...]]
    _first_state: Callable[[Group, Tensor], dict[str, Any]]

    def _init_group(self, group: Group, params: list[Tensor], grads: list[Tensor], *lists: list[Tensor]) -> None:
        keys = self._state_keys(group)
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            state = self.state[p]
            if len(state) == 0:
                state.update(self._first_state(group, p))
            params.append(p)
            grads.append(p.grad)
            for key, entries in zip(keys, lists, strict=True):
                if key is not None:
                    entries.append(state[key])


class BeyondTorch(FusedStep, StateByKeys):
    """Base of optimizers without a class in torch."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch gives every optimizer a default for it
                    group.setdefault(name, value)
            for p in group["params"]:
                step = self.state.get(p, {}).get("step")
                if step is not None and not isinstance(step, Tensor):
                    self.state[p]["step"] = _count(float(step))

    def _first_state(self, group: Group, p: Tensor) -> dict[str, Any]:
        keys = (key for key in self._state_keys(group) if key is not None)
        return {key: _count(0.0) if key == "step" else torch.zeros_like(p) for key in keys}


def _count(steps: float, device: torch.device | None = None) -> Tensor:
    """A step count, in the dtype torch gives it."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(steps, dtype=dtype, device=device)


def check_one_element(lr: Any) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")


def check_not_negative(**options: Any) -> None:
    """Each option is a number from zero up; keywords are their names as a message shows them."""
    for name, value in options.items():
        if not value >= 0.0:
            shown = name.replace("_", " ") if name == "learning_rate" else f"{name} value"
            raise ValueError(f"Invalid {shown}: {value}")


def check_betas(betas: tuple[float, float]) -> None:
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas}, expected 2 values")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
