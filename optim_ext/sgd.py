"""Stochastic gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as sgd

from optim_ext._step import Call, FusedStep, Group

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class SGD(FusedStep, torch.optim.SGD):
    __doc__ = torch.optim.SGD.__doc__

    _op = "sgd_"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            momentum: float = ...,
            dampening: float = ...,
            weight_decay: float | Tensor = ...,
            nesterov: bool = ...,
            *,
            maximize: bool = ...,
            foreach: bool | None = ...,
            differentiable: bool = ...,
            fused: bool | None = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("momentum_buffer" if group["momentum"] != 0 else None,)

    def _takes_sparse(self, group: Group) -> bool:
        return bool(group["momentum"] == 0 and group["weight_decay"] == 0)

    def _hypers(self, group: Group, is_first_step: bool = False) -> tuple[Any, ...]:
        return super()._hypers({**group, "is_first_step": is_first_step})

    def _init_group(self, group: Any, *lists: Any, **named: Any) -> Any:
        """As torch's, but without dampening a missing buffer is made at once: zeros give torch's first step. (A compiler
        runs this method itself and does not trace it, so the first step's graph serves the others.)"""
        found = super()._init_group(group, *lists, **named)
        params, grads, momentum_buffers = lists[:3]
        by_torch = self._on_torchs_path or group["differentiable"]
        if self._starts_at_zero(group) and not by_torch and not any(grad.is_sparse for grad in grads):
            for index, (p, buffer) in enumerate(zip(params, momentum_buffers, strict=False)):
                if buffer is None:
                    momentum_buffers[index] = self._make_buffer(group, p)
        return found

    def _traced_step(self) -> Tensor | None:
        """With dampening the first step is another formula, and a traced graph cannot tell; torch's code can."""
        if any(group["momentum"] != 0 and group["dampening"] != 0 for group in self.param_groups):
            self._refuse_controls("compiled SGD with dampened momentum")
            for group in self.param_groups:
                self._refuse_precision(group, "compiled SGD with dampened momentum is torch's")
            self._bare_torch_step(self)
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            return found_inf
        return super()._traced_step()

    def _prepare(self, group: Group) -> list[Call]:
        """A missing buffer starts at zero, which gives torch's first step unless that must go undampened."""
        first = self._make_buffers(group)
        if not first or self._starts_at_zero(group):
            return [(list(range(len(group["params"]))), self._hypers(group))]
        later = [index for index in range(len(group["params"])) if index not in first]
        return [(sorted(first), self._hypers(group, is_first_step=True)), (later, self._hypers(group))]

    def _make_missing_state(self, group: Group) -> None:
        self._make_buffers(group)

    @staticmethod
    def _starts_at_zero(group: Group) -> bool:
        """Whether a buffer of zeros gives torch's first step: undampened, and with a momentum that leaves zeros."""
        return bool(group["dampening"] == 0 and group["momentum"] * 0 == 0)

    def _make_buffers(self, group: Group) -> set[int]:
        """Make the missing momentum buffers; return the indices of their parameters."""
        made = self._make_kept_state(group)
        if made is not None:
            return made if group["momentum"] != 0 else set()
        super()._make_missing_state(group)
        if group["momentum"] == 0:
            return set()
        first = set()
        for index, p in enumerate(group["params"]):
            if p.grad is not None and self.state[p].get("momentum_buffer") is None:
                first.add(index)
        for index in first:
            self._make_buffer(group, group["params"][index])
        return first

    def _make_buffer(self, group: Group, p: Tensor) -> Tensor:
        """A buffer of zeros where torch would clone the gradient: after weight decay it has the wider of both dtypes."""
        grad = p.grad
        assert grad is not None
        dtype = torch.promote_types(grad.dtype, p.dtype) if group["weight_decay"] != 0 else grad.dtype
        buffer = torch.zeros_like(grad, dtype=dtype, memory_format=torch.preserve_format)
        self.state[p]["momentum_buffer"] = buffer
        return buffer
