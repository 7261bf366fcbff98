"""The mixin that replaces ``step()`` of a ``torch.optim`` class by one native call per parameter group and device.

Everything else (constructor, validation, hooks, ``state_dict``) stays torch's own. State lives in ``optimizer.state[p]``
as ordinary tensors under torch's keys; torch's own ``_init_group`` creates it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim import Optimizer

from optim_ext._native_step import ADDED_TO_ALL
from optim_ext._step.base import Call, Group, Loss
from optim_ext._step.given_grads import Grads, in_place_of_own
from optim_ext._step.tracing import TracedStep

__all__ = ["Call", "FusedStep", "Group"]

# Torch's check that an optimizer met inside a CUDA graph is capturable; newer versions gave it another name.
_HEALTH_CHECK: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None) or Optimizer._cuda_graph_capture_health_check
)

# What help() says of each class.
_ADDS = f"""\
* ``clip_grad_norm(max_norm)`` instead of ``torch.nn.utils.clip_grad_norm_``: the next ``step()`` clips as it updates.
* ``set_grad_policy(max_norm=, skip_nonfinite=, skip_above=)``: every step clips, or is skipped, by the gradients' norm.
{ADDED_TO_ALL}"""

# What a step makes of a group's options.
_FROM_OPTIONS = ("_state_keys", "_hypers", "_takes_sparse", "_signature", "_verdict", "_step_as_told", "_values")


def _grad_mode_of_defaults(step: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``step`` without autograd, or with it for ``differentiable=True``, as torch's optimizers do."""

    @functools.wraps(step)
    def wrapper(self: FusedStep, *args: Any, **kwargs: Any) -> Any:
        recorded = bool(self.defaults.get("differentiable", False))
        if torch.compiler.is_compiling() or recorded:
            with torch.set_grad_enabled(recorded):
                return step(self, *args, **kwargs)
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # what the context does, at half its cost
        try:
            return step(self, *args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return wrapper


class FusedStep(TracedStep):
    """Base of the native optimizers: put it in front of the ``torch.optim`` class whose rule it replaces.

    A subclass names its op, whose table says where its state lists and its hyper-parameters come from, and what a table
    cannot say:

    * ``_op``: name of the op in ``torch.ops.optim_ext``.
    * ``_state_keys(group)``: for each list after ``params`` and ``grads``, in the order of the op's schema and of torch's
      ``_init_group``, the key in ``state[p]``, or None where this group has no such state.
    * ``_hypers(group)``: the hyper-parameters in the order of the op's schema, where they are not options as they are.
    * ``_number_state``: the keys among these under which torch keeps a Python number, a count of steps.
    * ``_takes_sparse(group)``: whether the op takes sparse gradients under these options.
    * ``_takes_dense``: False where ``_init_group`` refuses dense gradients.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        own = "_op" in cls.__dict__  # not of a user's subclass
        super().__init_subclass__(adds=_ADDS if own else None, **kwargs)
        after_mixin = cls.__mro__[cls.__mro__.index(FusedStep) + 1 :]
        step = next(base.__dict__["step"] for base in after_mixin if "step" in base.__dict__)
        cls._bare_torch_step = staticmethod(inspect.unwrap(step))
        ours = (getattr(cls, name).__module__.partition(".")[0] == "optim_ext" for name in _FROM_OPTIONS)
        cls._options_say_all = all(ours)

    @overload
    def step(self, closure: None = None, *, grads: Grads | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @_grad_mode_of_defaults
    def step(self, closure: Callable[[], Any] | None = None, *, grads: Grads | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.
            grads: gradients to step by instead of ``p.grad``, which nobody looks at, writes to or sees changed: one tensor
                of the parameter's shape and dtype, or None, for each parameter of all groups, in order; or a mapping from
                names or parameters to these, in which those that are missing have none. Not with a closure.

        Returns:
            What the closure returned, or None without one.

        Raises:
            RuntimeError: a gradient or state tensor has the wrong dtype, device, layout or shape, or tensors overlap; or
                ``param_groups`` holds some of the groups only, and ``clip_grad_norm``, ``set_grad_policy`` or
                ``average_into`` was asked for when there were more; or ``grads`` has another shape or dtype, or the step was
                asked for something that is about ``p.grad``: by ``clip_grad_norm``, ``share_grad_policy``, or a GradScaler
                that has not unscaled.
            TypeError: ``grads`` and a closure were given, or a gradient is no tensor.
            ValueError: a hyper-parameter is NaN, or an option of several values (``betas``) holds another number of them.
                Or ``grads`` has another number of entries, or one of no parameter here.

        Nothing has been written when one of these is raised.
        """
        if grads is not None:
            return self._step_with(closure, grads)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            found_inf = self._traced_step()
            averaging = self._asked().averaging
            if averaging is not None:
                averaging.update(found_inf, self.state)
        else:
            if "capturable" in self.defaults:  # without the option torch captures the step as it is, and so do we
                _HEALTH_CHECK(self)
            self._eager_step()
        return loss

    def _step_with(self, closure: Any, grads: Grads) -> None:
        """The same step, within which the parameters have these gradients."""
        if closure is not None:
            raise TypeError("step takes a closure or grads, not both: a closure would write its gradients to p.grad")
        with in_place_of_own(self, grads):
            _BARE_STEP(self)


# Without hooks, and in the grad mode that it finds.
_BARE_STEP: Callable[[FusedStep], None] = inspect.unwrap(FusedStep.step)
