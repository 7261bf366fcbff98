"""Adam for sparse gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim_ext._step import FusedStep, Group

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class SparseAdam(FusedStep, torch.optim.SparseAdam):
    __doc__ = torch.optim.SparseAdam.__doc__

    _op = "sparse_adam_"
    _number_state = frozenset({"step"})
    _takes_dense = False

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            betas: tuple[float, float] = ...,
            eps: float = ...,
            maximize: bool = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...

    def _init_group(self, group: Group, params: list[Tensor], grads: list[Tensor], *_: list[Tensor]) -> None:
        """Check gradients and make missing state, as torch's step does."""
        for p in group["params"]:
            if p.grad is None:
                continue
            if not p.grad.is_sparse:
                raise RuntimeError("SparseAdam does not support dense gradients, please consider Adam instead")
            params.append(p)
            grads.append(p.grad)
            state = self.state[p]
            if len(state) == 0:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _traced_step(self) -> Tensor | None:
        self._refuse_controls("compiled steps on sparse gradients")
        for group in self.param_groups:
            self._refuse_precision(group, "compiled steps on sparse gradients are torch's: step eagerly")
        self._torch_step(self.param_groups)  # torch.compile does not trace sparse gradients
        return None

    def _takes_sparse(self, group: Group) -> bool:
        return True

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        return super()._hypers({"maximize": False, **group, "betas": self._values(group, "betas", 2)})
