"""The step as torch.compile sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optim_ext import _grad_control
from optim_ext._grad_control import Verdict
from optim_ext._step.base import Group
from optim_ext._step.controls import NOT_COMPILED
from optim_ext._step.sharded import ShardedStep
from optim_ext._step.torch_path import RECORDED
from optim_ext._tables import TABLES


class TracedStep(ShardedStep):
    def _traced_step(self) -> Tensor | None:
        """The step as torch.compile sees it: torch's gathering (which Dynamo knows) and the op itself.

        Returns what says whether it was skipped.
        """
        for group in self.param_groups:
            self._refuse_precision(group, "it is being compiled, which these options do not take yet: step eagerly")
        reasons = [self._traced_torch_reason(group) for group in self.param_groups]
        by_torch = [group for group, reason in zip(self.param_groups, reasons, strict=True) if reason is not None]
        if by_torch:
            self._refuse_controls(next(reason for reason in reasons if reason is not None))
            self._torch_step(by_torch)
        verdict = self._traced_verdict()
        for group, reason in zip(self.param_groups, reasons, strict=True):
            if reason is not None:
                continue
            lists: list[list[Tensor]] = [[] for _ in range(2 + len(self._state_keys(group)))]
            self._init_group(group, *lists)
            if lists[0]:
                self._traced_call(group, lists, verdict)
        verdict.record()
        return verdict.found_inf

    def _traced_call(self, group: Group, lists: list[list[Tensor]], verdict: Verdict) -> None:
        getattr(torch.ops.optim_ext, self._op)(
            *([tensor for tensor in one if tensor is not None] for one in lists),
            **self._named_hypers(group),
            grad_scale=verdict.grad_scale,
            found_inf=verdict.found_inf,
            grad_factor=verdict.grad_factor,
        )

    def _traced_torch_reason(self, group: Group) -> str | None:
        """As _torch_reason, for what a compiler can trace."""
        if group.get("differentiable"):
            return RECORDED
        if any(p.grad is not None and _grad_control.is_sharded(p) for p in group["params"]):
            return "a parameter is a tensor subclass that intercepts its operations"
        return None

    def _traced_verdict(self) -> Verdict:
        if self._asked().armed is not None:
            raise RuntimeError(NOT_COMPILED)
        return self._verdict()

    def _named_hypers(self, group: Group) -> dict[str, Any]:
        """The hyper-parameters as the op's schema wants them."""
        named = zip(TABLES[self._op].hypers, self._hypers(group), strict=True)
        return {name: self._as_tensor(value) if kind == "tensor" else value for (name, kind), value in named}

    @staticmethod
    def _as_tensor(value: Any) -> Tensor:
        """A number becomes a tensor by a product: that is how a compiler keeps a number it has seen to change as an input of
        the graph; any other way compiles its value in."""
        return value if isinstance(value, Tensor) else torch.ones((), dtype=torch.float64) * value
