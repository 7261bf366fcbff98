"""What can be asked of steps besides their options: clipping, skipping, averaging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from optim_ext import _grad_control, _joint
from optim_ext._averaging.step import step_averaging
from optim_ext._grad_control import GradPolicy, Verdict
from optim_ext._precision.options import TWINS
from optim_ext._step.base import Group
from optim_ext._step.torch_path import TorchPath
from optim_ext.swa_utils import AveragedModel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NOT_COMPILED = (
    "clip_grad_norm cannot be used with a compiled step: it would have to remember a norm from one graph for the next. "
    "Use set_grad_policy(max_norm=...), which is compiled into the step"
)


class _AskedByScaler:
    """``_step_supports_amp_scaling`` of an optimizer that is not fused, which has no such attribute. GradScaler.step asks
    for it before it unscales the gradients, without raising their versions: what was taken of them may be void then."""

    def __get__(self, optimizer: ControlledStep | None, owner: type) -> Any:
        if optimizer is not None:
            optimizer._asked().by_scaler = True
        raise AttributeError("_step_supports_amp_scaling")


class ControlledStep(TorchPath):
    _step_supports_amp_scaling = _AskedByScaler()  # torch's constructors set the attribute where it is fused
    _plan: Any  # of the last step: what is asked of the next one may need another

    def average_into(
        self, averaged: AveragedModel | None, model: Module | None = None, *, masters: bool = False
    ) -> None:
        """Let every step also update an average of the model: ``step()`` then does what ``step()`` followed by
        ``averaged.update_parameters(model)`` does, bit for bit, with one pass over the parameters.

        All of the model's parameters are averaged, also those without a gradient and those this optimizer does not
        have, and its buffers as ``averaged`` treats them. A step that ``found_inf`` skips leaves the average and its
        count alone. Groups that take torch's own code, and compiled steps, are followed by the update on its own. Not
        saved with the optimizer: call it again on a copy, and after loading one by pickle. The step by which
        torch.distributed.checkpoint makes state (the first, with rates and gradients of zero) is not averaged.

        Args:
            averaged: an :class:`optim_ext.swa_utils.AveragedModel` that averages natively (the mean, or this package's
                EMA functions), on the parameters' devices; None: average no more.
            model: the model to average, by default the one ``averaged`` was made from or updated with last.
            masters: average the float32 values of parameters that ``param_precision`` keeps a master, remainder or
                compensation of, not what they are rounded to. These take a pass of their own after the step, with
                temporary memory for the values of a few of them. Use an average of ``dtype=torch.float32``.

        Raises:
            TypeError: ``averaged`` is not such a model.
            ValueError: it has an averaging function of its own, does not match the model, is on another device, belongs
                to another optimizer, or its model is not known.
        """
        self._plan = None
        self._ask().averaging = None if averaged is None else step_averaging(averaged, model, self, masters)

    def _kept_how(self, group: Group) -> list[str]:
        lines, averaging = super()._kept_how(group), self._asked().averaging
        keepings = [self._keeping(group, index) for index in range(len(group["params"]))] if lines else []
        beside = sum(keeping is not None and keeping.param in TWINS for keeping in keepings)
        if averaging is not None and averaging.masters and beside:
            lines.append(f"averages take the float32 values of {beside} parameters, after the step")
        return lines

    def clip_grad_norm(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        process_group: ProcessGroup | None = None,
    ) -> Tensor:
        """Clip the gradients of the next step by their norm: instead of ``torch.nn.utils.clip_grad_norm_``.

        One native reduction over the gradients of all groups. The factor ``max_norm / (norm + 1e-6)``, at most one, is
        applied inside the next ``step()``, once; ``p.grad`` stays as it is. A second call replaces the first,
        ``zero_grad()`` drops it. It is about the gradient tensors that are there when it is called: it is void if the
        step finds none of them (after ``model.zero_grad()`` and another backward pass); if they have been written in
        place, the step takes the norm again of what it finds. Several optimizers of one model are clipped by one norm
        with :func:`optim_ext.utils.clip_optimizers`.

        Args:
            max_norm: the largest norm allowed, at least 0.
            norm_type: 1, 2 or inf.
            error_if_nonfinite: raise where the norm is infinite or NaN (reads the norm on the host).
            process_group: processes that each have other gradients, which belong to the norm: the shards of one
                FullyShardedDataParallel (all of this optimizer's parameters must be), or stages of a pipeline. All of them
                have to call. What DTensors say of their layout needs no group.

        Returns:
            The norm of all gradients viewed as one vector, 0 if there are none: float32 (float64 if there are float64
            gradients), shape (), on the device of the first gradient. Nothing waits for it. Without
            ``scaler.unscale_(optimizer)`` before it, gradients are still scaled by ``GradScaler`` here; the step then
            turns this tensor into the norm of the unscaled gradients, which is what it clips by.

        Raises:
            ValueError: ``max_norm`` is negative or NaN, or another ``norm_type``.
            RuntimeError: no native norm for a gradient (a subclass other than DTensor, or a shard of
                FullyShardedDataParallel), a norm that is not finite with ``error_if_nonfinite``, or a policy that is shared with other optimizers.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(NOT_COMPILED)
        controls = self._ask()
        controls.armed = None
        controls.armed = _grad_control.arm(self, max_norm, norm_type, error_if_nonfinite, process_group)
        return controls.armed.returned

    @overload
    def set_grad_policy(self) -> None: ...

    @overload
    def set_grad_policy(
        self, *, max_norm: float, norm_type: float = ..., skip_nonfinite: bool = ..., skip_above: float | None = ...
    ) -> GradPolicy: ...

    @overload
    def set_grad_policy(
        self,
        *,
        max_norm: float | None = ...,
        norm_type: float = ...,
        skip_nonfinite: Literal[True],
        skip_above: float | None = ...,
    ) -> GradPolicy: ...

    @overload
    def set_grad_policy(
        self, *, max_norm: float | None = ..., norm_type: float = ..., skip_nonfinite: bool = ..., skip_above: float
    ) -> GradPolicy: ...

    @overload
    def set_grad_policy(
        self,
        *,
        max_norm: float | None = ...,
        norm_type: float = ...,
        skip_nonfinite: bool = ...,
        skip_above: float | None = ...,
    ) -> GradPolicy | None: ...

    def set_grad_policy(
        self,
        *,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        skip_above: float | None = None,
    ) -> GradPolicy | None:
        """Clip and skip at every ``step()``, for frameworks that call nothing else. Without arguments: no longer.

        The norm is taken inside the step, and what becomes of it is decided on its device. A skipped step writes
        nothing: no parameter, state, step count or average. The policy is not part of ``state_dict()``.

        Args:
            max_norm: gradients enter the update multiplied by ``max_norm / (norm + 1e-6)`` where that is below one.
            norm_type: 1, 2 or inf.
            skip_nonfinite: skip a step whose norm is infinite or NaN.
            skip_above: skip a step unless its norm is at most this.

        Returns:
            The policy, also as ``grad_policy``: ``last_norm``, ``last_step_skipped`` and ``skipped_steps`` are tensors
            that say what happened. None without arguments.

        Raises:
            ValueError: a limit is negative or NaN, or another ``norm_type``.

        ``clip_grad_norm`` takes the place of ``max_norm`` and of the norm for the step it arms. Skipping needs step
        counts where it is decided: a step that may be skipped moves those of parameters on a GPU there, to stay.
        ``SparseAdam``, which counts in Python numbers, cannot skip on a GPU. The state that a first step makes is there
        also if a GPU skips it: zeros and counts of zero, from which the next step starts as from none.
        """
        self._replace_policy(self._policy_of(max_norm, norm_type, skip_nonfinite, skip_above))
        return self.grad_policy

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        controls = self._asked()
        controls.armed = controls.turn = None

    zero_grad.__doc__ = Optimizer.zero_grad.__doc__

    def _verdict(self) -> Verdict:
        """What this step is told of its gradients: by GradScaler, by ``clip_grad_norm`` and by the standing policy.

        GradScaler leaves word on optimizers that were made with ``fused=True``, whatever their groups say by now.
        """
        grad_scale = found_inf = None
        if self.__dict__.get("_step_supports_amp_scaling", False) or any(
            group.get("fused") for group in self.param_groups
        ):
            grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        asked = self._asked()
        if asked.armed is None and asked.policy is None:
            return Verdict(grad_scale, found_inf)
        if asked.policy is not None and asked.policy._sharing is not None:
            return _joint.judge_turn(self, asked.policy, grad_scale, found_inf)
        return _grad_control.judge(self, asked.armed, asked.policy, grad_scale, found_inf)
