"""Which groups take torch's own code, why, and how it is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from optim_ext import _grad_control
from optim_ext._load import _C
from optim_ext._step.base import Group
from optim_ext._step.lazy import LazyStep
from optim_ext._tables import TABLES

# Why a differentiable step takes torch's code.
RECORDED = "differentiable=True: the step itself is recorded by autograd"

_COUNTED_IN = (torch.float32, torch.float64)  # step counters

# Implementations of __torch_function__ that leave a tensor an ordinary one.
_PLAIN = (getattr(Tensor.__torch_function__, "__func__", None), torch.nn.Parameter.__torch_function__)


class TorchPath(LazyStep):
    _on_torchs_path: bool = False  # while torch's own step runs
    _bare_torch_step: ClassVar[Callable[..., Any]]  # torch's, without what our step() is wrapped in already

    def _torch_reason(self, group: Group, ahead: bool = False) -> str | None:
        """Why ``group`` takes torch's own code, or None if it runs natively.

        ``ahead`` also looks at parameters that have no gradient yet.
        """
        if group.get("differentiable"):
            return RECORDED
        counted: set[int] = set()
        numbers = () if torch.compiler.is_compiling() else TABLES[self._op].scalar_state  # tracing knows no addresses
        for index, p in enumerate(group["params"]):
            if p.grad is None and not (ahead and p.requires_grad):
                continue
            problem = _C.unsupported(p) if is_plain(p) else "it is a tensor subclass with operations of its own"
            if problem is None:
                problem = self._without_norm(group, p)
            if problem is not None:
                return f"{self._described(group, index)}: {problem}"
            entry = self.state[p] if p in self.state else {}
            if not isinstance(entry, Mapping):
                raise RuntimeError(f"{self._described(group, index)}: its state is {entry!r}, expected a dict")
            if self._has_torch_step() and (key := _in_its_own_memory(p, entry)) is not None:
                return f"{self._described(group, index)}: its state {key!r} lies in its own memory"
            counter = entry.get("step")
            if self._has_torch_step() and isinstance(counter, Tensor) and counter.dtype not in _COUNTED_IN:
                return f"{self._described(group, index)}: its step counter is of {counter.dtype}"
            for key in numbers:
                if isinstance(number := entry.get(key), Tensor) and number.device.type not in ("cpu", "meta"):
                    if number.data_ptr() in counted:  # of which each parameter in turn has another value
                        return f"{self._described(group, index)}: its state {key!r} is that of another parameter, too"
                    counted.add(number.data_ptr())
            if group.get("capturable"):
                if p.device.type == "cpu":
                    return (
                        f"{self._described(group, index)}: capturable=True is for parameters on an accelerator; torch "
                        "refuses it on the CPU"
                    )
                for key in numbers:
                    if isinstance(number := entry.get(key), Tensor) and number.device != p.device:
                        return (
                            f"{self._described(group, index)}: capturable=True needs its state {key!r} on {p.device}; torch "
                            "refuses it elsewhere"
                        )
            if p.grad is not None:
                problem = _C.unsupported_grad(p.grad, self._steps_rows(group))
                if problem is None and p.grad.is_sparse and not p.is_contiguous():
                    problem = "it is sparse, and its parameter is not contiguous"
                if problem is not None:
                    return f"gradient of {self._described(group, index)}: {problem}"
        return None

    def _without_norm(self, group: Group, p: Tensor) -> str | None:
        if _grad_control.is_flat_shard(p) and self._measures(group):
            return "it is a shard of FSDP, whose norm is not that of the parameter"
        return None

    def _reason_of_parts(self, groups: list[Group]) -> str | None:
        """Why no code at all can step these groups."""
        for group in groups:
            for index, p in enumerate(group["params"]):
                problem = self._without_norm(group, p)
                if problem is not None:
                    return f"{self._described(group, index)}: {problem}"
        return None

    def _has_torch_step(self) -> bool:
        return self._bare_torch_step is not inspect.unwrap(Optimizer.step)

    def _torch_step(self, groups: list[Group]) -> None:
        """Run torch's own step on ``groups``, without firing the step hooks a second time."""
        if not torch.compiler.is_compiling():
            self._check_sparse(groups)
        reason = self._reason_of_parts(groups)
        if reason is not None or not self._has_torch_step():
            reason = reason or self._torch_reason(groups[0])
            raise RuntimeError(f"{type(self).__name__} runs natively only, and torch has no code for it: {reason}")
        if torch.compiler.is_compiling() and len(groups) == len(self.param_groups):
            self._bare_torch_step(self)  # the compiler of torch 2.11 sets no attributes of an optimizer
            return
        all_groups = self.param_groups
        counters = [(entry["step"], entry["step"].clone()) for entry in self.state.values() if _has_counter(entry)]
        self.param_groups, self._on_torchs_path = groups, True
        try:
            self._bare_torch_step(self)
        except BaseException:
            for counter, count in counters:  # torch counts before it refuses
                counter.copy_(count)
            raise
        finally:
            self.param_groups, self._on_torchs_path = all_groups, False

    def _check_sparse(self, groups: list[Group]) -> None:
        """Refuse what torch would refuse only when it gets there, with the parameters before it written."""
        for group in groups:
            if group.get("weight_decay", 0) == 0 or not self._takes_sparse({**group, "weight_decay": 0, "momentum": 0}):
                continue
            for index, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"{self._described(group, index)}: weight_decay option is not compatible with sparse gradients, "
                        f"found {group['weight_decay']}, expected 0"
                    )

    def _refuse_controls(self, reason: str | None) -> None:
        """Raise where torch's own code is to run, for the reason given, which knows nothing of factors and skipping."""
        if self._asked().armed is not None or self.grad_policy is not None:
            raise RuntimeError(
                f"clip_grad_norm and set_grad_policy need a native step, but torch's own code would run ({reason}); "
                "use torch.nn.utils.clip_grad_norm_ with this optimizer"
            )


def _has_counter(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("step"), Tensor) and not entry["step"].requires_grad


def _in_its_own_memory(p: Tensor, entry: Mapping[str, Any]) -> str | None:
    """The key of state that a parameter was made to share: ``p.data = state["ax"]``. Torch's code, which writes one after
    the other, gives that a meaning; a kernel that writes both at once does not."""
    if p.numel() == 0 or p.device.type == "meta":
        return None
    place = p.data_ptr()
    return next((key for key, value in entry.items() if isinstance(value, Tensor) and _begins_at(value, place)), None)


def _begins_at(tensor: Tensor, place: int) -> bool:
    return (
        type(tensor) is Tensor and tensor.layout == torch.strided and tensor.numel() > 0 and tensor.data_ptr() == place
    )


def is_plain(tensor: Tensor) -> bool:
    implementation = type(tensor).__torch_function__
    return getattr(implementation, "__func__", implementation) in _PLAIN
