"""The mixin that replaces ``step()`` of a ``torch.optim`` class by one native call per parameter group and device.

Everything else (constructor, validation, hooks, ``state_dict``) stays torch's own. State lives in ``optimizer.state[p]``
as ordinary tensors under torch's keys; torch's own ``_init_group`` creates it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from optim_ext._load import _C

Group = dict[str, Any]
# What one op call needs besides tensors: which entries of group["params"], and the op's hyper-parameters in order.
Call = tuple[list[int], tuple[Any, ...]]

# The hyper-parameters of each op in order, and whether the op takes them as tensors.
_HYPERS = {
    op: [
        (argument.name, isinstance(argument.type, torch.TensorType))
        for argument in getattr(torch.ops.optim_ext, op).default._schema.arguments
        if argument.kwarg_only and not argument.has_default_value()
    ]
    for op in _C.ops()
}

# Torch's check that an optimizer met inside a CUDA graph is capturable; newer versions gave it another name.
_HEALTH_CHECK: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or Optimizer._cuda_graph_capture_health_check
)

# Implementations of __torch_function__ that leave a tensor an ordinary one.
_PLAIN = (getattr(Tensor.__torch_function__, "__func__", None), torch.nn.Parameter.__torch_function__)


def _grad_mode_of_defaults(step: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``step`` without autograd, or with it for ``differentiable=True``, as torch's optimizers do."""

    @functools.wraps(step)
    def wrapper(self: FusedStep, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable", False))):
            return step(self, *args, **kwargs)

    return wrapper


class FusedStep(Optimizer):
    """Base of the native optimizers: put it in front of the ``torch.optim`` class whose rule it replaces.

    A subclass names its op and says, per group, where the op's state lists come from and what the hyper-parameters are:

    * ``_op``: name of the op in ``torch.ops.optim_ext``.
    * ``_state_keys(group)``: for each list after ``params`` and ``grads``, in the order of the op's schema and of torch's
      ``_init_group``, the key in ``state[p]``, or None where this group has no such state.
    * ``_hypers(group)``: the hyper-parameters in the order of the op's schema.
    """

    _op: ClassVar[str]
    _plan: _C.Plan | None
    _init_group: Callable[..., Any]  # torch's: creates missing state and gathers a group's tensors

    @property
    def _native_how(self) -> str:
        return f"one call of optim_ext::{self._op} per device"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        raise NotImplementedError

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        raise NotImplementedError

    @_grad_mode_of_defaults
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, or None without one.

        Raises:
            RuntimeError: a gradient or state tensor has the wrong dtype, device, layout or shape, or tensors overlap.
            ValueError: a hyper-parameter is NaN.

        Nothing has been written when one of these is raised.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._traced_step()
        else:
            _HEALTH_CHECK(self)
            self._eager_step()
        return loss

    def _eager_step(self) -> None:
        signature = [self._signature(group) for group in self.param_groups]
        plan = self.__dict__.get("_plan")
        if plan is not None and plan.signature == signature:
            hypers = [self._hypers(group) for group in self.param_groups]
            if plan.step(self.state, self.param_groups, hypers, *self._common()):
                return
        self._plan = None
        self._planning_step(signature)

    def _signature(self, group: Group) -> tuple[Any, ...]:
        """The options a plan is built for: where one changes, the plan is built anew."""
        return (self._state_keys(group), group.get("differentiable"), group.get("capturable"), group.get("fused"))

    def _common(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What every op takes besides its own arguments: (grad_scale, found_inf, grad_factor).

        The first two are GradScaler's, which it leaves on optimizers that were made with ``fused=True``.
        """
        if not any(group.get("fused") for group in self.param_groups):
            return None, None, None
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None), None

    def _planning_step(self, signature: list[tuple[Any, ...]]) -> None:
        """Step where there is no plan yet: decide each group's path, make missing state, build the plan, run it."""
        by_torch = [group for group in self.param_groups if self._torch_reason(group) is not None]
        before = {key: dict(value) if isinstance(value, dict) else value for key, value in self.state.items()}
        try:
            if len(by_torch) == len(self.param_groups) > 0:
                self._torch_step(by_torch)
                return
            reusable = True
            calls, hypers = [], []
            for index, group in enumerate(self.param_groups):
                if any(group is other for other in by_torch):
                    continue
                for members, values in self._prepare(group):
                    reusable &= len(members) == len(group["params"])
                    calls.append((index, members, self._state_keys(group)))
                    hypers.append(values)
            plan = _C.Plan(self._op, self.param_groups, self.state, calls)
            arguments = (self.state, self.param_groups, hypers, *self._common())
            if by_torch:
                plan.step(*arguments, check_only=True)
                self._torch_step(by_torch)
            if not plan.step(*arguments):
                raise RuntimeError(f"the state of {type(self).__name__} changed while it was being prepared")
        except BaseException:
            _restore(self.state, before)
            raise
        if reusable and not by_torch:
            plan.signature = signature
            self._plan = plan

    def _prepare(self, group: Group) -> list[Call]:
        """Let torch create missing state, and return the op calls for the step that is being prepared."""
        self._init_group(group, *([] for _ in range(2 + len(self._state_keys(group)))))
        return [(list(range(len(group["params"]))), self._hypers(group))]

    def _torch_reason(self, group: Group, ahead: bool = False) -> str | None:
        """Why ``group`` takes torch's own code, or None if it runs natively.

        ``ahead`` also looks at parameters that have no gradient yet.
        """
        if group.get("differentiable"):
            return "differentiable=True: the step itself is recorded by autograd"
        for index, p in enumerate(group["params"]):
            if p.grad is None and not (ahead and p.requires_grad):
                continue
            problem = _C.unsupported(p) if _is_plain(p) else "it is a tensor subclass with operations of its own"
            if problem is not None:
                return f"parameter {index}: {problem}"
            if group.get("capturable") and p.device.type == "cpu":
                return f"parameter {index}: capturable=True is for parameters on an accelerator; torch refuses it on the CPU"
            if p.grad is not None:
                problem = _C.unsupported_grad(p.grad)
                if problem is not None:
                    return f"gradient of parameter {index}: {problem}"
        return None

    def _torch_step(self, groups: list[Group]) -> None:
        """Run torch's own step on ``groups``, without firing the step hooks a second time."""
        after_mixin = type(self).__mro__[type(self).__mro__.index(FusedStep) + 1 :]
        step = next(cls.__dict__["step"] for cls in after_mixin if "step" in cls.__dict__)
        if getattr(step, "hooked", False):
            step = step.__wrapped__
        all_groups = self.param_groups
        counters = [(entry["step"], entry["step"].clone()) for entry in self.state.values() if _has_counter(entry)]
        self.param_groups = groups
        try:
            step(self)
        except BaseException:
            for counter, count in counters:  # torch counts before it refuses
                counter.copy_(count)
            raise
        finally:
            self.param_groups = all_groups

    def _traced_step(self) -> None:
        """The step as torch.compile sees it: torch's gathering (which Dynamo knows) and the op itself."""
        op = getattr(torch.ops.optim_ext, self._op)
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(2 + len(self._state_keys(group)))]
            self._init_group(group, *lists)
            if lists[0]:
                op(*lists, **self._named_hypers(group))

    def _named_hypers(self, group: Group) -> dict[str, Any]:
        named = zip(_HYPERS[self._op], self._hypers(group), strict=True)
        return {
            name: torch.as_tensor(value, dtype=torch.float64) if is_tensor and not isinstance(value, Tensor) else value
            for (name, is_tensor), value in named
        }


def _has_counter(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("step"), Tensor) and not entry["step"].requires_grad


def _is_plain(tensor: Tensor) -> bool:
    implementation = type(tensor).__torch_function__
    return getattr(implementation, "__func__", implementation) in _PLAIN


def _restore(state: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Undo lazy state creation after a step that failed: the same entries, and the same inner dicts, as before."""
    for key in list(state):
        if key not in before:
            del state[key]
        elif isinstance(state[key], dict):
            state[key].clear()
            state[key].update(before[key])
