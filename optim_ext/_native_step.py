"""What every optimizer with a native step has in common, whatever its rule."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from optim_ext import _constructor, _drop, _grad_control, _joint
from optim_ext._averaging.step import StepAveraging
from optim_ext._copies import Copies
from optim_ext._drop import Dropped
from optim_ext._grad_control import ArmedClip, GradPolicy, GroupNorms, NonFinite, Verdict
from optim_ext._load import _C

# What help() says of every class after its own lines.
ADDED_TO_ALL = """\
* ``average_into(averaged)``: every step also updates an :class:`optim_ext.swa_utils.AveragedModel`.
* ``find_nonfinite()`` names the parameters that are not finite, ``measure_step()`` gives norms of a step.
* ``drop(params)`` removes parameters with their state.
* :func:`optim_ext.explain` says which parameter groups step natively, and why others do not.
"""


@dataclass
class Controls:
    """What was asked of an optimizer's steps besides its options. In one object, as frameworks wrap optimizers in others
    that share their attributes: what such a wrapper is told reaches the optimizer that steps."""

    armed: ArmedClip | None = None  # by clip_grad_norm, for the next step
    by_scaler: bool = False  # the step is GradScaler's, which may have unscaled the gradients just now
    turn: _joint.Turn | None = None  # told by the first of those that share the policy, for the next step
    policy: GradPolicy | None = None
    averaging: StepAveraging | None = None
    last_norm: Tensor | None = None  # of the gradients that clip_grad_norm had clipped last, where there is no policy
    last_skip: bool | Tensor | None = None  # of the last step, by GradScaler's word; None: it said nothing
    skips: int | Tensor = 0  # how many there were, where there is no policy
    groups: int = 0  # how many parameter groups the optimizer had when it was last asked for one of these

    def note(self, verdict: Verdict) -> None:
        """What became of a step that has been taken."""
        self.armed, self.by_scaler, self.last_skip = None, False, None
        if verdict.policy is not None:
            return
        if verdict.armed is not None:
            self.last_norm = verdict.armed.returned
        found_inf = verdict.found_inf
        if found_inf is None:
            return
        if found_inf.device.type == "cpu":
            self.last_skip = found_inf.item() == 1
        else:  # the device knows, and counts
            self.last_skip = found_inf.reshape(()) == 1
            if not isinstance(self.skips, Tensor) or self.skips.device != found_inf.device:
                self.skips = torch.full_like(self.last_skip, int(self.skips), dtype=torch.int64)
        self.skips += self.last_skip


class NativeStep(Optimizer):
    """Base of all optimizers whose step runs natively: of :class:`optim_ext._step.FusedStep` and of L-BFGS.

    A subclass says with ``adds`` what help() is to tell of it after torch's own text, or ours.
    """

    __signature__: ClassVar[inspect.Signature | None]  # None: what the constructor itself says
    _controls: Controls
    # Why a norm cannot be taken of its gradients and other optimizers' together; None if it can.
    _no_joint_norm: ClassVar[str | None] = None

    def __init_subclass__(cls, adds: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if adds is None:
            if "__init__" in cls.__dict__:  # a constructor of its own, which says its arguments itself
                cls.__signature__ = None
            return
        signature = cls.__dict__.get("__signature__") or _constructor.signature_of(cls)
        cls.__signature__ = signature
        if cls.__doc__ is not None:
            adds = _constructor.documented(cls, signature) + adds
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n.. rubric:: What optim_ext adds\n\n{adds}"

    def __init__(
        self,
        *args: Any,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        skip_nonfinite: bool = False,
        skip_above: float | None = None,
        **kwargs: Any,
    ) -> None:
        """What ``set_grad_policy`` is given, from the first step on; of all parameter groups together."""
        policy = self._policy_of(max_norm, norm_type, skip_nonfinite, skip_above)
        try:
            super().__init__(*args, **kwargs)
        except TypeError:
            _constructor.refuse_unknown(type(self), kwargs)
            raise
        if policy is not None:
            self._replace_policy(policy)

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Torch's wrapper of a step, which calls hooks and gives profilers a name. Where there are none it only costs
        more than a step of a few parameters takes."""
        hooked = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or _C.is_observed() or _has_step_hooks(args[0]):
                return hooked(*args, **kwargs)
            return func(*args, **kwargs)

        return wrapper

    def find_nonfinite(self) -> list[NonFinite]:
        """Name the parameters whose gradient or value is not finite, with counts (of parts, for complex numbers; of this
        process's part, for sharded parameters).

        An empty list if there are none. Reads everything, and waits for the device.
        """
        return _grad_control.find_nonfinite(self)

    def measure_step(self) -> AbstractContextManager[list[GroupNorms]]:
        """Norms of gradient, parameter and update of each group for a step taken inside, there when it ends::

            with optimizer.measure_step() as norms:
                optimizer.step()
            print(norms[0].update / norms[0].param)

        Keeps a copy of all parameters meanwhile. Where ``param_precision`` keeps a master, remainder or compensation, the
        norms are of what it and the parameter are together, in float32.
        """
        return _grad_control.measure_step(self)

    @property
    def grad_policy(self) -> GradPolicy | None:
        """What ``set_grad_policy`` made, or None."""
        return self._asked().policy

    @property
    def last_norm(self) -> Tensor | None:
        """The norm of the gradients at the last step that took one, for its policy or for ``clip_grad_norm``: shape (), on
        their device. None before."""
        asked = self._asked()
        return asked.last_norm if asked.policy is None else asked.policy.last_norm

    @property
    def last_step_skipped(self) -> Tensor | None:
        """Whether the last step was skipped, by its policy or by a GradScaler that left the decision to the step
        (``fused=True``): bool, shape (), on the device of the decision. None where nothing could skip it, and before the
        first step. Reading it waits for the device, a step does not."""
        asked = self._asked()
        if asked.policy is not None:
            return asked.policy.last_step_skipped
        return None if asked.last_skip is None else torch.as_tensor(asked.last_skip)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped since the policy was set; without one, how many steps of this object GradScaler's word
        has skipped (``fused=True``): int64, shape (). Steps that GradScaler does not take at all are not among them."""
        asked = self._asked()
        return torch.as_tensor(asked.skips).clone() if asked.policy is None else asked.policy.skipped_steps

    def _policy_of(
        self, max_norm: float | None, norm_type: float, skip_nonfinite: bool, skip_above: float | None
    ) -> GradPolicy | None:
        """The policy that these make, or None where nothing is asked for.

        Raises:
            ValueError: a limit is negative or NaN, or another ``norm_type``.
        """
        norm_type = _grad_control.checked_norm_type(norm_type)
        if max_norm is None and not skip_nonfinite and skip_above is None:
            return None
        return GradPolicy(max_norm, norm_type, skip_nonfinite, skip_above)

    def _replace_policy(self, policy: GradPolicy | None) -> None:
        controls = self._ask()
        if controls.policy is not None and controls.policy._sharing is not None:
            controls.policy._sharing.leave(controls)
        controls.policy, controls.turn = policy, None

    def _asked(self) -> Controls:
        controls: Controls | None = getattr(self, "_controls", None)
        if controls is None:
            self._controls = controls = Controls(groups=len(self.__dict__.get("param_groups", ())))
        return controls

    def _ask(self) -> Controls:
        """The controls, for a caller who is about to change them and sees every group."""
        controls = self._asked()
        controls.groups = len(self.param_groups)
        return controls

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._asked()  # there from the constructor on, which adds the first group
        super().add_param_group(param_group)
        self._ask()

    add_param_group.__doc__ = Optimizer.add_param_group.__doc__

    def drop(self, params: Dropped | Iterable[Dropped]) -> None:
        """Remove parameters, with their names and their state: the counterpart of ``add_param_group``.

        The tensors stay as they are. A group that is left without parameters stays, as schedulers count groups. A clip that
        was asked of the next step is of the gradients that are left. Averages (``average_into``) are of the model, and go on
        with it.

        Args:
            params: one or any number of this optimizer's parameters, as tensors, as names where it was given names, or as
                pairs of name and tensor (``module.named_parameters()``).

        Raises:
            ValueError: one of them is no parameter of this optimizer. Nothing has been removed then.
            TypeError: one of them is neither a tensor nor a name.
            RuntimeError: other optimizers have yet to step by a norm that these gradients are part of.
        """
        _drop.drop(self, params)

    def _keep_members(self, group: dict[str, Any], kept: list[int]) -> None:
        """Leave these of a group's parameters, a list, and what else the group has for each of them."""
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [group[key][index] for index in kept]

    def _forget_params(self) -> None:
        """Let go of everything that was noted of the parameters as they have been."""

    def __repr__(self) -> str:
        """Torch's, and the policy."""
        text, policy = super().__repr__(), self.grad_policy
        return text if policy is None else f"{text.removesuffix(')')}grad_policy: {policy}\n)"

    def __getstate__(self) -> dict[str, Any]:
        """Torch's, which copies and pickles options and state alone, and the policy: it must not get lost."""
        policy = self.grad_policy
        return super().__getstate__() | ({} if policy is None else {"_grad_policy": policy})

    def __setstate__(self, state: dict[str, Any]) -> None:
        policy = state.get("_grad_policy")
        super().__setstate__({key: value for key, value in state.items() if key != "_grad_policy"})
        controls = self._asked()  # there from now on: a wrapper that shares attributes must find it
        if policy is not None:
            controls.policy = policy
            if policy._sharing is not None:
                policy._sharing.join(self)

    def load_state_dict(self, state_dict: dict[str, Any], *, copy: bool = False) -> None:
        """Load what :meth:`state_dict` of this class, or of torch's class of the same name, returned.

        As in torch, state takes the dtype and device of its parameter, with one difference: numbers in tensors, such as
        step counts and running products, keep the precision they were saved in. A loaded run has the bits of one that
        was never interrupted.

        Args:
            state_dict: the options and state; it is not written to by loading.
            copy: copy every tensor. Without it state that has the right dtype and device is not copied, as in torch:
                the optimizer then has, and writes to, the tensors of ``state_dict``.

        Raises:
            ValueError: the parameter groups are not those of this optimizer.
        """
        given: list[dict[str, Any]] = []
        handles = (
            self.register_load_state_dict_pre_hook(lambda _, seen: given.append(seen)),  # after hooks that replace it
            self.register_load_state_dict_post_hook(lambda _: self._finish_load(given[-1], copy), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _finish_load(self, saved: dict[str, Any], copy: bool) -> None:
        self._undo_casts(saved)
        if copy:
            copies = Copies(saved["state"])
            for owner, entry in self.state.items():
                self.state[owner] = copies.of(entry)

    @property
    @abstractmethod
    def _native_how(self) -> str:
        """What a native step consists of, in a few words."""

    def _native_how_of(self, group: dict[str, Any]) -> str:
        """The same of one parameter group."""
        return self._native_how

    def _seen_locally(self) -> AbstractContextManager[object]:
        """Within the block ``param_groups`` have this process's parts of parameters and gradients."""
        return nullcontext()

    def _kept_how(self, group: dict[str, Any]) -> list[str]:
        """How parameters and state are kept that are not kept as torch keeps them: one line for each way."""
        return []

    @abstractmethod
    def _torch_reason(self, group: dict[str, Any], ahead: bool = False) -> str | None:
        """Why a group takes torch's own code, or None if it runs natively; ``ahead``: once there are gradients."""

    @abstractmethod
    def _undo_casts(self, saved: dict[str, Any]) -> None:
        """Put back what torch, which knows of parameters and step counts only, has cast to the dtype of a parameter."""


def _has_step_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
