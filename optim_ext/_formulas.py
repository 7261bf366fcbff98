"""The rules that torch.optim lacks, in torch's own operations as their papers have them: what the self-test compares with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def _lion(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Algorithm 2 of Chen et al. 2023 (arXiv:2302.06675)."""
    (beta1, beta2), average = group["betas"], state.setdefault("exp_avg", torch.zeros_like(p))
    sign = (beta1 * average + (1 - beta1) * grad).sign()
    state["exp_avg"] = beta2 * average + (1 - beta2) * grad
    update: Tensor = sign + group["weight_decay"] * p
    return update


def _lamb(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Algorithm 2 of You et al. 2020 (arXiv:1904.00962)."""
    (beta1, beta2), t = group["betas"], state.get("step", 0) + 1
    m = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * grad
    v = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * grad.square()
    state.update(step=t, exp_avg=m, exp_avg_sq=v)
    update: Tensor = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"]) + group["weight_decay"] * p
    return _ratio(p.norm(), update.norm()) * update


def _lars(p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Algorithm 1 of You, Gitman and Ginsburg 2017 (arXiv:1708.03888)."""
    decay, momentum = group["weight_decay"], group["momentum"]
    length = grad.norm() + decay * p.norm() + group["eps"]
    rate = _ratio(group["trust_coefficient"] * p.norm(), length if grad.norm() > 0 else grad.norm())
    scaled = rate * (grad + decay * p)
    buffer: Tensor = momentum * state.get("momentum_buffer", 0.0) + scaled
    state["momentum_buffer"] = buffer
    return scaled + momentum * buffer if group["nesterov"] else buffer


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    return over / under if over > 0 and under > 0 else torch.ones_like(over)


FORMULAS = {"LAMB": _lamb, "LARS": _lars, "Lion": _lion}


class ByFormula(Optimizer):
    """An optimizer around one of FORMULAS, whose result times the learning rate is what a step takes off. Options that are
    not given are those the native class ``ours`` has by default."""

    def __init__(self, params: list[Tensor], ours: Callable[..., Optimizer], **options: Any) -> None:
        accepted = inspect.signature(ours).parameters.values()
        defaults = {each.name: each.default for each in accepted if each.default is not each.empty}
        self._formula = FORMULAS[ours.__name__]
        super().__init__(params, defaults | options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                grad = -p.grad if group["maximize"] else p.grad
                p.sub_(group["lr"] * self._formula(p, grad, self.state[p], group))
